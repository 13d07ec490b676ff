"""Which logical dims every variable has, and so where it lies on a mesh.

The table of weights (config/weights.py) says it; leaves are recognised by the end of their path, so
that an optimizer's moments, whose trees repeat the parameters', are placed as the parameters are.
What is no weight is whole on every device.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from dsv3_jax.config.weights import Weight, find_weight
from dsv3_jax.kernels import backend
from dsv3_jax.model.adapters import A, Adapted, B
from dsv3_jax.model.fp8_weights import cut_dims, matrix_dims
from dsv3_jax.model.quantized_slices import as_matrices, matrix_dims_of
from dsv3_jax.model.step_weights import StepWeights, as_they_are, with_made
from dsv3_jax.model.unstacked import unstack_variables
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.quantization.block_scaled import BlockScaled, StepWeight, is_step_weight

# Layers of these are stacked on a leading dim; an MTP module is one layer.
STACKED = ("dense_layers", "moe_layers")


def weight_of(path: tuple[Any, ...]) -> Weight | None:
    """The row of the leaf at a path of `jax.tree_util`; None for what is no weight."""
    return find_weight([str(entry.key) for entry in path if hasattr(entry, "key")])


def shardings(tree: Any, layout: Layout, *, stored: bool = False) -> Any:
    """The NamedSharding of every leaf of a tree of variables, or of a state made of such trees.

    stored: as held between steps, cut further over the devices that would hold copies. Weights in
    FP8 and their scales are cut alike, between tiles. An adapted weight's base lies as the weight
    does, its adapter by experts alone. Raises nothing of its own. Source: this project
    (docs/parallelism.md).

    >>> import jax, dsv3_jax as ds
    >>> mesh = ds.make_mesh(ds.ParallelConfig())
    >>> layout = ds.make_layout(mesh, ds.ShardingConfig(), ds.ExpertParallelConfig())
    >>> tree = ds.abstract_variables(ds.load_config("tiny").model)
    >>> ds.shardings(tree, layout)["params"]["lm_head"].spec == jax.P(None, None)
    True
    """

    def place(path, leaf) -> Any:
        if isinstance(leaf, Adapted):
            parts = {"base": path, "a": (*path, DictKey(A)), "b": (*path, DictKey(B))}
            there = {name: of for name, of in parts.items() if getattr(leaf, name) is not None}
            places = {name: place(of, getattr(leaf, name)) for name, of in there.items()}
            return dataclasses.replace(leaf, **places)
        weight = weight_of(path)
        if isinstance(leaf, BlockScaled):
            assert weight is not None, path
            dims = matrix_dims(weight)
            spec = layout.spec(*cut_dims(leaf, _stacked(dims, leaf.ndim), layout))
            if stored:
                tiles = (*(1 for _ in leaf.shape[:-2]), *leaf.tile)
                whole = tuple(n // t if n % t == 0 else 1 for n, t in zip(leaf.shape, tiles))
                spec = layout.stored_spec(spec, whole, skip_dims=_stacked_dims(path))
            where = NamedSharding(layout.mesh, spec)
            return BlockScaled(where, where, leaf.tile)
        if weight is not None and leaf.ndim < len(weight.dims):
            weight = None  # an optimizer's summary of it, such as Adafactor's of rows
        dims = () if weight is None else weight.dims
        if weight is None and (base := _adapted(path)) is not None:  # an adapter lies by experts
            dims = (*base.dims[: len(base.lead)], None, None)
        spec = layout.spec(*_stacked(dims, leaf.ndim))
        if stored and (weight is None or weight.collection == "params"):
            spec = layout.stored_spec(spec, leaf.shape, skip_dims=_stacked_dims(path))
        return NamedSharding(layout.mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=_is_frozen)


def _is_frozen(node: Any) -> bool:
    return isinstance(node, BlockScaled | Adapted)


def _adapted(path: tuple[Any, ...]) -> Weight | None:
    """The row of the weight that the adapter at a path belongs to; None for what is no adapter."""
    names = [str(entry.key) for entry in path if hasattr(entry, "key")]
    return find_weight(names[:-1]) if names and names[-1] in (A, B) else None


def placed(abstract: Any, layout: Layout, *, stored: bool = False) -> Any:
    """A tree of shapes and dtypes with its `shardings`, where the layout has devices."""
    if not layout.has_devices:
        return abstract
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings(abstract, layout, stored=stored),
    )


def gathered(tree: Any, layout: Layout) -> Any:
    """Variables as computing needs them, from variables as stored; their gradients go back so.

    The tree may be one layer's slice of a stacked tree: the layer dim is never cut.
    """
    return jax.tree.map(
        layout.gather, tree, shardings(tree, layout), shardings(tree, layout, stored=True)
    )


def gathered_for_step(
    weights: StepWeights, layout: Layout, dtype: Any, *, turned: bool = False
) -> StepWeights:
    """The weights with what was made of slices gathered for all of a step; masters stay slices.

    What nothing was made of, such as norms, is gathered as it is. turned: FP8 numbers are also made
    transposed, as Dgrad reads them; else each backward pass turns them.
    """
    held = sliced(with_made(weights.params, weights.made), layout, dtype)

    def made(weight):
        if not is_step_weight(weight):
            return None
        numbers = weight.numbers
        if not (turned and isinstance(numbers, BlockScaled)):
            return numbers, None
        # Turned here, and not again where a loop over micro-batches reads it.
        return numbers, jax.lax.optimization_barrier(numbers.mT)

    masters = jax.tree.map(_master_of, held, is_leaf=is_step_weight)
    return as_they_are(masters)._replace(made=jax.tree.map(made, held, is_leaf=is_step_weight))


def held_for_steps(variables: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The variables as decoding reads them: placed on a mesh, Unstacked on a CPU by itself."""
    if not layout.one_device:
        return jax.device_put(variables, shardings(variables, layout))
    return unstack_variables(variables) if backend.platform() == "cpu" else variables


def _stacked(dims: tuple[str | None, ...], ndim: int) -> tuple[str | None, ...]:
    return (None,) * (ndim - len(dims)) + dims


def _stacked_dims(path: tuple[Any, ...]) -> int:
    return int(any(getattr(entry, "key", None) in STACKED for entry in path))


def sliced(tree: Any, layout: Layout, dtype: Any) -> Any:
    """Variables as a layer's products need them, from variables in slices, those being left so.

    A matrix becomes a StepWeight: what is multiplied, which is gathered, and the slice itself, to
    which the gradient goes back in f32. A StepWeight in slices brings what is to be gathered
    (step_weights.py); else it is a copy in `dtype`. What else there is, `gathered` gives whole, and
    a frozen weight in the numbers that it is held in.
    """

    def make(path, leaf, used, stored):
        if _is_frozen(leaf):
            return jax.tree.map(layout.gather, leaf, used, stored)
        weight, master = weight_of(path), _master_of(leaf)
        made = leaf.numbers if is_step_weight(leaf) else None
        if weight is None or not weight.is_matrix or weight.part == "router":
            return layout.gather(leaf, used, stored)
        if isinstance(made, BlockScaled):
            dims = matrix_dims_of(weight, master.ndim)
            # As bytes: XLA:CPU would gather float8 as float16.
            raw = jax.lax.bitcast_convert_type(made.values, jnp.uint8)
            raw = layout.gather(layout.place(raw, stored.spec), used, stored)
            values = jax.lax.bitcast_convert_type(raw, made.values.dtype)
            by_matrix = NamedSharding(layout.mesh, PartitionSpec(*used.spec[: dims.lead]))
            scales = layout.constrain_tree(made.scales, by_matrix)
            numbers: Any = BlockScaled(as_matrices(values, dims), scales, made.tile)
        else:
            copy = jax.lax.stop_gradient(master).astype(dtype) if made is None else made
            numbers = layout.gather(layout.place(copy, stored.spec), used, stored)
        return StepWeight(layout.place(master, stored.spec), numbers)

    masters = jax.tree.map(_master_of, tree, is_leaf=_is_node)
    return jax.tree_util.tree_map_with_path(
        make,
        tree,
        shardings(masters, layout),
        shardings(masters, layout, stored=True),
        is_leaf=_is_node,
    )


def _master_of(leaf: Any) -> Any:
    return leaf.master if is_step_weight(leaf) else leaf


def _is_node(leaf: Any) -> bool:
    return is_step_weight(leaf) or _is_frozen(leaf)
