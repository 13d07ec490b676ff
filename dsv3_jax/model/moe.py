"""DeepSeekMoE: the router, its balance loss and bias update, and the experts.

V3 report, section 2.1.2. Scores are f32. A bias steers which experts are chosen and nothing else;
it is state of the router, moved by `update_router_bias` once a step, not by the optimizer. No token
is ever dropped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.held import FP8Weight, parameter
from dsv3_jax.model.linear import group_alignment, grouped_linear
from dsv3_jax.model.mlp import MLP, swiglu
from dsv3_jax.parallel.expert import combine, dispatch, plan
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.quantization.recipe import BF16, Recipe

# A group is ranked by the sum of its best K_r / M = 8 / 4 experts (section 2.1.2); the published
# code fixes the number at 2.
EXPERTS_PER_GROUP_SCORE = 2


class Routing(NamedTuple):
    """Which experts each token goes to, with what weight."""

    experts_TK: Int[Array, "T K"]
    weights_TK: Float[Array, "T K"]  # f32
    scores_TE: Float[Array, "T E"]  # f32, without the bias


class MoEStats(NamedTuple):
    """What a MoE layer reports besides its output; a leading layer dim when scanned."""

    load_E: Int[Array, "*L E"]  # entries that each expert received
    balance_loss: Float[Array, "*L"]  # sequence-wise, before alpha
    experts: Int[Array, "*L B T K"]
    weights: Float[Array, "*L B T K"]


def route(
    x_TD: Float[Array, "T D"],
    gate_ED: Float[Array, "E D"],
    bias_E: Float[Array, " E"] | None,
    config: ModelConfig,
) -> Routing:
    """K experts for every token out of its best topk_group groups, with their gate weights.

    Scores are sigmoids (V3) or a softmax (V2) of f32 logits. Experts of losing groups score -inf,
    so that none of them can win however negative the others are. Gate weights come from the scores
    without the bias. V3 report, eqs. 12-16; DeepSeek-V3:inference/model.py, Gate.
    """
    # f32 operands: with bf16 scores, 15 % of the tokens choose other experts at E=256.
    logits_TE = jax.lax.dot_general(
        x_TD.astype(jnp.float32),
        gate_ED.astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    if config.scoring_func == "sigmoid":
        scores_TE = jax.nn.sigmoid(logits_TE)
    else:
        scores_TE = jax.nn.softmax(logits_TE, axis=-1)
    # The choice is not differentiated: gradients reach the router through the weights alone.
    choice_TE = jax.lax.stop_gradient(scores_TE)
    if bias_E is not None:
        choice_TE = choice_TE + bias_E
    if config.topk_method != "greedy" and config.n_group > 1:
        choice_TE = jnp.where(
            _best_groups(choice_TE, bias_E is not None, config), choice_TE, -jnp.inf
        )
    experts_TK = jax.lax.top_k(choice_TE, config.num_experts_per_tok)[1]
    weights_TK = jnp.take_along_axis(scores_TE, experts_TK, axis=-1)
    if config.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdims=True) + 1e-20)
    return Routing(experts_TK, weights_TK * config.routed_scaling_factor, scores_TE)


def _best_groups(
    choice_TE: Float[Array, "T E"], by_two_best: bool, config: ModelConfig
) -> Bool[Array, "T E"]:
    """True for the experts of each token's best topk_group groups.

    A group counts for the sum of its two best experts where there is a bias (noaux_tc), and for its
    best one otherwise (group_limited_greedy).
    """
    num_tokens, num_experts = choice_TE.shape
    grouped = choice_TE.reshape(num_tokens, config.n_group, -1)
    best = EXPERTS_PER_GROUP_SCORE if by_two_best else 1
    group_scores = jax.lax.top_k(grouped, best)[0].sum(-1)
    winners = jax.lax.top_k(group_scores, config.topk_group)[1]
    kept = jax.nn.one_hot(winners, config.n_group, dtype=jnp.bool_).any(axis=1)
    return jnp.repeat(kept, num_experts // config.n_group, axis=1)


def balance_loss(
    scores_BTE: Float[Array, "B T E"],
    experts_per_token: int,
    mask_BT: Bool[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """The complementary sequence-wise balance loss without its alpha (V3 report, eqs. 17-20).

    sum_i f_i P_i per sequence, averaged over the sequences: f_i counts the tokens whose K best raw
    scores include expert i, times E / (K T); P_i is the mean share of expert i in the tokens'
    scores. f has no gradient. T counts the tokens that the mask lets in. The reduction over
    sequences is not published; the mean makes alpha independent of the batch size.
    """
    num_experts = scores_BTE.shape[-1]
    chosen = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), experts_per_token)[1]
    chosen_BTE = jax.nn.one_hot(chosen, num_experts, dtype=jnp.float32).sum(axis=2)
    share_BTE = scores_BTE / scores_BTE.sum(-1, keepdims=True)
    if mask_BT is None:
        mask_BT = jnp.ones(scores_BTE.shape[:2], bool)
    weight_BT1 = mask_BT[..., None].astype(jnp.float32)
    tokens_B1 = jnp.maximum(weight_BT1.sum(axis=1), 1.0)
    f_BE = (chosen_BTE * weight_BT1).sum(axis=1) * num_experts / (experts_per_token * tokens_B1)
    p_BE = (share_BTE * weight_BT1).sum(axis=1) / tokens_B1
    return (f_BE * p_BE).sum(-1).mean()


def update_router_bias(
    bias: Float[Array, "*L E"], load: Int[Array, "*L E"], speed: Float[Array, ""] | float
) -> Float[Array, "*L E"]:
    """The bias moved by `speed` towards balance: up for underloaded experts, down for overloaded.

    `load` is that of the whole batch of the step: every micro-batch, every device. An expert is
    overloaded when its load exceeds the mean; one exactly at the mean stays (V3 report, section
    2.1.2; the sign rule is that of arXiv 2408.15664).
    """
    # Integers, as a mean in f32 would round above 2**24 entries: floor and remainder, because
    # load * E would overflow.
    mean, remainder = jnp.divmod(load.sum(-1, keepdims=True), load.shape[-1])
    underloaded = (load < mean) | ((load == mean) & (remainder > 0))
    overloaded = load > mean
    return bias + speed * (underloaded.astype(bias.dtype) - overloaded.astype(bias.dtype))


def expert_ffn(
    x_TD: Float[Array, "T D"],
    routing: Routing,
    gate_up_E2FD: Float[Array, "E 2 F D"] | FP8Weight,
    down_EDF: Float[Array, "E D F"] | FP8Weight,
    recipe: Recipe = BF16,
) -> Float[Array, "T D"]:
    """The weighted sum of each token's experts: SwiGLU feed-forwards over grouped rows."""
    gate_up, down = recipe.experts_gate_up_proj, recipe.experts_down_proj
    num_experts = len(down_EDF)
    alignment = group_alignment(routing.experts_TK.size, num_experts, gate_up, down)
    # dispatch
    handle, group_sizes, _ = plan(routing.experts_TK, num_experts, alignment)
    rows_MD = dispatch(x_TD, handle)
    # expert FFN
    hidden_M2F = grouped_linear(rows_MD, gate_up_E2FD, group_sizes, alignment, gate_up)
    out_MD = grouped_linear(hidden_M2F, down_EDF, group_sizes, alignment, down, swiglu)
    # combine
    return combine(out_MD, routing.weights_TK, handle)


def choose_places(
    experts_TK: Int[Array, "T K"], place_EC: Int[Array, "E C"], count_E: Int[Array, " E"]
) -> Int[Array, "T K"]:
    """Where each choice is computed when experts have replicas: token by token, one after another.

    place_EC are the places of each expert, of which the first count_E are in use.
    """
    turn_TK = jnp.arange(len(experts_TK))[:, None] % count_E[experts_TK]
    return place_EC[experts_TK, turn_TK]


class Experts(nn.Module):
    """The weights in the places of routed experts, stacked: one place each, or replicas besides."""

    config: ModelConfig
    recipe: Recipe = BF16
    layout: Layout | None = None
    num_places: int | None = None  # None: n_routed_experts

    @nn.compact
    def __call__(self, x_TD: Float[Array, "T D"], routing: Routing) -> Float[Array, "T D"]:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        experts = self.num_places or config.n_routed_experts
        width, dim = config.moe_intermediate_size, x_TD.shape[-1]
        gate_up_proj = parameter(self, "gate_up_proj", init, (experts, 2, width, dim))
        down_proj = parameter(self, "down_proj", init, (experts, dim, width))
        return expert_ffn(x_TD, routing, gate_up_proj, down_proj, self.recipe)


class MoE(nn.Module):
    """Routed experts plus shared experts (one MLP of n_shared_experts times the width)."""

    config: ModelConfig
    recipe: Recipe = BF16
    layout: Layout | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], MoEStats]:
        """The layer's output and its load, balance loss and choices.

        Tokens outside the mask are computed but count neither for the load nor for the loss.
        """
        config = self.config
        batch, length, dim = x.shape
        x_TD = x.reshape(-1, dim)
        gate = self.param(
            "gate", nn.initializers.normal(config.initializer_range), (config.n_routed_experts, dim)
        )
        bias = None
        if config.has_router_bias:
            bias = self.variable(
                "router",
                "e_score_correction_bias",
                jnp.zeros,
                (config.n_routed_experts,),
                jnp.float32,
            ).value
        routing = route(x_TD, gate, bias, config)
        # Redundant experts (inference/redundant_experts.py): statistics stay those of experts.
        placed, num_places = routing, None
        if self.has_variable("placement", "expert"):
            place, count = (self.get_variable("placement", name) for name in ("place", "count"))
            placed = routing._replace(experts_TK=choose_places(routing.experts_TK, place, count))
            num_places = len(self.get_variable("placement", "expert"))
        experts = Experts(config, self.recipe, self.layout, num_places, name="experts")
        y = experts(x_TD, placed).reshape(x.shape)
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            y = y + MLP(config, width, self.recipe, self.layout, name="shared_experts")(x)
        stats = MoEStats(
            _load(routing.experts_TK, config.n_routed_experts, mask),
            balance_loss(
                routing.scores_TE.reshape(batch, length, -1), config.num_experts_per_tok, mask
            ),
            routing.experts_TK.reshape(batch, length, -1),
            routing.weights_TK.reshape(batch, length, -1),
        )
        return y, stats


def _load(
    experts_TK: Int[Array, "T K"], num_experts: int, mask: Bool[Array, "B T"] | None
) -> Int[Array, " E"]:
    counted = jnp.ones(experts_TK.shape, jnp.int32)
    if mask is not None:
        counted = counted * mask.reshape(-1, 1).astype(jnp.int32)
    return jnp.zeros(num_experts, jnp.int32).at[experts_TK].add(counted)
