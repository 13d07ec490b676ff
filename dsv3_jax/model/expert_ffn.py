"""The experts' feed-forwards over the rows that arrive, and how rows come and go around them.

All inside shard_map (or on one device): arrays are a device's own. `parallel/expert.py` moves rows,
`model/linear.py` multiplies them; here is the order of the two, for a batch and for two halves of
one in opposite phases.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.model.linear import feed_forward, group_alignment, grouped_feed_forward
from dsv3_jax.model.projection import Projection, as_projection
from dsv3_jax.model.quantized_inputs import gather_for
from dsv3_jax.model.router import Routing
from dsv3_jax.parallel.collectives import no_gradients
from dsv3_jax.parallel.exchange import Exchange, may_overflow
from dsv3_jax.parallel.expert import arrange, combine, dispatch, rows_left, send_back
from dsv3_jax.parallel.phases import after, mark_of
from dsv3_jax.parallel.round_trip import (
    Sent,
    gradients_of,
    gradients_there,
    rows_back,
    send_rows,
)
from dsv3_jax.parallel.rounds import Before, Once, fits_or_nan, in_one_loop, in_rounds
from dsv3_jax.quantization.block_scaled import StepWeight
from dsv3_jax.quantization.recipe import BF16, Recipe


def expert_ffn(
    x_TD: Float[Array, "T D"],
    routing: Routing,
    gate_up_E2FD: Float[Array, "E 2 F D"] | Projection | StepWeight,
    down_EDF: Float[Array, "E D F"] | Projection | StepWeight,
    recipe: Recipe = BF16,
) -> Float[Array, "T D"]:
    """The weighted sum of each token's experts: SwiGLU feed-forwards over grouped rows."""
    here = Exchange((), down_EDF.shape[0], None, ())
    operands = (x_TD, routing.weights_TK, gate_up_E2FD, down_EDF)
    return _expert_round(operands, routing.experts_TK, None, recipe=recipe, exchange=here)[0]


def exchanged_expert_ffn(
    x_TD: Float[Array, "T D"] | tuple[Array, ...],
    routing: Routing | tuple[Routing, ...],
    gate_up_E2FD: Float[Array, "E 2 F D"] | Projection | StepWeight,
    down_EDF: Float[Array, "E D F"] | Projection | StepWeight,
    recipe: Recipe,
    exchange: Exchange,
    shared: Any = None,
) -> tuple[Any, Int[Array, ""]]:
    """`expert_ffn` where a device holds some experts, and the rounds that it took.

    Inside shard_map, with arrays that vary over exchange.token_axes. Choices NOBODY count nothing.
    Of a pair of x and of routings, halves of a batch, the rows of one travel while the other's are
    computed; what is returned is a pair, too. shared: of such a pair, what shared experts read, x
    of both halves and two weights that are whole here; their output is added.
    """
    if isinstance(routing, Routing):
        weights, experts = routing.weights_TK, routing.experts_TK
        piece: Any = partial(_expert_round, recipe=recipe, exchange=exchange)
    else:
        weights = tuple(of_half.weights_TK for of_half in routing)
        experts = tuple(of_half.experts_TK for of_half in routing)
        piece = PairRound(recipe, exchange)
    operands: Any = (x_TD, weights, gate_up_E2FD, down_EDF)
    operands += () if isinstance(routing, Routing) else (shared,)
    per_token = (routing if isinstance(routing, Routing) else routing[0]).experts_TK.shape[1]
    if not may_overflow(exchange, per_token):
        only = jnp.zeros(exchange.levels, jnp.int32)
        return _joined(piece(operands, experts, only)[0]), jnp.ones((), jnp.int32)
    run = {"rounds": in_rounds, "loop": in_one_loop, "error": fits_or_nan}[exchange.overflow]
    y, rounds = run(piece, exchange.token_axes, exchange.levels, operands, experts)
    return _joined(y), rounds


def _joined(y: Any) -> Any:
    """The output of routed experts, and of shared ones where the first round computed them."""
    return jax.tree.map(jnp.add, y.y, y.once) if isinstance(y, Once) else y


def _expert_round(
    operands: tuple[Any, ...],
    experts_TK: Int[Array, "T K"],
    window: Int[Array, " levels"] | None,
    before: Before | None = None,
    *,
    recipe: Recipe,
    exchange: Exchange,
) -> tuple[Float[Array, "T D"], Bool[Array, " levels"]]:
    """`expert_ffn` for the entries of one window, and at which levels others are left."""
    x_TD, weights_TK, *of_experts = operands
    alignment, gather, multiply = _acts(of_experts, experts_TK.size, recipe, exchange)
    rows_MD, group_sizes, handle = dispatch(
        x_TD, weights_TK, experts_TK, exchange, alignment, window, gather, before
    )
    if exchange.reading is not None:  # peers read the rows, and add them up
        return combine(multiply(rows_MD, group_sizes), handle, exchange), handle.left
    sums = multiply(rows_MD, group_sizes, summed=(handle.weights, handle.groups))
    return send_back(sums, handle, exchange), handle.left


@dataclass(frozen=True)
class PairRound:
    """`_expert_round` of two halves in opposite phases; a window is one of both.

    The first half's rows travel to their experts while whoever calls this makes the second x; the
    second's while the first's experts multiply, the first's back while the second's do. The
    second's travel back over both shared experts, where these are among the operands. The backward
    pass has the mirrored order. `after` says that nothing is made of what arrived before the
    products that it travels over are done: XLA's scheduler, which goes from the end to the start,
    would take them in any order. Nothing of both halves that is alike may be there at one time:
    XLA makes one kernel of it, and one half's rows then wait for the other's.
    """

    recipe: Recipe
    exchange: Exchange
    first: bool = True  # of the rounds; the others have no part in shared experts

    @property
    def further(self) -> "PairRound":
        """The rounds after the first."""
        return replace(self, first=False)

    def __call__(self, operands, experts, window, before=None):
        """As `rounds.Piece` says."""
        if before is None:
            return _differentiable(self, operands, experts, window)
        return self._there_and_back(operands, experts, window, before, _without_pullback)[:2]

    def with_pullback(self, operands, experts, window, before):
        """As `rounds.Piece` says."""
        y, left, kept = self._there_and_back(operands, experts, window, before, jax.vjp)
        return y, Partial(self._pulled_back, kept), left

    def _there_and_back(self, operands, experts, window, before, run):
        """(outputs of both halves, what is left, what the backward pass needs)."""
        (x, other_x), weights, *of_experts, shared = operands
        exchange, hops = self.exchange, len(self.exchange.hops)
        assert 1 <= hops <= 2 and exchange.reading is None
        over = (None, other_x)[-hops:]
        sent = send_rows(x, weights[0], experts[0], window, exchange, over)
        out, pull_back, marks = self._multiplied(sent, of_experts, experts[0].size, window, run)
        # Else XLA packs both halves' rows in one kernel, and sends none before all are there.
        of_other = (
            after(other_x, sent.rows),
            after(weights[1], sent.rows),
            after(experts[1], sent.rows),
        )
        other = send_rows(*of_other, window, exchange, marks[-hops:])
        left = rows_left(sent, exchange, window) | rows_left(other, exchange, window)
        if before is not None:
            # Further rounds, which are rare, would else come before the first half's products.
            other = other._replace(rows=before(after(left, marks[-1]), other.rows))
        other_out, other_pull, other_marks = self._multiplied(
            other, of_experts, experts[1].size, window, run
        )
        over = other_marks[-hops:]
        (y,) = rows_back((out,), sent.plans, exchange, over)
        beside = _Shared(self.recipe, shared if self.first else None, run)
        over = beside.over(hops)
        (other_y,) = rows_back((after(other_out, y),), other.plans, exchange, over)
        marks = mark_of(other.rows), *other_marks
        pulls = (pull_back, sent.plans), (other_pull, other.plans, marks)
        both = y, other_y
        without = None if beside.pulls else shared
        return beside.with_outputs(both), left, (*pulls, beside.pulls, without)

    def _multiplied(self, sent: Sent, of_experts, entries: int, window, run):
        """(sums of what experts make of rows that arrived, pullback, marks of both products).

        `run` is jax.vjp, or like it without a pullback.
        """

        def multiplied(x, weights, gate_up, down):
            alignment, gather, multiply = _acts((gate_up, down), entries, self.recipe, exchange)
            carried = sent._replace(x=x, weights=weights)
            rows, sizes, handle = arrange(carried, exchange, alignment, window, gather)
            summed = handle.weights, handle.groups
            return multiply(rows, sizes, marked=True, summed=summed)

        exchange = self.exchange
        return run(multiplied, sent.x, sent.weights, *of_experts, has_aux=True)

    def _pulled_back(self, kept, d_both):
        """Gradients of the operands; the other half's come first, those of inputs before weights'.

        A mark of the forward pass is one of what is computed again, or long there.
        """
        (pull_back, plans), (other_pull, other_plans, (arrived, *over)), pulls, without = kept
        (d_y, other_d_y), d_shared = d_both if isinstance(d_both, Once) else (d_both, None)
        exchange, hops = self.exchange, len(self.exchange.hops)
        other_rows = gradients_there(after(other_d_y, arrived), other_plans, exchange, over[-hops:])
        other_d = other_pull(gradients_of(other_rows, other_d_y, exchange))
        over = (other_d[0], other_d[2])[:hops]
        rows = gradients_there(after(d_y, other_rows), plans, exchange, over)
        d = pull_back(gradients_of(rows, d_y, exchange))
        over = (d[0], d[2])[:hops]
        other_d_x, other_d_weights = rows_back(other_d[:2], other_plans, exchange, over)
        over = (d[3], other_d[3])[:hops]
        d_x, d_weights = rows_back(after(d[:2], other_d_x), plans, exchange, over)
        of_experts = jax.tree.map(_added, d[2:], other_d[2:])
        of_shared = _pulled_back_shared(pulls, d_shared, without)
        return (((d_x, other_d_x), (d_weights, other_d_weights), *of_experts, of_shared),)


class _Shared:
    """The shared experts of two halves, one after the other, run by whatever they lie beside."""

    def __init__(self, recipe: Recipe, shared: Any, run: Any):
        self.recipes = recipe.gate_up_proj, recipe.down_proj
        self.operands, self.run = shared, run
        self.outputs: tuple[Any, ...] = ()
        self.pulls: tuple[Any, ...] = ()

    def over(self, hops: int) -> tuple[Any, ...]:
        """Work for `over` of `rows_back`: a half a hop, or both over the only one."""
        if self.operands is None:
            return ()
        return (self._next,) * 2 if hops == 2 else (lambda sent: self._next(self._next(sent)),)

    def _next(self, sent: Any) -> Array:
        def multiply(x, gate_up, down):
            return feed_forward(x, gate_up, down, self.recipes), None

        both, *weights = self.operands
        x = after(both[len(self.outputs)], sent, kept=True)
        y, pull, _ = self.run(multiply, x, *weights, has_aux=True)
        self.outputs, self.pulls = (*self.outputs, y), (*self.pulls, pull)
        return y

    def with_outputs(self, y: Any) -> Any:
        """y, with the outputs here where there are any."""
        return Once(y, self.outputs) if self.outputs else y


def _pulled_back_shared(pulls: Any, d_outputs: Any, without: Any) -> Any:
    """Gradients of the operands of `_Shared`; zeros of those that it was without."""
    if not pulls:
        return jax.vjp(lambda operands: (), without)[1](())[0]
    (d_x, *d), (other_d_x, *other_d) = (pull(d) for pull, d in zip(pulls, d_outputs))
    return ((d_x, other_d_x), *jax.tree.map(_added, d, other_d))


def _without_pullback(function, *arguments, has_aux):
    assert has_aux
    y, aux = function(*arguments)
    return y, None, aux


def _added(gradient, other):
    return gradient if gradient.dtype == jax.dtypes.float0 else gradient + other


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(piece: PairRound, operands, experts, window):
    return piece._there_and_back(operands, experts, window, None, _without_pullback)[:2]


def _forward(piece: PairRound, operands, experts, window):
    y, pull_back, left = piece.with_pullback(operands, experts, window, None)
    return (y, left), (pull_back, experts, window)


def _backward(piece: PairRound, residuals, cotangents):
    del piece
    pull_back, *integers = residuals
    return *pull_back(cotangents[0]), *no_gradients(integers)


_differentiable.defvjp(_forward, _backward)


def _acts(
    of_experts: Any, entries: int, recipe: Recipe, exchange: Exchange
) -> tuple[int, Any, Any]:
    """(alignment of groups, how rows are gathered into them, `grouped_feed_forward` of rows)."""
    gate_up_E2FD, down_EDF = of_experts
    gate_up, down = recipe.experts_gate_up_proj, recipe.experts_down_proj
    entries = entries if exchange.entries is None else exchange.entries
    alignment = group_alignment(entries, exchange.experts, gate_up, down)
    arrives = gate_up if as_projection(gate_up_E2FD).takes_quantized_rows else None

    def multiply(rows_MD, group_sizes, **how):
        operands = rows_MD, gate_up_E2FD, down_EDF, group_sizes
        return grouped_feed_forward(*operands, alignment, (gate_up, down), **how)

    return alignment, partial(gather_for, recipe=arrives), multiply
