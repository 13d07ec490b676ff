"""Which logical dims every variable has, and so where it lies on a mesh.

Names are those of docs/architecture.md; leaves are recognised by the end of their path, so that
an optimizer's moments, whose trees repeat the parameters', are placed as the parameters are.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding

from dsv3_jax.model.held import cut_dims, matrix_dims, parameter_ndim
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.quantization.block_scaled import BlockScaled

# Everything that is not here is whole on every device: norms, the router's gate and bias, and the
# down-projections to the two latents.
DIMS: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("embed_tokens",): ("vocab", None),
    ("lm_head",): ("vocab", None),
    ("q_proj",): ("heads", None, None),
    ("q_b_proj",): ("heads", None, None),
    ("kv_b_proj",): ("heads", None, None),
    ("o_proj",): (None, "heads", None),
    ("mlp", "gate_up_proj"): (None, "mlp", None),
    ("mlp", "down_proj"): (None, "mlp"),
    ("shared_experts", "gate_up_proj"): (None, "mlp", None),
    ("shared_experts", "down_proj"): (None, "mlp"),
    ("experts", "gate_up_proj"): ("expert", None, None, None),
    ("experts", "down_proj"): ("expert", None, None),
}

# Layers of these are stacked on a leading dim; an MTP module is one layer.
STACKED = ("dense_layers", "moe_layers")


def dims_of(path: tuple[Any, ...], ndim: int) -> tuple[str | None, ...]:
    """The logical dims of the leaf at a path of `jax.tree_util`, one for each of its ndim dims."""
    names = tuple(str(entry.key) for entry in path if hasattr(entry, "key"))
    for last in (2, 1):
        if (dims := DIMS.get(names[-last:])) is not None:
            return (None,) * (ndim - len(dims)) + dims
    return (None,) * ndim


def shardings(tree: Any, layout: Layout, *, stored: bool = False) -> Any:
    """The NamedSharding of every leaf of a tree of variables, or of a state made of such trees.

    stored: as held between steps, cut further over the devices that would hold copies. Weights in
    FP8 and their scales are cut alike, between tiles.
    """

    def place(path, leaf) -> Any:
        if isinstance(leaf, BlockScaled):
            name = _name(path) or ""
            dims = matrix_dims(name, dims_of(path, parameter_ndim(name, leaf)))
            where = layout.sharding(*cut_dims(leaf, dims, layout))
            return BlockScaled(where, where, leaf.tile)
        spec = layout.spec(*dims_of(path, leaf.ndim))
        if stored and _name(path) != "e_score_correction_bias":  # moved on every device alike
            spec = layout.stored_spec(spec, leaf.shape, skip_dims=_stacked_dims(path))
        return NamedSharding(layout.mesh, spec)

    return jax.tree_util.tree_map_with_path(
        place, tree, is_leaf=lambda node: isinstance(node, BlockScaled)
    )


def gathered(tree: Any, layout: Layout) -> Any:
    """Variables as computing needs them, from variables as stored; their gradients go back so.

    The tree may be one layer's slice of a stacked tree: the layer dim is never cut.
    """
    return jax.tree.map(
        layout.gather, tree, shardings(tree, layout), shardings(tree, layout, stored=True)
    )


def _name(path: tuple[Any, ...]) -> str | None:
    return getattr(path[-1], "key", None)


def _stacked_dims(path: tuple[Any, ...]) -> int:
    return int(any(getattr(entry, "key", None) in STACKED for entry in path))
