"""The experts' feed-forwards over the rows that arrive, and how rows come and go around them.

All inside shard_map (or on one device): arrays are a device's own. `parallel/expert.py` moves rows,
`model/linear.py` multiplies them; here is the order of the two, for a batch and for two halves of
one in opposite phases.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.model.linear import group_alignment, grouped_feed_forward
from dsv3_jax.model.projection import Projection, as_projection
from dsv3_jax.model.quantized_inputs import gather_for
from dsv3_jax.model.router import Routing
from dsv3_jax.parallel.expert import Exchange, combine, dispatch, may_overflow
from dsv3_jax.parallel.phases import tied
from dsv3_jax.parallel.rounds import Before, fits_or_nan, in_one_loop, in_rounds
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
) -> tuple[Any, Int[Array, ""]]:
    """`expert_ffn` where a device holds some experts, and the rounds that it took.

    Inside shard_map, with arrays that vary over exchange.token_axes. Choices NOBODY count nothing.
    Of a pair of x and of routings, halves of a batch, the rows of one travel while the other's are
    computed; what is returned is a pair, too.
    """
    if isinstance(routing, Routing):
        weights, experts = routing.weights_TK, routing.experts_TK
        piece: Any = partial(_expert_round, recipe=recipe, exchange=exchange)
    else:
        weights = tuple(of_half.weights_TK for of_half in routing)
        experts = tuple(of_half.experts_TK for of_half in routing)
        piece = partial(_pair_round, recipe=recipe, exchange=exchange)
    operands = (x_TD, weights, gate_up_E2FD, down_EDF)
    per_token = (routing if isinstance(routing, Routing) else routing[0]).experts_TK.shape[1]
    if not may_overflow(exchange, per_token):
        return piece(operands, experts, None)[0], jnp.ones((), jnp.int32)
    run = {"rounds": in_rounds, "loop": in_one_loop, "error": fits_or_nan}[exchange.overflow]
    return run(piece, exchange.token_axes, exchange.levels, operands, experts)


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
    arrive, multiply = _acts(of_experts, experts_TK.size, recipe, exchange)
    rows_MD, group_sizes, handle = arrive(
        x_TD, weights_TK, experts_TK, window=window, before=before
    )
    out_MD = multiply(rows_MD, group_sizes)
    return combine(out_MD, handle, exchange), handle.left


def _pair_round(
    operands: tuple[Any, ...],
    experts: tuple[Int[Array, "T K"], Int[Array, "T K"]],
    window: Int[Array, " levels"] | None,
    before: Before | None = None,
    *,
    recipe: Recipe,
    exchange: Exchange,
) -> tuple[tuple[Array, Array], Bool[Array, " levels"]]:
    """`_expert_round` of two halves in opposite phases; a window is one of both.

    The first half's rows travel to their experts while whoever calls this makes the second x; the
    second's while the first's experts multiply, the first's back while the second's do. The
    second's travel back over what follows. `tied` says whose products come first; the backward pass
    has the mirrored order.
    """
    (x, other_x), weights, *of_experts = operands
    arrive, multiply = _acts(of_experts, experts[0].size, recipe, exchange)
    rows, sizes, handle = arrive(x, weights[0], experts[0], window=window)
    (rows, sizes), other_x = tied((rows, sizes), other_x)
    out = multiply(rows, sizes)
    # Else XLA packs both halves' rows in one kernel, and sends none before all are there.
    other_experts, _ = tied(experts[1], sizes)
    other_rows, other_sizes, other = arrive(other_x, weights[1], other_experts, window=window)
    (other_rows, other_sizes), out = tied((other_rows, other_sizes), out)
    # Further rounds, which are rare, would otherwise come before the first half's products.
    left, out = tied(handle.left | other.left, out)
    if before is not None:
        other_sizes = before(left, other_sizes)
    other_out = multiply(other_rows, other_sizes)
    return (combine(out, handle, exchange), combine(other_out, other, exchange)), left


def _acts(of_experts: Any, entries: int, recipe: Recipe, exchange: Exchange) -> tuple[Any, Any]:
    """`dispatch` and `grouped_feed_forward`, told what weights, recipe and exchange say."""
    gate_up_E2FD, down_EDF = of_experts
    gate_up, down = recipe.experts_gate_up_proj, recipe.experts_down_proj
    entries = entries if exchange.entries is None else exchange.entries
    alignment = group_alignment(entries, exchange.experts, gate_up, down)
    arrives = gate_up if as_projection(gate_up_E2FD).takes_quantized_rows else None
    gather = partial(gather_for, recipe=arrives)

    def multiply(rows_MD, group_sizes):
        return grouped_feed_forward(
            rows_MD, gate_up_E2FD, down_EDF, group_sizes, alignment, (gate_up, down)
        )

    return partial(dispatch, exchange=exchange, alignment=alignment, gather=gather), multiply
