"""Where the dims of every array lie on the mesh: logical names, a rules table, and `Layout`.

Code names the dims of an array ("batch", "heads", None for a dim that no axis splits); the table of
a preset says which mesh axes each name is spread over. A `Layout` is the mesh with its table, and
hashable, so that it may be a static argument or a module's field; None is a single device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = tuple[str, ...]


class Rules(NamedTuple):
    """The mesh axes that each logical dim is spread over, slowest first; () for none."""

    batch: Axes = ("data", "node", "local")
    seq: Axes = ("context",)  # tokens of a sequence
    residual: Axes = ("context", "tensor")  # the same tokens, between the blocks
    cache: Axes = ("context",)  # rows of the latent cache
    heads: Axes = ("tensor",)
    mlp: Axes = ("tensor",)  # hidden dim of a dense or shared feed-forward
    vocab: Axes = ("tensor",)
    expert: Axes = ("node", "local")


# When decoding, the few new tokens of a sequence are on every device that has the sequence.
RULES = {
    "train": Rules(),
    "prefill": Rules(residual=("context",)),
    "decode": Rules(seq=(), residual=()),
}


@dataclass(frozen=True)
class Layout:
    """How one program is spread over the devices of a mesh."""

    mesh: Mesh
    rules: Rules = RULES["train"]
    expert: Any = None

    def axes(self, name: str) -> Axes:
        """The mesh axes of a logical dim; ValueError for a name that the table does not have."""
        if name not in Rules._fields:
            raise ValueError(f"unknown dim {name!r}: the rules name {', '.join(Rules._fields)}")
        return getattr(self.rules, name)

    def size(self, name: str) -> int:
        """How many shards a logical dim is cut into."""
        return prod(self.mesh.shape[axis] for axis in self.axes(name))

    def spec(self, *dims: str | None) -> PartitionSpec:
        """The PartitionSpec of an array with these dims; ValueError when two share an axis."""
        axes = [() if dim is None else self.axes(dim) for dim in dims]
        used = [axis for of_dim in axes for axis in of_dim]
        if len(set(used)) < len(used):
            raise ValueError(f"dims {dims} use one mesh axis twice: {axes}")
        return PartitionSpec(*(of_dim or None for of_dim in axes))

    def sharding(self, *dims: str | None) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(*dims))

    def constrain(self, x: jax.Array, *dims: str | None) -> jax.Array:
        """x, laid out as its dims say (trailing None may be left out), when inside jit."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*dims))

    def shard_map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`function` on each device's shards, every mesh axis manual and replication checked.

        Specs are those of `spec`. Inside, shapes are local, collectives take axis names, and a
        kernel sees one device's arrays.
        """
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True
        )


def constrain(x: jax.Array, layout: Layout | None, *dims: str | None) -> jax.Array:
    """`Layout.constrain`, or x itself on a single device."""
    return x if layout is None else layout.constrain(x, *dims)
