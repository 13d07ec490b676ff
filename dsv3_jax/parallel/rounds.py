"""Dropless with bounded buffers: what does not fit into one round goes into further ones.

A round handles one window of rows at every level: each hop's buffers, and the experts' rows. While
any device has rows left at some level, the next window of the deepest such level is handled, the
way an odometer counts; each (token, choice) belongs to exactly one combination. Further rounds are
a while loop whose trip count all devices agree on, in the forward and in the backward pass; their
residuals are computed again. A step in which everything fits runs no iteration and pays nothing
for it but the agreement: one reduction of a few integers. `in_one_loop` has the first round in that
loop as well.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from dsv3_jax.parallel.collectives import no_gradients, vary

# (operands, constants, window, before) to (y, whether rows are left at each level). It may call
# before(left, rest) as soon as it knows what is left, and then reads what that returns for `rest`.
# None: no others follow from this round. One that has an order for its backward pass as well has a
# method with_pullback, of the same arguments, to (y, pullback as of jax.vjp, what is left). Whose
# first round computes something besides has the piece of the others as `further`, and gives `Once`.
Before = Callable[[Any, Any], Any]
Piece = Callable[
    [Any, Any, Int[Array, " levels"], Before | None], tuple[Any, Bool[Array, " levels"]]
]


class Once(NamedTuple):
    """What a round gives, which is summed over the rounds, and what the first alone gives."""

    y: Any
    once: Any


def in_rounds(
    piece: Piece, axes: Sequence[str], levels: int, operands: Any, constants: Any
) -> tuple[Any, Int[Array, ""]]:
    """The sum of `piece` over all windows, and how many rounds that took.

    `piece` is static (hashable, without arrays in it), and all devices along `axes` run it alike.
    Its y, an array or a tree of them, is like the first of the `operands`, in which it is
    differentiated, and which must vary over the axes; the `constants` are integers, and so is what
    `before` is given.
    """
    return _in_rounds(piece, tuple(axes), levels, operands, constants)


def in_one_loop(
    piece: Piece, axes: Sequence[str], levels: int, operands: Any, constants: Any
) -> tuple[Any, Int[Array, ""]]:
    """`in_rounds` with the first round in the loop, too: one body, and a program half as large.

    No work can lie beside the first round then, and the backward pass computes it again.
    """
    return _in_one_loop(piece, tuple(axes), levels, operands, constants)


def fits_or_nan(
    piece: Piece, axes: Sequence[str], levels: int, operands: Any, constants: Any
) -> tuple[Any, Int[Array, ""]]:
    """The first round; NaN throughout, and two rounds said to be needed, when it is not enough."""
    y, left = piece(operands, constants, jnp.zeros(levels, jnp.int32), None)
    overflow = _agree(left, axes).any()
    y = jax.tree.map(lambda y: jnp.where(overflow, jnp.nan, y), y)
    return y, 1 + overflow.astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_rounds(piece, axes, levels, operands, constants):
    # Without a gradient nothing is linearised: a kernel need not be differentiable then.
    further = _Further(piece, axes, operands, constants)
    y, left = piece(operands, constants, jnp.zeros(levels, jnp.int32), further.before)
    return further.added_to(y, left)


def _forward(piece, axes, levels, operands, constants):
    first, further = jnp.zeros(levels, jnp.int32), _Further(piece, axes, operands, constants)
    y, pull_back, left = _with_pullback(piece, operands, constants, first, further.before)
    out = further.added_to(y, left)
    return out, (pull_back, further.left, operands, constants)


def _with_pullback(piece: Any, operands, constants, window, before: Before | None):
    """(y, pullback, what is left) of a round."""
    if hasattr(piece, "with_pullback"):
        return piece.with_pullback(operands, constants, window, before)
    return jax.vjp(
        lambda operands: piece(operands, constants, window, before), operands, has_aux=True
    )


class _Further:
    """All rounds after the first, in a loop that runs when the first one has made its plan.

    A host that waits to learn whether there are any (XLA's, on a GPU) then does so before it has
    launched the first round's products, and is ahead of the device again while these run.
    """

    def __init__(self, piece: Piece, axes: Sequence[str], operands: Any, constants: Any):
        self._of_loop = piece, axes, operands, constants
        self._sum: Any = None
        self._rounds: Any = None
        self.left: Any = None

    def before(self, left: Any, rest: Any) -> Any:
        """Runs the loop; `rest`, which is not there before it has ended."""
        self._run(left, jax.tree.map(jnp.zeros_like, _first(self._of_loop[2])))
        rest, self._sum = lax.optimization_barrier((rest, self._sum))
        return rest

    def added_to(self, y: Any, left: Any) -> tuple[Any, Array]:
        """(y with all rounds after the first, how many rounds there were)."""
        if isinstance(y, Once):
            total, rounds = self.added_to(y.y, left)
            return Once(total, y.once), rounds
        if self._sum is not None:
            return jax.tree.map(jnp.add, y, self._sum), self._rounds
        return self._run(left, y)

    def _run(self, left, start) -> tuple[Any, Array]:
        piece, axes, operands, constants = self._of_loop
        self.left = _agree(left, axes)

        def one_round(window):
            more, left = _piece_of_others(piece)(operands, constants, window, None)
            return (more, 1), left

        window, total = jnp.zeros_like(left, jnp.int32), (start, jnp.ones((), jnp.int32))
        self._sum, self._rounds = _loop(one_round, axes, window, self.left, total)
        return self._sum, self._rounds


def _piece_of_others(piece: Any) -> Any:
    """What computes the rounds after the first."""
    return getattr(piece, "further", piece)


def _first(operands: Any) -> Any:
    return operands[0] if isinstance(operands, tuple) else operands


def _backward(piece, axes, levels, residuals, cotangents):
    pull_back, left, operands, constants = residuals
    d_y, _ = cotangents
    of_others = d_y.y if isinstance(d_y, Once) else d_y
    one_round = _pulled_back(piece, operands, constants, of_others)
    first = jnp.zeros(levels, jnp.int32)
    gradients = _loop(one_round, axes, first, left, pull_back(d_y)[0])
    return gradients, no_gradients(constants)


_in_rounds.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_one_loop(piece, axes, levels, operands, constants):
    def one_round(window):
        more, left = piece(operands, constants, window, None)
        return (more, 1), left

    total = _zeros_varying_as(_first(operands)), jnp.zeros((), jnp.int32)
    return _loop(one_round, axes, *_before_the_first(levels), total)


def _loop_forward(piece, axes, levels, operands, constants):
    return _in_one_loop(piece, axes, levels, operands, constants), (operands, constants)


def _loop_backward(piece, axes, levels, residuals, cotangents):
    operands, constants = residuals
    d_y, _ = cotangents
    one_round = _pulled_back(piece, operands, constants, d_y)
    zeros = _zeros_varying_as(operands)
    gradients = _loop(one_round, axes, *_before_the_first(levels), zeros)
    return gradients, no_gradients(constants)


_in_one_loop.defvjp(_loop_forward, _loop_backward)


def _loop(one_round: Callable[[Any], Any], axes: Sequence[str], window: Any, left: Any, total: Any):
    """total and what one_round(window), (more, left), adds in the rounds after that of `window`."""

    def body(carry):
        window, left, total = carry
        window = _next(window, left)
        more, left = one_round(window)
        return window, _agree(left, axes), jax.tree.map(jnp.add, total, more)

    return lax.while_loop(lambda carry: carry[1].any(), body, (window, left, total))[2]


def _before_the_first(levels: int) -> tuple[Int[Array, " levels"], Bool[Array, " levels"]]:
    """A window, and what is left, after which `_next` is the first window."""
    return jnp.asarray([0] * (levels - 1) + [-1], jnp.int32), jnp.ones(levels, bool)


def _pulled_back(piece: Piece, operands: Any, constants: Any, d_y: Any) -> Callable[[Any], Any]:
    """window to (the operands' gradients of its round, computed again, and what is left)."""

    def one_round(window):
        _, pull_back, left = _with_pullback(
            _piece_of_others(piece), operands, constants, window, None
        )
        return pull_back(d_y)[0], left

    return one_round


def _zeros_varying_as(like: Any) -> Any:
    def zeros(leaf):
        return vary(jnp.zeros_like(leaf), tuple(jax.typeof(leaf).manual_axis_type.varying))

    return jax.tree.map(zeros, like)


def _agree(left: Bool[Array, " levels"], axes: Sequence[str]) -> Bool[Array, " levels"]:
    """True where any device has rows left. Devices that know of each other need not be asked."""
    asked = tuple(a for a in axes if a in jax.typeof(left).manual_axis_type.varying)
    return lax.pmax(left.astype(jnp.int32), asked) > 0 if asked else left


def _next(window: Int[Array, " levels"], left: Bool[Array, " levels"]) -> Int[Array, " levels"]:
    """The window after this one: one further at the deepest level with rows left, from its start
    at those below."""
    level = jnp.arange(window.shape[0])
    deepest = jnp.max(jnp.where(left, level, -1))
    return jnp.where(level < deepest, window, jnp.where(level == deepest, window + 1, 0))
