"""Hugging Face tensor names and the places in our variables, both from the table of weights.

A published checkpoint holds one matrix a tensor: per layer, per expert, heads flattened into rows.
Our variables stack layers, experts and the gate/up pair on leading dims and keep heads apart
(docs/architecture.md). Each published matrix is therefore one contiguous block of one leaf, and
importing, exporting and loading are copies of blocks, without a transpose anywhere.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.weights import Weight, table, weights

Path = tuple[str, ...]


# Buffers that some checkpoints (Moonlight's) hold although the config determines them.
IGNORED = re.compile(r"model\.layers\.\d{1,6}\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Place:
    """Where one published matrix lies in our variables: leaf[index], reshaped from `shape`."""

    path: Path
    index: tuple[int, ...]
    shape: tuple[int, ...]  # as published: one or two dims
    dims: tuple[int, ...]  # of leaf[index]
    fp8: bool
    copy: bool


@dataclass(frozen=True)
class Leaf:
    """One array of our variables: `lead` dims of layers, experts and pairs, then its matrix."""

    lead: tuple[int, ...]
    shape: tuple[int, ...]  # of one matrix as published
    dims: tuple[int, ...]  # of one matrix in our variables


@dataclass(frozen=True)
class _Layer:
    number: int  # in published names
    block: str
    lead: tuple[int, ...]  # its index in stacked leaves
    depth: int  # of an MTP module
    wheres: tuple[str, ...]


def num_places(config: ModelConfig) -> int:
    """How many tensors `places` lists, without listing them."""
    return sum(
        sum(row.count(config)) * len(row.hf) * (config.n_routed_experts if row.of_expert else 1)
        for row in weights(config, copies=True)
    )


def places(config: ModelConfig) -> Mapping[str, Place]:
    """Every tensor a published checkpoint of this architecture holds, by its name, layer by layer.

    FP8 scales are not listed: `scale_name` makes a scale's name out of its weight's.
    """
    return _places(config, table())


@functools.lru_cache(maxsize=4)  # V3's 46,183 take a second to list, and 30 MB
def _places(config: ModelConfig, rows: tuple[Weight, ...]) -> Mapping[str, Place]:
    found: dict[str, Place] = {}
    for layer in _layers(config):
        for row in weights(config, copies=True):
            if row.where not in layer.wheres:
                continue
            path, lead = _leaf_of(row, layer)
            shape, dims = _matrix(row, config)
            pair = len(row.hf) > 1
            for half, published in enumerate(row.hf):
                for expert in range(config.n_routed_experts if row.of_expert else 1):
                    index = lead + (expert,) * row.of_expert + (half,) * pair
                    name = published.format(layer=layer.number, expert=expert)
                    found[name] = Place(path, index, shape, dims, row.fp8, row.copy)
    return MappingProxyType(found)


def leaves(config: ModelConfig) -> dict[Path, Leaf]:
    """Every leaf of our variables, by its path."""
    found: dict[Path, Leaf] = {}
    for layer in _layers(config):
        for row in weights(config):
            if row.where in layer.wheres:
                path, index = _leaf_of(row, layer)
                shape, dims = _matrix(row, config)
                lead = row.dims_of(config)[: len(row.lead)]
                # The last layer of a stack has the largest index.
                found[path] = Leaf(tuple(i + 1 for i in index) + lead, shape, dims)
    return found


def _leaf_of(row: Weight, layer: _Layer) -> tuple[Path, tuple[int, ...]]:
    """The path of the leaf that holds a row's weight of a layer, and its index there."""
    path = row.path.format(block=layer.block, depth=layer.depth)
    return tuple(path.split("/")), layer.lead if "{block}" in row.path else ()


def _matrix(row: Weight, config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of a published matrix of a row, and its dims among our variables'."""
    dims = row.dims_of(config)[len(row.lead) :]
    rows = len(row.matrix[0])
    shape = (math.prod(dims[:rows]), math.prod(dims[rows:]))
    return shape[: len(row.matrix)], dims


def scale_name(name: str) -> str:
    """The published name of an FP8 weight's scales: multipliers, despite the name."""
    return name + "_scale_inv"


def scale_shape(shape: tuple[int, ...], block: int = 128) -> tuple[int, ...]:
    """Shape of the scales of a published matrix; the last block of a dim may be partial."""
    return tuple(-(-size // block) for size in shape)


def _layers(config: ModelConfig) -> list[_Layer]:
    dense, main = config.num_dense_layers, config.num_hidden_layers
    layers = [_Layer(0, "", (), 0, ("model",))]
    layers += [_Layer(i, "dense_layers", (i,), 0, ("layer", "dense")) for i in range(dense)]
    layers += [
        _Layer(i, "moe_layers", (i - dense,), 0, ("layer", "moe")) for i in range(dense, main)
    ]
    return layers + [
        _Layer(main + depth, f"mtp_{depth}/block", (), depth, ("layer", "moe", "mtp"))
        for depth in range(config.num_nextn_predict_layers)
    ]
