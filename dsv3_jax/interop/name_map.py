"""The one table between Hugging Face tensor names and our variables, read both ways.

A published checkpoint holds one matrix a tensor: per layer, per expert, heads flattened into rows.
Our variables stack layers, experts and the gate/up pair on leading dims and keep heads apart
(docs/architecture.md). Each published matrix is therefore one contiguous block of one leaf, and
importing, exporting and loading are copies of blocks, without a transpose anywhere.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from dsv3_jax.config import ModelConfig

Path = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ours: path of the leaf in {"params", "router"}; {block} stands for dense_layers, moe_layers or
        mtp_0/block, {depth} for an MTP module's number.
    index: leading index within the leaf after the layer's: "expert", or 0 / 1 for gate / up.
    theirs: the published name; {layer} counts the main layers, then the MTP modules.
    dims: the published matrix in the letters of `_sizes`; what is in brackets is one dim there and
        several dims here.
    where: "model", "layer" (every layer), "dense", "moe" or "mtp".
    fp8: published in FP8 blocks by V3.
    copy: the same numbers as another row's, stored twice by the publisher.
    """

    ours: str
    theirs: str
    dims: str
    where: str
    index: tuple[str | int, ...] = ()
    fp8: bool = False
    copy: bool = False
    when: Callable[[ModelConfig], bool] = lambda config: True


def _compressed(config: ModelConfig) -> bool:
    return config.q_lora_rank is not None


def _uncompressed(config: ModelConfig) -> bool:
    return config.q_lora_rank is None


def _shared(config: ModelConfig) -> bool:
    return config.n_shared_experts > 0


def _biased(config: ModelConfig) -> bool:
    return config.has_router_bias


_P, _L = "params/{block}/", "model.layers.{layer}."
_ATTN, _ATTN_HF = _P + "self_attn/", _L + "self_attn."
_EXPERT = _L + "mlp.experts.{expert}."
_MTP = "params/mtp_{depth}/"

Fp8 = functools.partial(Row, fp8=True)

# fmt: off
NAME_MAP: tuple[Row, ...] = (
    Row("params/embed_tokens", "model.embed_tokens.weight", "V D", "model"),
    Row("params/norm", "model.norm.weight", "D", "model"),
    Row("params/lm_head", "lm_head.weight", "V D", "model"),

    Row(_P + "input_layernorm", _L + "input_layernorm.weight", "D", "layer"),
    Row(_P + "post_attention_layernorm", _L + "post_attention_layernorm.weight", "D", "layer"),
    Fp8(_ATTN + "q_proj", _ATTN_HF + "q_proj.weight", "(N HR) D", "layer", when=_uncompressed),
    Fp8(_ATTN + "q_a_proj", _ATTN_HF + "q_a_proj.weight", "Q D", "layer", when=_compressed),
    Row(_ATTN + "q_a_layernorm", _ATTN_HF + "q_a_layernorm.weight", "Q", "layer", when=_compressed),
    Fp8(_ATTN + "q_b_proj", _ATTN_HF + "q_b_proj.weight", "(N HR) Q", "layer", when=_compressed),
    Fp8(_ATTN + "kv_a_proj_with_mqa", _ATTN_HF + "kv_a_proj_with_mqa.weight", "CR D", "layer"),
    Row(_ATTN + "kv_a_layernorm", _ATTN_HF + "kv_a_layernorm.weight", "C", "layer"),
    Fp8(_ATTN + "kv_b_proj", _ATTN_HF + "kv_b_proj.weight", "(N HU) C", "layer"),
    Fp8(_ATTN + "o_proj", _ATTN_HF + "o_proj.weight", "D (N U)", "layer"),

    Fp8(_P + "mlp/gate_up_proj", _L + "mlp.gate_proj.weight", "I D", "dense", index=(0,)),
    Fp8(_P + "mlp/gate_up_proj", _L + "mlp.up_proj.weight", "I D", "dense", index=(1,)),
    Fp8(_P + "mlp/down_proj", _L + "mlp.down_proj.weight", "D I", "dense"),

    Row(_P + "mlp/gate", _L + "mlp.gate.weight", "E D", "moe"),
    Row("router/{block}/mlp/e_score_correction_bias", _L + "mlp.gate.e_score_correction_bias",
        "E", "moe", when=_biased),
    Fp8(_P + "mlp/experts/gate_up_proj", _EXPERT + "gate_proj.weight", "F D", "moe", ("expert", 0)),
    Fp8(_P + "mlp/experts/gate_up_proj", _EXPERT + "up_proj.weight", "F D", "moe", ("expert", 1)),
    Fp8(_P + "mlp/experts/down_proj", _EXPERT + "down_proj.weight", "D F", "moe", ("expert",)),
    Fp8(_P + "mlp/shared_experts/gate_up_proj", _L + "mlp.shared_experts.gate_proj.weight",
        "SF D", "moe", (0,), when=_shared),
    Fp8(_P + "mlp/shared_experts/gate_up_proj", _L + "mlp.shared_experts.up_proj.weight",
        "SF D", "moe", (1,), when=_shared),
    Fp8(_P + "mlp/shared_experts/down_proj", _L + "mlp.shared_experts.down_proj.weight",
        "D SF", "moe", when=_shared),

    Row(_MTP + "enorm", _L + "enorm.weight", "D", "mtp"),
    Row(_MTP + "hnorm", _L + "hnorm.weight", "D", "mtp"),
    Row(_MTP + "eh_proj", _L + "eh_proj.weight", "D 2D", "mtp"),
    Row(_MTP + "norm", _L + "shared_head.norm.weight", "D", "mtp"),
    Row("params/embed_tokens", _L + "embed_tokens.weight", "V D", "mtp", copy=True),
    Row("params/lm_head", _L + "shared_head.head.weight", "V D", "mtp", copy=True),
)
# fmt: on

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
    rows = [row for row in NAME_MAP if row.when(config)]
    layers = (
        (("model",), 1),
        (("layer", "dense"), config.num_dense_layers),
        (("layer", "moe"), config.num_moe_layers),
        (("layer", "moe", "mtp"), config.num_nextn_predict_layers),
    )
    return sum(
        count * (config.n_routed_experts if "expert" in row.index else 1)
        for wheres, count in layers
        for row in rows
        if row.where in wheres
    )


def places(config: ModelConfig) -> dict[str, Place]:
    """Every tensor a published checkpoint of this architecture holds, by its name, layer by layer.

    FP8 scales are not listed: `scale_name` makes a scale's name out of its weight's.
    """
    found: dict[str, Place] = {}
    sizes = _sizes(config)
    rows = [(row, *_shapes(row.dims, sizes)) for row in NAME_MAP if row.when(config)]
    for layer in [_Layer(0, "", (), 0, ("model",)), *_layers(config)]:
        for row, shape, dims in rows:
            if row.where not in layer.wheres:
                continue
            ours = row.ours.format(block=layer.block, depth=layer.depth)
            path = tuple(ours.split("/"))
            lead = layer.lead if "{block}" in row.ours else ()
            for expert in range(config.n_routed_experts if "expert" in row.index else 1):
                index = lead + tuple(expert if i == "expert" else int(i) for i in row.index)
                name = row.theirs.format(layer=layer.number, expert=expert)
                found[name] = Place(path, index, shape, dims, row.fp8, row.copy)
    return found


def leaves(config: ModelConfig) -> dict[Path, Leaf]:
    """Every leaf of our variables, by its path."""
    found: dict[Path, Leaf] = {}
    for place in places(config).values():
        lead = tuple(i + 1 for i in place.index)
        if place.path in found:  # the last matrix of a leaf has the largest index in every dim
            lead = tuple(map(max, lead, found[place.path].lead))
        found[place.path] = Leaf(lead, place.shape, place.dims)
    return found


def scale_name(name: str) -> str:
    """The published name of an FP8 weight's scales: multipliers, despite the name."""
    return name + "_scale_inv"


def scale_shape(shape: tuple[int, ...], block: int = 128) -> tuple[int, ...]:
    """Shape of the scales of a published matrix; the last block of a dim may be partial."""
    return tuple(-(-size // block) for size in shape)


def _layers(config: ModelConfig) -> list[_Layer]:
    dense, main = config.num_dense_layers, config.num_hidden_layers
    layers = [_Layer(i, "dense_layers", (i,), 0, ("layer", "dense")) for i in range(dense)]
    layers += [
        _Layer(i, "moe_layers", (i - dense,), 0, ("layer", "moe")) for i in range(dense, main)
    ]
    return layers + [
        _Layer(main + depth, f"mtp_{depth}/block", (), depth, ("layer", "moe", "mtp"))
        for depth in range(config.num_nextn_predict_layers)
    ]


def _sizes(config: ModelConfig) -> dict[str, int]:
    """The letters of `Row.dims`: those of dsv3_jax, and sums of them."""
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "2D": 2 * config.hidden_size,
        "N": config.num_attention_heads,
        "HR": nope + rope,
        "HU": nope + value,
        "U": value,
        "Q": config.q_lora_rank or 0,
        "C": config.kv_lora_rank,
        "CR": config.kv_lora_rank + rope,
        "I": config.intermediate_size,  # of a dense layer
        "E": config.n_routed_experts,
        "F": config.moe_intermediate_size,
        "SF": config.n_shared_experts * config.moe_intermediate_size,
    }


def _shapes(dims: str, sizes: dict[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(published shape, our dims) of "(N HR) Q" and the like."""
    groups = [
        [sizes[d] for d in group.strip("()").split()]
        for group in re.findall(r"[^()\s]+|\([^)]*\)", dims)
    ]
    return tuple(map(math.prod, groups)), tuple(size for group in groups for size in group)
