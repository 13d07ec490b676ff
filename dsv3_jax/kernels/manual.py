"""Between which devices a kernel's results differ, which it must say inside `jax.shard_map`.

With replication checked, every array in a shard_map is typed with the mesh axes along which devices
hold different values. Pallas calls do not work that out; outside a shard_map nothing here acts.
"""

from typing import Any

import jax

Tree = Any


def _axes(array: Any) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def varies(tree: Tree) -> bool:
    """Whether an array is typed as differing between devices."""
    return any(map(_axes, jax.tree.leaves(tree)))


def vary(tree: Tree, *like: Tree) -> Tree:
    """`tree`, every array marked as differing along the axes along which one of all of them does.

    Its cotangent is then added up over the axes that were marked: the gradient of an operand that
    devices share is the sum of what each of them has for it.
    """
    together = frozenset[str]().union(*map(_axes, jax.tree.leaves((tree, like))))

    def mark(array):
        missing = tuple(sorted(together - _axes(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(mark, tree)


def result(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.ShapeDtypeStruct:
    """The type of a Pallas call's result that differs along the axes along which `like` does.

    `plgpu.kernel` forgets it (jax 0.11): its results must be marked by `vary` once more.
    """
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
