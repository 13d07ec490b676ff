"""DeepSeekMoE: routed experts, spread over the devices of a mesh, and shared experts.

V3 report, section 2.1.2. No token is ever dropped. Here arrays of the batch become arrays of a
device (`routed_experts`); what travels between devices is `parallel/expert.py`'s.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.expert_ffn import exchanged_expert_ffn
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.mlp import MLP
from dsv3_jax.model.parameters import parameters
from dsv3_jax.model.projection import Projection, as_projection
from dsv3_jax.model.router import Routing, balance_loss, route
from dsv3_jax.parallel.collectives import total, vary
from dsv3_jax.parallel.exchange import Exchange, make_exchange
from dsv3_jax.parallel.hops import NOBODY
from dsv3_jax.parallel.phases import tied
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.quantization.block_scaled import PER_TOKEN, StepWeight
from dsv3_jax.quantization.recipe import Recipe, TileFormat


class MoEStats(NamedTuple):
    """What a MoE layer reports besides its output; a leading layer dim when scanned.

    All of it is of the whole batch, whatever the devices: load, loss and rounds are the same on
    each of them. Fields:
        load_E: how many tokens chose each expert.
        balance_loss: sequence-wise, before alpha; f32.
        experts, weights: each token's choices and their gate weights, f32.
        rounds: of exchanges between devices; 1 unless a buffer was too small.

    Source: V3 report, section 2.1.2.
    """

    load_E: Int[Array, "*L E"]
    balance_loss: Float[Array, "*L"]
    experts: Int[Array, "*L B T K"]
    weights: Float[Array, "*L B T K"]
    rounds: Int[Array, "*L"]


def choose_places(
    experts_TK: Int[Array | np.ndarray, "T K"],
    place_EC: Int[Array | np.ndarray, "E C"],
    count_E: Int[Array | np.ndarray, " E"],
    first_turn: Int[Array, ""] | int = 0,
    *,
    num_nodes: int = 1,
    places_per_node: int = 1,
    own_node: Int[Array, "..."] | int = 0,
) -> Int[Array | np.ndarray, "T K"]:
    """Where each choice is computed when experts have replicas: token by token, one after another.

    place_EC are the places of each expert, of which the first count_E are in use. Token t begins at
    replica first_turn + t. On several nodes, replicas on its own node and on nodes that it goes to
    anyway come first, so that replicas bring a token to no further node; among equals, in turn.
    """
    turn_T = first_turn + jnp.arange(len(experts_TK))
    if num_nodes == 1:
        return place_EC[experts_TK, turn_T[:, None] % count_E[experts_TK]]
    place_TKC = place_EC[experts_TK]
    used_TKC = jnp.arange(place_EC.shape[1]) < count_E[experts_TK][..., None]
    goes_TKCN = jax.nn.one_hot(place_TKC // places_per_node, num_nodes, dtype=jnp.bool_)
    goes_TKCN &= used_TKC[..., None]
    # A choice with replicas on one node only goes there; so does what the node has itself.
    nodes_TKN = goes_TKCN.any(2)
    certain_TKN = nodes_TKN & (nodes_TKN.sum(-1, keepdims=True) == 1)
    visited_TN = certain_TKN.any(1) | jax.nn.one_hot(own_node, num_nodes, dtype=jnp.bool_)
    chosen = []
    for k in range(experts_TK.shape[1]):
        near_TC = (goes_TKCN[:, k] & visited_TN[:, None]).any(-1)
        open_TC = jnp.where(near_TC.any(-1, keepdims=True), near_TC, used_TKC[:, k])
        number_TC = jnp.cumsum(open_TC, axis=-1) - 1
        turn_T1 = (turn_T % open_TC.sum(-1))[:, None]
        takes_TC = open_TC & (number_TC == turn_T1)
        chosen.append(jnp.where(takes_TC, place_TKC[:, k], 0).sum(-1))
        visited_TN |= (goes_TKCN[:, k] & takes_TC[..., None]).any(1)
    return jnp.stack(chosen, axis=1)


class MoEWeights(NamedTuple):
    """The parameters and state of the routed part of a layer."""

    gate: Float[Array, "E D"]
    bias: Float[Array, " E"] | None
    # In the places of experts; P = E unless some have replicas.
    gate_up: Float[Array, "P 2 F D"] | Projection | StepWeight
    down: Float[Array, "P D F"] | Projection | StepWeight
    places: tuple[Int[Array, "E C"], Int[Array, " E"]] | None = None  # see choose_places


def routed_experts(
    x: Float[Array, "B T D"] | tuple[Array, ...],
    weights: MoEWeights,
    counted: Any,
    how: Pass,
    told: Any = None,
    shared: Any = None,
) -> tuple[Any, Any, Float[Array, "B T D"] | None]:
    """The routed experts' share of a MoE layer's output, its statistics, and x for other experts.

    Where these run while rows are on their way, that is an x that is not there before the router is
    done; else None, and x is for them as it is. Of a pair of x, halves of a batch in opposite
    phases, with pairs of masks (or None), output and statistics are pairs; with both weights of the
    shared experts, which no axis cuts, their output is in it.

    The boundary between arrays of the batch and those of a device. Tokens lie on the axes of
    "batch" and "residual", experts on those of "expert". Where B or T do not divide, tokens that
    nobody handles fill them up.
    """
    in_halves = isinstance(x, tuple)
    parts: Any = x if in_halves else (x,)
    layout, (batch, length) = how.layout, parts[0].shape[:2]
    counted, told = (
        (mask if in_halves else (mask,)) if mask is not None else (None,) * len(parts)
        for mask in (counted, told)
    )
    fill = [(0, -batch % layout.size("batch")), (0, -length % layout.size("residual"))]
    real = None
    if fill != [(0, 0), (0, 0)]:
        real = jnp.pad(jnp.ones((batch, length), bool), fill)
        parts = tuple(jnp.pad(x, [*fill, (0, 0)]) for x in parts)
        counted = tuple(real if each is None else jnp.pad(each, fill) for each in counted)
        told = tuple(each if each is None else jnp.pad(each, [*fill, (0, 0)]) for each in told)
    rows, columns = parts[0].shape[:2]
    exchange = exchange_of(
        how.config,
        how.recipe,
        layout,
        tokens=rows * columns // (layout.size("batch") * layout.size("residual")),
        num_places=weights.down.shape[0],
        takes_quantized_rows=as_projection(weights.gate_up).takes_quantized_rows,
        limited=how.select is None and told[0] is None,
    )
    tokens: Any = layout.spec("batch", "residual")
    held: Any = layout.spec("expert")
    everywhere: Any = PartitionSpec()
    beside = None if shared is None else (parts, *shared)
    of_beside = everywhere if shared is None else (tokens, everywhere, everywhere)
    of_weights = MoEWeights(everywhere, everywhere, held, held, everywhere)
    y, stats, later = layout.shard_map(
        partial(_experts_of_device, batch, how, exchange),
        in_specs=(tokens, of_weights, tokens, of_beside),
        out_specs=(tokens, MoEStats(everywhere, everywhere, tokens, tokens, everywhere), tokens),
    )(parts, weights, tuple((real, *masks) for masks in zip(counted, told)), beside)
    if real is not None:
        y, later = jax.tree.map(lambda x: x[:batch, :length], (y, later))
        stats = stats._replace(
            experts=tuple(x[:batch, :length] for x in stats.experts),
            weights=tuple(x[:batch, :length] for x in stats.weights),
        )
    of_parts = tuple(MoEStats._make((*each, stats.rounds)) for each in zip(*stats[:-1]))
    return (y, of_parts, later) if in_halves else (y[0], of_parts[0], later)


def _experts_of_device(
    batch: int, how: Pass, exchange: Exchange, parts, weights: MoEWeights, masks, beside
) -> tuple[tuple[Array, ...], MoEStats, Float[Array, "B T D"] | None]:
    """`routed_experts` of one device; what is of a part of the batch is a tuple of all parts'."""
    axes = (*how.layout.axes("batch"), *how.layout.axes("residual"))
    # The gradients of all weights are summed over the devices here.
    parts, weights, masks, beside = vary((parts, weights, masks, beside), axes)
    routed, of_router = [], weights
    for x, of_part in zip(parts, masks):
        if routed:  # else XLA makes one product of both routers
            gate, _ = tied(weights.gate, routed[0][0].experts_TK)
            of_router = weights._replace(gate=gate)
        routed.append(_route_on_device(batch, how, exchange, x, of_router, of_part))
    placed, stats, later = zip(*routed)
    rows = tuple(x.reshape(-1, x.shape[-1]) for x in parts)
    alone = len(parts) == 1
    y, rounds = exchanged_expert_ffn(
        rows[0] if alone else rows,
        placed[0] if alone else placed,
        weights.gate_up,
        weights.down,
        how.recipe,
        exchange,
        beside and (tuple(x.reshape(-1, x.shape[-1]) for x in beside[0]), *beside[1:]),
    )
    y = (y,) if alone else y
    of_all = MoEStats._make((*zip(*stats), rounds))
    return tuple(y.reshape(x.shape) for y, x in zip(y, parts)), of_all, later[0]


def _route_on_device(
    batch: int, how: Pass, exchange: Exchange, x, weights: MoEWeights, masks
) -> tuple[Routing, tuple[Any, ...], Float[Array, "B T D"] | None]:
    """Where the tokens of x go, all of MoEStats but the rounds, and `routed_experts`' later x."""
    layout, config, (real, counted, told) = how.layout, how.config, masks
    batch_axes, sequence_axes = layout.axes("batch"), layout.axes("residual")
    axes = (*batch_axes, *sequence_axes)
    x_TD = x.reshape(-1, x.shape[-1])
    select: Any = how.select
    if told is not None:
        told = told.reshape(x_TD.shape[0], -1)
        select = lambda *_: told  # noqa: E731
    routing, later = route(x_TD, weights.gate, weights.bias, config, how.score, select), None
    if leaving_to_exchange(layout) is not None:
        later, weights_TK = lax.optimization_barrier((x, routing.weights_TK))
        routing = routing._replace(weights_TK=weights_TK)
    experts_TK = routing.experts_TK
    if weights.places is not None:  # statistics stay those of experts
        expert_axes = layout.axes("expert")
        node, within = expert_axes[:1], expert_axes[1:]
        devices_per_node = math.prod(layout.mesh.shape[axis] for axis in within)
        experts_TK = choose_places(
            experts_TK,
            *weights.places,
            # Every device begins with another replica: when decoding, each has few tokens.
            first_turn=lax.axis_index(axes),
            num_nodes=math.prod(layout.mesh.shape[axis] for axis in node),
            places_per_node=exchange.experts * devices_per_node,
            own_node=lax.axis_index(node),
        )
    if exchange.hops and real is not None:
        experts_TK = jnp.where(real.reshape(-1, 1), experts_TK, NOBODY)
    by_token = (*x.shape[:2], -1)
    stats = (
        total(_load(routing.experts_TK, config.n_routed_experts, counted), axes),
        balance_loss(
            routing.scores_TE.reshape(by_token),
            config.num_experts_per_tok,
            counted,
            batch=batch,
            batch_axes=batch_axes,
            token_axes=sequence_axes,
        ),
        routing.experts_TK.reshape(by_token),
        routing.weights_TK.reshape(by_token),
    )
    return routing._replace(experts_TK=experts_TK), stats, later


def exchange_of(
    config: ModelConfig,
    recipe: Recipe,
    layout: Layout,
    *,
    tokens: int,
    num_places: int | None = None,
    takes_quantized_rows: bool = True,
    limited: bool = True,
) -> Exchange:
    """How a device's `tokens` tokens reach their experts under `layout`.

    num_places counts the experts with their replicas; None: there are none. takes_quantized_rows:
    as their weights say. limited: tokens keep to topk_group groups, as the config says.
    """
    gate_up = recipe.experts_gate_up_proj
    axes = layout.rules.expert  # with those of one device: the first is that of nodes
    num_nodes = layout.mesh.shape[axes[0]]
    max_nodes = None
    num_places = num_places or config.n_routed_experts
    # A group of experts lies within one node, with all replicas if the plan is hierarchical.
    if limited and config.topk_method != "greedy" and config.n_group % num_nodes == 0:
        max_nodes = config.topk_group
    return make_exchange(
        layout.expert,
        {axis: layout.mesh.shape[axis] for axis in axes},
        (*layout.axes("batch"), *layout.axes("residual")),
        tokens=tokens,
        per_token=config.num_experts_per_tok,
        num_experts=num_places,
        max_nodes=max_nodes,
        limit_is_certain=num_places == config.n_routed_experts,
        # Only rows quantised as the recipe would may stay as they arrive.
        quantized_rows=gate_up is not None
        and gate_up.input == TileFormat(PER_TOKEN, "ue8m0")
        and takes_quantized_rows,
    )


class Experts(nn.Module):
    """The routed experts, their weights stacked: one place each, or replicas besides."""

    how: Pass
    num_places: int | None = None  # None: n_routed_experts

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"] | tuple[Array, ...],
        counted: Any,
        gate: Float[Array, "E D"],
        bias: Float[Array, " E"] | None,
        places: tuple[Int[Array, "E C"], Int[Array, " E"]] | None,
        told: Any = None,
        shared: Any = None,
    ) -> tuple[Any, Any, Float[Array, "B T D"] | None]:
        w = parameters(self, self.how.config, "moe", "mlp/experts", self.num_places)
        weights = MoEWeights(gate, bias, w.gate_up_proj, w.down_proj, places)
        return routed_experts(x, weights, counted, self.how, told, shared)


class MoE(nn.Module):
    """Routed experts plus shared experts (one MLP of n_shared_experts times the width)."""

    how: Pass

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"] | tuple[Array, ...],
        counted: Any = None,
        told: Any = None,
    ) -> tuple[Any, Any]:
        """The layer's output and its load, balance loss and choices; of halves as `routed_experts`.

        Tokens that are not counted are computed, but are neither in the load nor in the loss. Those
        that are told their experts go to these.
        """
        config = self.how.config
        w = parameters(self, config, "moe", "mlp")
        bias = w.e_score_correction_bias if config.has_router_bias else None
        # Redundant experts (inference/redundant_experts.py).
        places = num_places = None
        if self.has_variable("placement", "expert"):
            places = tuple(self.get_variable("placement", name) for name in ("place", "count"))
            num_places = len(self.get_variable("placement", "expert"))
        experts = Experts(self.how, num_places, name="experts")
        shared = weights = None
        if config.n_shared_experts:
            leaving = leaving_to_exchange(self.how.layout)
            shared = MLP(self.how, shared=True, leaving=leaving, name="shared_experts")
            if isinstance(x, tuple) and self.how.layout.size("mlp") == 1:
                weights = shared(None)  # the second half's rows come back over them
        y, stats, later = experts(x, counted, w.gate, bias, places, told, weights)
        if shared is not None and weights is None:
            x = x if later is None else later
            y = jax.tree.map(lambda y, x: y + shared(x), y, x)
        return self.how.layout.constrain(y, "batch", "residual"), stats


def leaving_to_exchange(layout: Layout) -> int | None:
    """The multiprocessors that rows over NVLink need, where shared experts run meanwhile."""
    expert, on_gpus = layout.expert, layout.platform in ("gpu", "cuda")
    reads = expert.transport == "pallas" and layout.size("expert") > 1
    return expert.multiprocessors if expert.shared_beside and reads and on_gpus else None


def _load(
    experts_TK: Int[Array, "BT K"], num_experts: int, counted: Bool[Array, "B T"] | None
) -> Int[Array, " E"]:
    ones = jnp.ones(experts_TK.shape, jnp.int32)
    if counted is not None:
        ones = ones * counted.reshape(-1, 1).astype(jnp.int32)
    return jnp.zeros(num_experts, jnp.int32).at[experts_TK].add(ones)
