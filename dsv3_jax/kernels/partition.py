"""How XLA may cut an opaque kernel over a mesh: by the dims of its arrays, told once an operation.

To XLA a kernel is a box. In a program that is cut over devices by XLA itself it would gather every
operand whole, on every device. A `Cut` names the dims of each array instead; where two arrays share
a name they are cut alike, each device runs the kernel on its pieces, and a contracted dim's partial
sums are added up. Inside a `shard_map`, and on one device, nothing here acts.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

Dims = tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """The dims of an operation's arrays, leaf by leaf, such as ("m", "k/128") for scales.

    `whole[dim]` numbers must stay together on a device; a dim that it does not name is never cut.
    A dim of operands that no result has is contracted: its partial results are added up.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    whole: Mapping[str, int]

    @property
    def rule(self) -> str:
        """The same as XLA's partitioner reads it; numbers and their scales are two factors."""
        sides = (self.operands, self.results)
        return " -> ".join(", ".join(" ".join(map(_factor, d)) for d in side) for side in sides)

    def axes(self, shapes: Sequence[tuple[int, ...]], specs: Sequence[Any], mesh: Any):
        """The mesh axes of each dim: those that an array lies on, where its pieces are whole."""
        chosen: dict[str, tuple[str, ...]] = {}
        used: set[str] = set()
        for dims, shape, spec in zip((*self.operands, *self.results), shapes, specs, strict=True):
            for dim, size, entry in zip(dims, shape, spec):
                axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
                if not axes or dim not in self.whole or dim in chosen or used & set(axes):
                    continue
                pieces = 1
                for axis in axes:
                    pieces *= mesh.shape[axis]
                if size % (pieces * self.whole[dim]) == 0:
                    chosen[dim] = axes
                    used |= set(axes)
        return chosen


def cut_by(cut: Cut, function: Callable[..., Any], *operands: Any) -> Any:
    """function(*operands), which XLA may cut over a mesh as `cut` says.

    Operands and results are pytrees whose leaves are those that the cut names, in order.
    """
    if getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ()):
        return function(*operands)  # inside a shard_map: these are one device's arrays

    def on_whole(*operands):  # custom_partitioning asks for a plain signature
        return function(*operands)

    call = custom_partitioning(on_whole)
    call.def_partition(
        partition=functools.partial(_partition, cut, function),
        infer_sharding_from_operands=functools.partial(_infer, cut),
        sharding_rule=cut.rule,
    )
    # It knows no vmap; the layers that are initialised together are few.
    return jax.custom_batching.sequential_vmap(call)(*operands)


def _partition(cut: Cut, function: Callable[..., Any], mesh: Any, operands: Any, results: Any):
    leaves, in_tree = jax.tree.flatten(operands)
    out_leaves, out_tree = jax.tree.flatten(results)
    arrays = [*leaves, *out_leaves]
    axes = cut.axes([x.shape for x in arrays], [_spec(x) for x in arrays], mesh)
    kept = {dim for dims in cut.results for dim in dims}
    contracted = tuple(axis for dim, of_dim in axes.items() if dim not in kept for axis in of_dim)

    def on_pieces(*pieces):
        out = function(*pieces)
        return jax.tree.map(lambda x: _total(x, contracted), out) if contracted else out

    def shardings(all_dims):
        return [NamedSharding(mesh, _spec_of(dims, axes)) for dims in all_dims]

    return (
        mesh,
        on_pieces,
        jax.tree.unflatten(out_tree, shardings(cut.results)),
        jax.tree.unflatten(in_tree, shardings(cut.operands)),
    )


def _infer(cut: Cut, mesh: Any, operands: Any, results: Any):
    """For XLA's older partitioner, which asks for the results' shardings by the operands'."""
    leaves = jax.tree.leaves(operands)
    cut_operands = Cut(cut.operands, (), cut.whole)
    axes = cut_operands.axes([x.shape for x in leaves], [_spec(x) for x in leaves], mesh)
    shardings = [NamedSharding(mesh, _spec_of(dims, axes)) for dims in cut.results]
    return jax.tree.unflatten(jax.tree.structure(results), shardings)


def _spec(array: Any) -> Any:
    spec = getattr(array.sharding, "spec", None)
    return (*(spec or ()), *[None] * len(array.shape))[: len(array.shape)]


def _spec_of(dims: Dims, axes: Mapping[str, tuple[str, ...]]) -> PartitionSpec:
    # Scales are cut as their numbers are: pieces are whole tiles.
    return PartitionSpec(*(axes.get(dim.split("/")[0]) for dim in dims))


def _total(x: Any, axes: tuple[str, ...]) -> Any:
    # f32: adding bfloat16 pieces would round once more a device.
    return lax.psum(x.astype(jnp.float32), axes).astype(x.dtype)


def _factor(dim: str) -> str:
    return dim.replace("/", "_per_")
