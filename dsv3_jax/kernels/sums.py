"""Where the gradient of a weight is added up: a mutable array that kernels write to.

One idea: a scan that returns its layers' gradients fills a stack with zeros, writes each gradient,
and copies it into the stack; a sum over micro-batches reads and writes all of it once more. Here
the product that makes a gradient leaves it in its place itself.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["total", "number", "squares"],
    meta_fields=["adds"],
)
@dataclass(frozen=True)
class GradientSum:
    """The place of one layer's gradient.

    Fields:
        total: a Ref of float32 [L, E, N, K]: layers, experts or 1, and the matrix. Several stacks
            whose matrices have one shape may lie in it, so that one kernel writes to all.
        number: int32 [], which of the layers; of a stack, its first one, which is known at once.
        adds: whether a gradient is added to what is there, or takes its place. Then `total` may
            begin with anything, and each layer's weight may be multiplied by only once.
        squares: a Ref of float32 [L], where the sum of squares of each layer's gradient is left;
            None: nowhere. Only where gradients are not added to what is there.
    """

    total: Any
    number: Any
    adds: bool
    squares: Any = None

    @property
    def matrix(self) -> tuple[int, ...]:
        """(N, K)."""
        return self.total.shape[2:]

    def put(self, gradient: Float[Array, "..."]) -> None:
        """Leaves a layer's gradient, [E, N, K] in any shape, in its place."""
        gradient = gradient.reshape(self.total.shape[1:]).astype(jnp.float32)
        if self.adds:
            gradient += self.total[self.number]
        self.total[self.number] = gradient
        if self.squares is not None:
            self.put_squares(jnp.sum(jnp.square(gradient)))

    def put_squares(self, of_layer: Float[Array, ""]) -> None:
        """Leaves the sum of squares of a layer's gradient in its place."""
        self.squares[self.number] = of_layer

    def of_layer(self, number: Any) -> "GradientSum":
        """The place in one layer of the stack that this is of, whose number may be traced."""
        return replace(self, number=jnp.asarray(self.number + number, jnp.int32))


def new_sum(shape: tuple[int, ...], adds: bool, squares: bool = False) -> GradientSum:
    """A sum of [L, E, N, K], at its first layer; zeros, or nothing yet where a gradient takes the
    place of what is there. With a place for sums of squares, if asked for.

    It belongs to the program that is being traced: `total` is read by `jax.freeze`.
    """
    start = jnp.zeros(shape, jnp.float32) if adds else jax.lax.empty(shape, jnp.float32)
    of_squares = jax.new_ref(jax.lax.empty(shape[:1], jnp.float32)) if squares else None
    return GradientSum(jax.new_ref(start), np.int32(0), adds, of_squares)
