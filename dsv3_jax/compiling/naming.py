"""What the arrays of a compiled program are in the model: weights by their shapes, and passes."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any

import jax

from dsv3_jax.analysis.compiled import Buffer
from dsv3_jax.analysis.hlo import shape
from dsv3_jax.model.placement import STACKED, shardings
from dsv3_jax.parallel.sharding import Layout

_PARTS = {
    "self_attn": "attention",
    "experts": "routed experts",
    "shared_experts": "shared experts",
    "mlp": "feed-forward",
    "MTPModule": "MTP",
    "_take": "embedding",
}


def bytes_held(tree: Any) -> dict[str, int]:
    """Bytes on one device of each leaf of a program's arguments, by its path, largest first."""
    found: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        found[name] = found.get(name, 0) + size
    return dict(sorted(found.items(), key=lambda item: -item[1]))


class WeightNames:
    """Which weight an array of a program may be, by its dims."""

    def __init__(self, params: Any, layout: Layout):
        """Of parameters as shapes with the shardings that they are held in."""
        self._names: dict[tuple[int, ...], list[str]] = defaultdict(list)
        used = shardings(params, layout)
        for (path, leaf), place in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(used), strict=True
        ):
            if len(leaf.shape) < 2:
                continue
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            held = leaf.sharding.shard_shape(leaf.shape)
            gathered = place.shard_shape(leaf.shape)
            stacked = any(getattr(entry, "key", None) in STACKED for entry in path)
            layers = ", all layers" if stacked else ""
            forms = [(gathered, layers), (held, f"{layers}, a device's slice")]
            if stacked:
                forms += [(gathered[1:], ", one layer"), (held[1:], ", a slice of one layer")]
            for dims, of_what in forms:
                for key in {_key(dims), _key((math.prod(dims[:-1]), dims[-1]))}:
                    if len(key) > 1 and name + of_what not in self._names[key]:
                        self._names[key].append(name + of_what)

    def of(self, dims: tuple[int, ...]) -> str | None:
        """The first weight of these dims, in any order; None for any other array."""
        found = self._names.get(_key(dims))
        return (
            None if not found else found[0] + (f" (or {len(found) - 1} like it)" * (len(found) > 1))
        )


def _key(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in dims if size > 1))


def pass_of(source: str) -> str:
    """Which pass a JAX operation belongs to, by its name in the program."""
    if "transpose(" in source:
        again = "rematted_computation" in source or re.search(r"/checkpoint/.*jvp\(\)", source)
        return "computed again" if again else "backward"
    return "forward" if "jvp(" in source else ""


def describe(buffer: Buffer, names: WeightNames) -> str:
    """A buffer in words: the weight it may be, else the part of the model, and the pass."""
    parts = re.split(r"[/()]", buffer.source)
    where = [word for key, word in _PARTS.items() if key in parts]
    if "feed-forward" in where and len(where) > 1:
        where.remove("feed-forward")
    weight = names.of(shape(buffer.type))
    of_part = " of ".join(where) or ("head" if "shard_map" in parts else "")
    operation = parts[-1] if parts and parts[-1] else buffer.op
    what = weight or of_part or "the step"
    if operation == "dynamic_update_slice" and what == "the step" and "jvp(" in buffer.source:
        what = "kept by all layers for the backward pass"
    if weight and of_part:
        what += f", in {of_part}"
    when = pass_of(buffer.source)
    return f"{what}{', ' + when if when else ''} ({operation})"
