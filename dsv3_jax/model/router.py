"""The router: which experts each token goes to, its balance loss and the update of its bias.

V3 report, section 2.1.2. Scores are f32. A bias steers which experts are chosen and nothing else;
it is state of the router, moved by `update_router_bias` once a step, not by the optimizer.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.fused.api import route_top_k
from dsv3_jax.model.split_product import f32_product
from dsv3_jax.parallel.collectives import total

# A group is ranked by the sum of its best K_r / M = 8 / 4 experts (section 2.1.2); the published
# code fixes the number at 2.
EXPERTS_PER_GROUP_SCORE = 2


# What `scoring_func` names.
SCORES: dict[str, Callable[[Array], Array]] = {
    "sigmoid": jax.nn.sigmoid,
    "softmax": partial(jax.nn.softmax, axis=-1),
}


class Routing(NamedTuple):
    """Which experts each token goes to, with what weight; and the scores, without the bias.

    Weights and scores are f32. Source: V3 report, eqs. 12-16.
    """

    experts_TK: Int[Array, "T K"]
    weights_TK: Float[Array, "T K"]
    scores_TE: Float[Array, "T E"]


def route(
    x_TD: Float[Array, "T D"],
    gate_ED: Float[Array, "E D"],
    bias_E: Float[Array, " E"] | None,
    config: ModelConfig,
    score: Callable[[Array], Array] | None = None,
    select: Callable[[Array, Array | None, ModelConfig], Array] | None = None,
) -> Routing:
    """K experts for every token out of its best topk_group groups, with their gate weights.

    Scores are sigmoids (V3) or a softmax (V2) of f32 logits. Experts of losing groups score -inf,
    so that none of them can win however negative the others are. Gate weights come from the scores
    without the bias. V3 report, eqs. 12-16; DeepSeek-V3:inference/model.py, Gate.

    score(logits_TE) gives other scores, [T, E] f32, positive where `norm_topk_prob` or the balance
    loss divides by their sum. select(scores_TE, bias_E, config) gives other choices, int [T, K], no
    expert twice for a token; it is not differentiated. Raises ValueError for scores or choices of
    another shape or dtype.

    >>> import jax.numpy as jnp, dsv3_jax as ds
    >>> gate = jnp.eye(8)  # expert e likes tokens with a large entry e
    >>> ds.route(10 * jnp.eye(8)[:1], gate, None, ds.load_config("tiny").model).experts_TK[0, 0]
    Array(0, dtype=int32)
    """
    # f32 operands: with bf16 scores, 15 % of the tokens choose other experts at E=256.
    logits_TE = f32_product(x_TD, gate_ED)
    if score is None and select is None and config.scoring_func == "sigmoid":
        bias = jnp.zeros(logits_TE.shape[1]) if bias_E is None else bias_E
        groups = _groups(bias_E is not None, config)
        chosen: Any = _choose(logits_TE, bias, config.num_experts_per_tok, groups)
        experts_TK, weights_TK, scores_TE = chosen
    else:
        scores_TE = (score or SCORES[config.scoring_func])(logits_TE)
        # The choice is not differentiated: gradients reach the router through the weights alone.
        experts_TK = (select or best_of_groups)(jax.lax.stop_gradient(scores_TE), bias_E, config)
        wanted = (logits_TE.shape[0], config.num_experts_per_tok)
        if scores_TE.shape != logits_TE.shape or experts_TK.shape != wanted:
            raise ValueError(
                f"the router's functions gave scores {scores_TE.shape} and experts "
                f"{experts_TK.shape}: they must be [T, E] {logits_TE.shape} and [T, K] {wanted}"
            )
        weights_TK = jnp.take_along_axis(scores_TE, experts_TK, axis=-1)
    if config.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdims=True) + 1e-20)
    return Routing(experts_TK, weights_TK * config.routed_scaling_factor, scores_TE)


def best_of_groups(
    scores_TE: Float[Array, "T E"], bias_E: Float[Array, " E"] | None, config: ModelConfig
) -> Int[Array, "T K"]:
    """The K best experts of each token's best groups, by scores plus bias: the default choice."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    groups = _groups(bias_E is not None, config)
    if groups.n_group > 1:
        choice_TE = jnp.where(_best_groups(choice_TE, groups), choice_TE, -jnp.inf)
    return jax.lax.top_k(choice_TE, config.num_experts_per_tok)[1]


class _Groups(NamedTuple):
    """Of how many groups of experts how many are kept, and how many of their best count."""

    n_group: int = 1
    topk_group: int = 1
    best_of_group: int = 1


def _groups(has_bias: bool, config: ModelConfig) -> _Groups:
    """A group counts for the sum of its two best experts where there is a bias (noaux_tc), and for
    its best one otherwise (group_limited_greedy)."""
    if config.topk_method == "greedy" or config.n_group == 1:
        return _Groups()
    best = EXPERTS_PER_GROUP_SCORE if has_bias else 1
    return _Groups(config.n_group, config.topk_group, best)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _choose(logits_TE, bias_E, top_k: int, groups: _Groups):
    """Experts, their scores and all scores: sigmoids of the logits.

    The choice is not differentiated: gradients reach the logits through the scores alone.
    """
    return route_top_k(logits_TE, bias_E, top_k=top_k, **groups._asdict())


def _choose_forward(logits_TE, bias_E, top_k, groups):
    chosen: Any = _choose(logits_TE, bias_E, top_k, groups)
    experts_TK, _, scores_TE = chosen
    return chosen, (experts_TK, scores_TE, bias_E)


def _choose_backward(top_k, groups, residuals, cotangents):
    experts_TK, scores_TE, bias_E = residuals
    _, d_weights_TK, d_scores_TE = cotangents
    weights_of = partial(jnp.take_along_axis, indices=experts_TK, axis=-1)
    d_scores_TE += jax.vjp(weights_of, scores_TE)[1](d_weights_TK)[0]
    return d_scores_TE * scores_TE * (1 - scores_TE), jnp.zeros_like(bias_E)


_choose.defvjp(_choose_forward, _choose_backward)


def _best_groups(choice_TE: Float[Array, "T E"], groups: _Groups) -> Bool[Array, "T E"]:
    """True for the experts of each token's best groups."""
    num_tokens, num_experts = choice_TE.shape
    grouped = choice_TE.reshape(num_tokens, groups.n_group, -1)
    if grouped.shape[-1] > groups.best_of_group:
        grouped = jax.lax.top_k(grouped, groups.best_of_group)[0]
    group_scores = grouped.sum(-1)
    winners = jax.lax.top_k(group_scores, groups.topk_group)[1]
    kept = jax.nn.one_hot(winners, groups.n_group, dtype=jnp.bool_).any(axis=1)
    return jnp.repeat(kept, num_experts // groups.n_group, axis=1)


def balance_loss(
    scores_BTE: Float[Array, "B T E"],
    experts_per_token: int,
    mask_BT: Bool[Array, "B T"] | None = None,
    *,
    batch: int | None = None,
    batch_axes: Sequence[str] = (),
    token_axes: Sequence[str] = (),
) -> Float[Array, ""]:
    """The complementary sequence-wise balance loss without its alpha (V3 report, eqs. 17-20).

    sum_i f_i P_i per sequence, averaged over the sequences: f_i counts the tokens whose K best raw
    scores include expert i, times E / (K T); P_i is the mean share of expert i in the tokens'
    scores. f has no gradient. T counts the tokens that the mask lets in. The reduction over
    sequences is not published; the mean makes alpha independent of the batch size.

    Inside shard_map, `batch` is the number of sequences in all, spread over batch_axes, and
    token_axes are those that a sequence's tokens are spread over. f and P are summed over these
    before they meet: a product of sums is not the sum of the shards' products. f32. Raises nothing
    of its own.

    >>> import jax.numpy as jnp, dsv3_jax as ds
    >>> even = jnp.eye(4)[None] + 0.1  # every token prefers another expert
    >>> round(float(ds.balance_loss(even, experts_per_token=1)), 4)
    1.0
    """
    num_experts = scores_BTE.shape[-1]
    chosen = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), experts_per_token)[1]
    chosen_BTE = jax.nn.one_hot(chosen, num_experts, dtype=jnp.float32).sum(axis=2)
    share_BTE = scores_BTE / scores_BTE.sum(-1, keepdims=True)
    if mask_BT is None:
        mask_BT = jnp.ones(scores_BTE.shape[:2], bool)
    weight_BT1 = mask_BT[..., None].astype(jnp.float32)
    tokens_B1 = jnp.maximum(total(weight_BT1.sum(axis=1), token_axes), 1.0)
    chosen_BE = total((chosen_BTE * weight_BT1).sum(axis=1), token_axes)
    f_BE = chosen_BE * num_experts / (experts_per_token * tokens_B1)
    p_BE = total((share_BTE * weight_BT1).sum(axis=1), token_axes) / tokens_B1
    by_sequence = (f_BE * p_BE).sum(-1)
    if batch is None:
        return by_sequence.mean()
    return total(by_sequence.sum(), batch_axes) / batch


def update_router_bias(
    bias: Float[Array, "*L E"],
    load: Int[Array, "*L E"],
    speed: Float[Array, ""] | np.floating | float,
) -> Float[Array, "*L E"]:
    """The bias moved by `speed` towards balance: up for underloaded experts, down for overloaded.

    `load` is that of the whole batch of the step: every micro-batch, every device. An expert is
    overloaded when its load exceeds the mean; one exactly at the mean stays (V3 report, section
    2.1.2; the sign rule is that of arXiv 2408.15664). f32. Raises nothing of its own.

    >>> import jax.numpy as jnp, dsv3_jax as ds
    >>> ds.update_router_bias(jnp.zeros(3), jnp.array([5, 1, 3]), 0.5).tolist()
    [-0.5, 0.5, 0.0]
    """
    # Integers, as a mean in f32 would round above 2**24 entries: floor and remainder, because
    # load * E would overflow.
    mean, remainder = jnp.divmod(load.sum(-1, keepdims=True), load.shape[-1])
    underloaded = (load < mean) | ((load == mean) & (remainder > 0))
    overloaded = load > mean
    return bias + speed * (underloaded.astype(bias.dtype) - overloaded.astype(bias.dtype))
