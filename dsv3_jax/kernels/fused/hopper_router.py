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
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import hopper, manual
from dsv3_jax.kernels.fused.hopper_registers import array, elements, tree, vector_of
from dsv3_jax.kernels.hopper import plgpu

TOKENS = 4  # of a block: one for each warp
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
    of_group = experts // n_group
    layout, places = _layout(n_group, of_group)
    shape = (TOKENS, n_group, places)
    # Places of a group that lanes have beyond its experts score -inf, and are none of them.
    fill = [(0, 0), (0, places - of_group)]
    logits = logits.reshape(tokens, n_group, of_group)
    logits = jnp.pad(logits, [(0, 0), *fill], constant_values=LOWEST)
    bias = jnp.pad(bias.reshape(n_group, of_group), fill, constant_values=LOWEST)

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
        place = plgpu.broadcasted_iota(jnp.int32, shape, 2, layout=layout)
        expert = jnp.where(place < of_group, group * of_group + place, experts)
        if topk_group < n_group:
            choice = _keep_best_groups(choice, expert, topk_group, best_of_group, layout)
        # Integers in the same order, which a warp compares in one instruction.
        bits = lax.bitcast_convert_type(choice, jnp.int32)
        key = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        for k in range(top_k):
            largest = _spread(_over_token("max", key, layout), shape, layout)
            first = jnp.where(key == largest, expert, experts - 1)
            best = _over_token("min", first, layout)
            at_best = expert == _spread(best, shape, layout)
            chosen[rows, k] = best
            score = jnp.where(at_best, lax.bitcast_convert_type(scores, jnp.int32), 0)
            score = _over_token("max", score, layout)
            weights[rows, k] = lax.bitcast_convert_type(score, jnp.float32)
            key = jnp.where(at_best, jnp.iinfo(jnp.int32).min, key)

    chosen, weights, scores = hopper.kernel(
        kernel,
        out_type=[
            manual.result((tokens, top_k), jnp.int32, logits),
            manual.result((tokens, top_k), jnp.float32, logits),
            manual.result((tokens, *shape[1:]), jnp.float32, logits),
        ],
        grid=(pl.cdiv(tokens, TOKENS),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(logits, bias)
    chosen, weights, scores = manual.vary((chosen, weights, scores), logits)
    scores = scores[:rows, :, :of_group].reshape(rows, experts)
    return chosen[:rows], weights[:rows], scores


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


def _over_token(what: str, x: Any, layout: Any) -> Any:
    """The largest or smallest int32 of each token, "max" or "min" of x [T, G, E/G]."""
    if hopper.interpreted():
        return {"max": jnp.max, "min": jnp.min}[what](x, (1, 2))
    by_token = layout.reduce((1, 2))
    result = plgpu.ShapeDtypeStruct(x.shape[:1], x.dtype, layout=by_token)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def reduce(_, x):
        numbers = [number for register in x.registers.flat for number in elements(register)]
        of_lane = tree({"max": arith.maxsi, "min": arith.minsi}[what], numbers)
        text = f"redux.sync.{what}.s32 $0, $1, 0xffffffff;"
        of_warp = llvm.inline_asm(of_lane.type, [of_lane], text, "=r,r", has_side_effects=True)
        shape, layout = x.shape[:1], x.layout.reduce((1, 2))
        return array([vector_of([of_warp])], shape, layout, is_signed=True)

    return reduce(x)


def _spread(x: Any, shape: tuple[int, ...], layout: Any) -> Any:
    """`x` repeated along the last dims of `shape`, which it lacks."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, range(x.ndim)), layout)


def _layout(groups: int, experts: int) -> tuple[Any, int]:
    """[4 x tokens, groups, places]: a warp for a token, its lanes spread over groups first; and
    how many places a group has, one for each expert or a few more."""
    group_lanes = math.gcd(groups, 8)
    expert_lanes = 32 // group_lanes
    places = experts + -experts % expert_lanes
    each = math.gcd(places // expert_lanes, 8)
    span = (group_lanes, expert_lanes * each)
    layout = fragmented_array.TiledLayout(
        plgpu.Tiling(((4, *span), (1, *span), (1, 1, each))),
        (-9,),
        (-5, -4),
        -1,
        _check_canonical=False,
    ).canonicalize()
    tiled = layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim
    return plgpu.Layout.TILED(*tiled), places
