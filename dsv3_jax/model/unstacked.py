"""Layers one by one, for decoding on a CPU: each has arrays of its own, in place of one stack.

The one idea: XLA:CPU copies what it takes out of a stack before it multiplies by it, and writes a
stack of caches anew to put a row in. Where steps are short, that is a fifth of each.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

DENSE, MOE = "dense_layers", "moe_layers"

# So many layers of a kind, and no more, are compiled one by one.
WITHOUT_LOOP = 4
# What is cut from the stacks is held beside them, if others hold these: as many bytes at most.
MOST_BYTES = 64 * 2**20


class Unstacked(NamedTuple):
    """The variables, or the caches, of layers of one kind, in order."""

    each: tuple[Any, ...]


def is_unstacked(node: Any) -> bool:
    """Whether these are layers one by one."""
    return isinstance(node, Unstacked)


def has_unstacked(params: dict[str, Any]) -> bool:
    """Whether the layers of these parameters are one by one."""
    return any(map(is_unstacked, params.values()))


def num_layers(layers: Any) -> int:
    """How many layers there are in a tree of stacks, or of Unstacked."""
    first = jax.tree.leaves(layers, is_leaf=is_unstacked)[0]
    return len(first.each) if is_unstacked(first) else first.shape[0]


def layer_at(place: int, layers: Any) -> Any:
    """One layer of such a tree."""

    def at(node):
        if is_unstacked(node):
            return node.each[place]
        return jax.lax.index_in_dim(node, place, keepdims=False)

    return jax.tree.map(at, layers, is_leaf=is_unstacked)


def unstack(layers: Any) -> Unstacked:
    """A tree of stacks as Unstacked."""
    return Unstacked(tuple(layer_at(place, layers) for place in range(num_layers(layers))))


@jax.jit
def unstack_variables(variables: dict[str, Any]) -> dict[str, Any]:
    """The variables with their layers Unstacked in every collection; as they are where these are
    many, or large, or held as bytes, which products cut from their stacks themselves."""
    kinds = (DENSE, MOE)
    leaves = jax.tree.leaves([[tree.get(kind) for kind in kinds] for tree in variables.values()])
    most = max((leaf.shape[0] for leaf in leaves), default=0)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    as_bytes = any(leaf.dtype == jnp.uint8 for leaf in leaves)
    if most > WITHOUT_LOOP or size > MOST_BYTES or as_bytes:
        return variables
    return {
        name: {kind: unstack(part) if kind in kinds else part for kind, part in tree.items()}
        for name, tree in variables.items()
    }
