"""Dropless with bounded buffers: what does not fit into one round goes into further ones.

A round handles one window of rows at every level: each hop's buffers, and the experts' rows. While
any device has rows left at some level, the next window of the deepest such level is handled, the
way an odometer counts; each (token, choice) belongs to exactly one combination. Further rounds are
a while loop whose trip count all devices agree on, in the forward and in the backward pass; their
residuals are computed again. A step in which everything fits runs no iteration and pays nothing
for it but the agreement: one reduction of a few integers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# (operands, constants, window) to (y, whether rows are left at each level)
Piece = Callable[[Any, Any, Int[Array, " levels"]], tuple[Array, Bool[Array, " levels"]]]


def in_rounds(
    piece: Piece, axes: Sequence[str], levels: int, operands: Any, constants: Any
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """The sum of `piece` over all windows, and how many rounds that took.

    `piece` is static (hashable, without arrays in it), and all devices along `axes` run it alike.
    Its y is differentiated in the `operands`, which must vary over the axes; the `constants` are
    integers.
    """
    return _in_rounds(piece, tuple(axes), levels, operands, constants)


def fits_or_nan(
    piece: Piece, axes: Sequence[str], levels: int, operands: Any, constants: Any
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """The first round; NaN throughout, and two rounds said to be needed, when it is not enough."""
    y, left = piece(operands, constants, jnp.zeros(levels, jnp.int32))
    overflow = _agree(left, axes).any()
    return jnp.where(overflow, jnp.nan, y), 1 + overflow.astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_rounds(piece, axes, levels, operands, constants):
    # Without a gradient nothing is linearised: a kernel need not be differentiable then.
    y, left = piece(operands, constants, jnp.zeros(levels, jnp.int32))
    return _with_further(piece, axes, operands, constants, y, _agree(left, axes))


def _forward(piece, axes, levels, operands, constants):
    first = jnp.zeros(levels, jnp.int32)
    y, pull_back, left = jax.vjp(
        lambda operands: piece(operands, constants, first), operands, has_aux=True
    )
    left = _agree(left, axes)
    out = _with_further(piece, axes, operands, constants, y, left)
    return out, (pull_back, left, operands, constants)


def _with_further(piece, axes, operands, constants, y, left):
    """(y with all windows after the first, how many rounds that took)."""

    def body(carry):
        window, left, y, rounds = carry
        window = _next(window, left)
        more, left = piece(operands, constants, window)
        return window, _agree(left, axes), y + more, rounds + 1

    start = (jnp.zeros_like(left, jnp.int32), left, y, jnp.ones((), jnp.int32))
    _, _, y, rounds = lax.while_loop(lambda carry: carry[1].any(), body, start)
    return y, rounds


def _backward(piece, axes, levels, residuals, cotangents):
    pull_back, left, operands, constants = residuals
    d_y, _ = cotangents

    def body(carry):
        window, left, gradients = carry
        window = _next(window, left)
        _, pull_back, left = jax.vjp(
            lambda operands: piece(operands, constants, window), operands, has_aux=True
        )
        gradients = jax.tree.map(jnp.add, gradients, pull_back(d_y)[0])
        return window, _agree(left, axes), gradients

    start = (jnp.zeros(levels, jnp.int32), left, pull_back(d_y)[0])
    gradients = lax.while_loop(lambda carry: carry[1].any(), body, start)[2]
    none = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), constants)
    return gradients, none


_in_rounds.defvjp(_forward, _backward)


def _agree(left: Bool[Array, " levels"], axes: Sequence[str]) -> Bool[Array, " levels"]:
    """True where any device has rows left."""
    return lax.pmax(left.astype(jnp.int32), tuple(axes)) > 0


def _next(window: Int[Array, " levels"], left: Bool[Array, " levels"]) -> Int[Array, " levels"]:
    """The window after this one: one further at the deepest level with rows left, from its start
    at those below."""
    level = jnp.arange(window.shape[0])
    deepest = jnp.max(jnp.where(left, level, -1))
    return jnp.where(level < deepest, window, jnp.where(level == deepest, window + 1, 0))
