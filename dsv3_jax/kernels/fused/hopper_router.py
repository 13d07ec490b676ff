"""The router's choice on Hopper: scores, groups, experts and weights of a token in registers.

A warp has a token: its experts' scores are spread over 32 lanes by group, so that the best of a
group or of a token is a few shuffles away. Nothing is sorted; the best is taken K times, as in
`jax.lax.top_k` the first of equals.
"""

import math
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import manual
from dsv3_jax.kernels.gemm import hopper
from dsv3_jax.kernels.gemm.hopper import plgpu

TOKENS = 8  # of a block: two for each warp, whose shuffles overlap
LOWEST = float("-inf")


def route_top_k(
    logits: Float[Array, "T E"],
    bias: Float[Array, " E"],
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    best_of_group: int,
) -> tuple[Int[Array, "T K"], Float[Array, "T K"], Float[Array, "T E"]]:
    """Experts, their scores and all scores; see `api.route_top_k`."""
    hopper.require()
    rows = logits.shape[0]
    logits = jnp.pad(logits, ((0, max(TOKENS - rows, 0)), (0, 0)))
    logits, bias = manual.vary((logits, bias))
    tokens, experts = logits.shape
    layout = _layout(n_group, experts // n_group)
    shape = (TOKENS, n_group, experts // n_group)

    def over_token(reduce, x):
        x = plgpu.layout_cast(reduce(x, 2), layout.reduce(2))
        return plgpu.layout_cast(reduce(x, 1), layout.reduce((1, 2)))

    def kernel(logits_ref, bias_ref, chosen, weights, scores_ref):
        start = lax.min(lax.axis_index("block") * TOKENS, jnp.int32(tokens - TOKENS))
        rows = pl.ds(start, TOKENS)
        logits = plgpu.load(logits_ref.at[rows], layout=layout, optimized=False)
        scores = 1 / (1 + jnp.exp(-logits))
        scores_ref[rows] = scores
        bias = plgpu.load(bias_ref, layout=layout.reduce(0), optimized=False)
        bias = plgpu.layout_cast(lax.broadcast_in_dim(bias, shape, [1, 2]), layout)
        choice = scores + bias
        group = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
        expert = group * shape[2] + plgpu.broadcasted_iota(jnp.int32, shape, 2, layout=layout)
        if topk_group < n_group:
            choice = _keep_best_groups(choice, expert, topk_group, best_of_group, layout)
        for k in range(top_k):
            largest = _spread(over_token(jnp.max, choice), shape, layout)
            first = jnp.where(choice == largest, expert, experts - 1)
            best = over_token(jnp.min, first)
            at_best = expert == _spread(best, shape, layout)
            chosen[k, rows] = best
            weights[k, rows] = over_token(jnp.sum, jnp.where(at_best, scores, 0.0))
            choice = jnp.where(at_best, LOWEST, choice)

    chosen, weights, scores = plgpu.kernel(
        kernel,
        out_type=[
            manual.result((top_k, tokens), jnp.int32, logits),
            manual.result((top_k, tokens), jnp.float32, logits),
            manual.result((tokens, *shape[1:]), jnp.float32, logits),
        ],
        grid=(pl.cdiv(tokens, TOKENS),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(logits.reshape(tokens, *shape[1:]), bias.reshape(shape[1:]))
    chosen, weights, scores = manual.vary((chosen, weights, scores), logits)
    return chosen.T[:rows], weights.T[:rows], scores.reshape(tokens, experts)[:rows]


def _keep_best_groups(choice: Any, expert: Any, topk_group: int, best_of_group: int, layout: Any):
    """`choice` [T, G, E/G] with -inf for the experts of all but the best groups of each token.

    A group counts for the sum of its `best_of_group` best experts.
    """
    shape, last_group = choice.shape, choice.shape[1] - 1
    by_group, by_token = layout.reduce(2), layout.reduce((1, 2))
    group_scores, rest = 0.0, choice
    for _ in range(best_of_group):
        largest = plgpu.layout_cast(jnp.max(rest, 2), by_group)
        group_scores += largest
        first = jnp.where(rest == _spread(largest, shape, layout), expert, shape[1] * shape[2])
        first = plgpu.layout_cast(jnp.min(first, 2), by_group)
        rest = jnp.where(expert == _spread(first, shape, layout), LOWEST, rest)
    group = plgpu.broadcasted_iota(jnp.int32, shape[:2], 1, layout=by_group)
    penalty = plgpu.layout_cast(jnp.full(shape[:2], LOWEST, jnp.float32), by_group)
    for _ in range(topk_group):
        largest = plgpu.layout_cast(jnp.max(group_scores, 1), by_token)
        largest = _spread(largest, shape[:2], by_group)
        best = jnp.min(jnp.where(group_scores == largest, group, last_group), 1)
        best = plgpu.layout_cast(best, by_token)
        at_best = group == _spread(best, shape[:2], by_group)
        penalty = jnp.where(at_best, 0.0, penalty)
        group_scores = jnp.where(at_best, LOWEST, group_scores)
    return choice + _spread(penalty, shape, layout)


def _spread(x: Any, shape: tuple[int, ...], layout: Any) -> Any:
    """`x` repeated along the last dims of `shape`, which it lacks."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, range(x.ndim)), layout)


def _layout(groups: int, experts: int) -> Any:
    """[4 x tokens, groups, experts]: a warp for a token, its lanes spread over groups first."""
    group_lanes = math.gcd(groups, 8)
    expert_lanes = 32 // group_lanes
    if experts % expert_lanes:
        raise NotImplementedError(
            f"{experts} experts in each of {groups} groups must be a multiple of {expert_lanes}"
        )
    each = math.gcd(experts // expert_lanes, 8)
    span = (group_lanes, expert_lanes * each)
    layout = fragmented_array.TiledLayout(
        plgpu.Tiling(((4, *span), (1, *span), (1, 1, each))),
        (-9,),
        (-5, -4),
        -1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)
