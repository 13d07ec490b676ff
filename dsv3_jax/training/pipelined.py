"""The gradients of a step by a pipeline: what each rank does in a tick, with the model's own acts.

Forwards keep what `jax.vjp` saves of each layer, under the run's remat policy, so that nothing is
computed again that would not be without a pipeline. The loss is taken in the last stage's backward
tick, the embedding is looked up again for its gradient. Losses and gradients are those of
`step.gradients_of_micro_batches`, which one device runs (V3 report, section 3.2.1).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.model.block import Block
from dsv3_jax.model.ends import embed_tokens, gathered_ends
from dsv3_jax.model.forward_pass import Pass, Tokens
from dsv3_jax.model.placement import shardings
from dsv3_jax.model.stack import DENSE, MOE
from dsv3_jax.model.transformer import finish, tokens_of
from dsv3_jax.parallel.pipeline import RankActs, run_ticks
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.parallel.split_backward import SplitBackward, split_backward
from dsv3_jax.training.extensions import NONE, Extensions
from dsv3_jax.training.loss import (
    LossTerms,
    Rows,
    documents,
    prediction_nats,
    real_tokens,
    tokens_of_rows,
    training_pass,
)
from dsv3_jax.training.schedule import StepSettings
from dsv3_jax.training.stages import NO_LAYER, StagePlan, from_stages, plan_stages, to_stages
from dsv3_jax.training.state import variables_of

PIPE = PartitionSpec("pipe")


class Totals(NamedTuple):
    """What a rank adds up over the ticks; f32 unless said, gradients as the weights they are of."""

    layers: dict[str, Any]  # gradients by kind, [chunks, slots, ...]
    ends: dict[str, Any]
    ce: Float[Array, ""]
    mtp: Float[Array, ""]
    balance: Float[Array, ""]
    load: Int[Array, "V slots E"]  # of the MoE layers
    mtp_load: Int[Array, "depths E"]
    rounds: Float[Array, " A"]  # of each micro-batch, the most that a layer took


def pipelined_gradients(
    variables: dict[str, Any],
    rows: Rows,
    settings: StepSettings,
    config: Config,
    layout: Layout,
    per_token: float,
    around: Callable[[RankActs], RankActs] = lambda acts: acts,
    base: dict[str, Any] | None = None,
    extensions: Extensions = NONE,
) -> tuple[LossTerms, Any]:
    """Sums over the step's micro-batches: the terms of the loss, and the gradients of the weights.

    Those are of the losses times per_token. Weights come as `step` holds them, adapters with the
    frozen `base` that they belong to. `around` puts something around the acts of a rank, such as
    time stamps (benchmarks/bench_pipeline.py).
    """
    plan = plan_stages(config)
    inside = dataclasses.replace(layout, outer=("pipe",))
    kinds = tuple(plan.layers)
    trained, router = variables["params"], variables["router"]
    fixed = {"router": router} if base is None else base
    stacks = {
        kind: (
            to_stages(trained.get(kind, {}), kind, plan, inside),
            {
                name: to_stages(tree[kind], kind, plan, inside)
                for name, tree in fixed.items()
                if kind in tree
            },
        )
        for kind in kinds
    }

    def at_ends(tree):
        ends = {name: part for name, part in tree.items() if name not in kinds}
        where = shardings(ends, inside, stored=inside.gathers_each_layer)
        return layout.constrain_tree(ends, where)

    ends = at_ends(trained), {name: at_ends(tree) for name, tree in fixed.items()}
    how = training_pass(config, inside, extensions)
    rank = partial(_rank, plan=plan, config=config, how=how, per_token=per_token, around=around)
    totals = jax.shard_map(
        rank,
        mesh=layout.mesh,
        in_specs=(PIPE, PartitionSpec(), PartitionSpec(), PartitionSpec()),
        out_specs=_lies_on(PIPE, PartitionSpec()),
        axis_names={"pipe"},
        check_vma=False,  # a pullback inside cannot say along which axes it varies
    )(stacks, ends, rows, settings)
    of_layers = {k: from_stages(totals.layers[k], k, plan) for k in kinds if k in trained}
    gradients = totals.ends | of_layers
    load = {f"mtp_{depth}": of_depth for depth, of_depth in enumerate(totals.mtp_load)}
    if MOE in kinds:
        load[MOE] = from_stages(totals.load, MOE, plan)
    rounds = totals.rounds.sum()
    return LossTerms(totals.ce, totals.mtp, totals.balance, load, rounds), gradients


def _lies_on(of_rank: Any, everywhere: Any) -> Any:
    """Which totals are a rank's own, and which all ranks' together."""
    together: Any = {name: everywhere for name in Totals._fields}
    return Totals(**together)._replace(layers=of_rank, load=of_rank)


def _rank(
    stacks,
    ends,
    rows,
    settings,
    *,
    plan: StagePlan,
    config: Config,
    how: Pass,
    per_token,
    around,
):
    """The totals of one rank of `pipe`, and of all ranks where they are sums over them."""
    stacks = jax.tree.map(lambda leaf: leaf[0], stacks)
    rank = _Rank(stacks, ends, rows, settings, plan, config, how, per_token)
    _, batch, row_len = tokens_of_rows(rows).shape
    micro = (batch, row_len - 1, config.model.hidden_size)
    message = jax.ShapeDtypeStruct(micro, config.model.dtype)
    acts = around(RankActs(rank.forward, rank.input_backward, rank.weight_backward))
    totals = run_ticks(plan.tables, acts, rank.zeros(), message, settings.num_micro_batches)
    summed = totals._replace(layers=None, load=None, rounds=None)
    summed = jax.tree.map(lambda x: lax.psum(x, "pipe"), summed)
    return summed._replace(
        layers=jax.tree.map(lambda leaf: leaf[None], totals.layers),
        load=totals.load[None],
        rounds=lax.pmax(totals.rounds, "pipe"),
    )


class _Rank:
    """The acts of a rank, which is looked up by its number: all ranks run one program.

    Stacks and ends are pairs of what is trained and of what is not: router biases, and the frozen
    base of adapters.
    """

    def __init__(self, stacks, ends, rows, settings, plan, config, how: Pass, per_token):
        self.stacks, self.rows = stacks, rows
        self.ends, self.fixed_ends = ends
        self.settings, self.plan, self.config = settings, plan, config
        self.how = how
        self.per_token = per_token
        self.alpha = config.schedule.balance_loss_weight
        self.d_balance = jnp.float32(self.alpha * per_token)
        rank = lax.axis_index("pipe")
        self.stage = jnp.asarray(plan.stages)[rank]
        self.exists = {k: jnp.asarray(n != NO_LAYER)[rank] for k, n in plan.layers.items()}
        self.kinds = [kind for kind in (DENSE, MOE) if kind in plan.layers]
        self.backward: dict[str, _LayerBackward] = {}

    def zeros(self) -> Totals:
        """Totals before the first tick."""
        model, (chunks, slots) = self.config.model, self.exists[self.kinds[-1]].shape
        depths = model.num_nextn_predict_layers
        zero = jnp.zeros(())
        return Totals(
            {k: _zeros_in_f32(self.stacks[k][0]) for k in self.kinds},
            _zeros_in_f32(self.ends),
            *(zero, zero, zero),
            jnp.zeros((chunks, slots, model.n_routed_experts), jnp.int32),
            jnp.zeros((depths, model.n_routed_experts), jnp.int32),
            jnp.zeros(len(tokens_of_rows(self.rows))),
        )

    def forward(self, totals: Totals, chunk, m, x):
        """A stage's output, and what its layers saved."""
        ids, of_tokens = self._tokens(m)
        first = self.stage[chunk] == 0
        x = lax.cond(first, lambda: self._embed(self._ends(), ids).astype(x.dtype), lambda: x)
        saved = {}
        for kind in self.kinds:
            x, (saved[kind], stats) = self._scan_forward(kind, chunk, x, of_tokens)
            if kind == MOE:
                balance, load, rounds = stats
                totals = totals._replace(
                    balance=totals.balance + balance.sum(),
                    load=totals.load.at[chunk].add(load),
                    rounds=totals.rounds.at[m].max(rounds.max()),
                )
        return totals, x, saved

    def input_backward(self, totals: Totals, chunk, m, saved, received):
        """The gradient of a stage's input; in the last stage from its own output, by the loss."""
        ids, _ = self._tokens(m)
        last = self.stage[chunk] == self.plan.schedule.num_stages - 1
        outside = (totals.ends, totals.ce, totals.mtp, totals.balance, totals.mtp_load)
        outside += (totals.rounds,)
        outside, dy = lax.cond(
            last, self._loss, lambda outside, m, dy: (outside, dy), outside, m, received
        )
        names = ("ends", "ce", "mtp", "balance", "mtp_load", "rounds")
        totals = totals._replace(**dict(zip(names, outside)))
        frontiers, layers = {}, dict(totals.layers)
        for kind in reversed(self.kinds):
            dy, (early, frontiers[kind]) = self._scan_input_backward(kind, chunk, saved[kind], dy)
            layers[kind] = _add_leaves(layers[kind], chunk, early)
        ends, first = totals.ends, self.stage[chunk] == 0
        if ends:  # those of adapters are frozen
            ends = lax.cond(first, self._embedding_backward, lambda ends, *_: ends, ends, ids, dy)
        return totals._replace(ends=ends, layers=layers), dy, frontiers

    def weight_backward(self, totals: Totals, chunk, m, saved, frontiers) -> Totals:
        """Adds the gradients of the layers' weights that are not there yet."""
        layers = dict(totals.layers)
        for kind in self.kinds:
            late = self._scan_weight_backward(kind, chunk, saved[kind], frontiers[kind])
            layers[kind] = _add_leaves(layers[kind], chunk, late)
        return totals._replace(layers=layers)

    def _micro_batch(self, m) -> Rows:
        return jax.tree.map(lambda x: x[m], self.rows)

    def _tokens(self, m) -> tuple[Any, Tokens]:
        rows = self._micro_batch(m)
        segments = documents(rows, self.config)
        ids = self.how.layout.whole_rows(tokens_of_rows(rows)[:, :-1])
        return ids, tokens_of(ids, self.how, segments, real_tokens(rows))

    def _ends(self, trained: Any = None) -> Any:
        """The parameters that no layer of a stack has."""
        trained = self.ends if trained is None else trained
        return _joined(trained, self.fixed_ends, self.config)["params"]

    def _embed(self, ends, ids):
        gathered = gathered_ends(ends, self.how)
        x = embed_tokens(gathered, self.how.layout.in_order(ids), self.how)
        return self.how.layout.constrain(x, "batch", "residual")

    def _embedding_backward(self, ends, ids, dx):
        name = "embed_tokens"
        _, pull = jax.vjp(
            lambda table: self._embed(self.ends | {name: table}, ids), self.ends[name]
        )
        (d_table,) = pull(dx)
        return ends | {name: ends[name] + d_table}

    def _loss(self, outside, m, y):
        """The loss of a micro-batch from the last layer's output, and the gradients of both."""
        rows, (ids, of_tokens) = self._micro_batch(m), self._tokens(m)

        def of_output(ends, y):
            params = gathered_ends(self._ends(ends), self.how)
            variables = {"params": params, "router": self.fixed_ends["router"]}
            states = finish(variables, y, ids, of_tokens, self.how)
            weight, segments = self.settings.mtp_loss_weight, documents(rows, self.config)
            nats, ce, mtp = prediction_nats(params, states, rows, weight, segments, self.how)
            stats = states.mtp_stats
            balance = sum((s.balance_loss.sum() for s in stats), jnp.zeros(()))
            loss = nats + self.alpha * balance
            load = jnp.stack([s.load_E for s in stats]) if stats else outside[4]
            rounds = jnp.stack([s.rounds for s in stats]).max() if stats else jnp.zeros(())
            return loss * self.per_token, (ce, mtp, balance, load, rounds.astype(jnp.float32))

        gradient = jax.value_and_grad(of_output, argnums=(0, 1), has_aux=True)
        (_, (*terms, load, rounds)), (d_ends, dy) = gradient(self.ends, y)
        ends, *sums, loads, most = outside
        sums = [total + term for total, term in zip(sums, terms)]
        ends = jax.tree.map(lambda total, g: total + g.astype(jnp.float32), ends, d_ends)
        return (ends, *sums, loads + load if terms else loads, most.at[m].max(rounds)), dy

    def _slots(self, kind: str, chunk) -> tuple[Any, Any, Array]:
        trained, fixed = jax.tree.map(lambda leaf: leaf[chunk], self.stacks[kind])
        return trained, fixed, self.exists[kind][chunk]

    def _where(self, kind: str, exists, layer, skip, *operands):
        """layer(*operands) in a slot with a layer, else skip(*operands)."""
        if not self.plan.has_gaps(kind):
            return layer(*operands)
        return lax.cond(exists, layer, skip, *operands)

    def _scan_forward(self, kind: str, chunk, x, of_tokens: Tokens):
        backward = self.backward[kind] = _LayerBackward(kind, self.how, self.config)

        def body(x, slot):
            params, fixed, exists = slot

            def skip(params, fixed, x):
                shapes = jax.eval_shape(layer, params, fixed, x)[1]
                return x, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

            layer = partial(backward.forward, of_tokens=of_tokens)
            return self._where(kind, exists, layer, skip, params, fixed, x)

        return lax.scan(body, x, self._slots(kind, chunk))

    def _scan_input_backward(self, kind: str, chunk, saved, dy):
        backward = self.backward[kind]

        def body(dy, slot):
            (*weights, exists), kept = slot

            def layer(weights, kept, dy):
                return backward.first(weights, kept, dy, self.d_balance)

            def skip(weights, kept, dy):
                shapes = jax.eval_shape(layer, weights, kept, dy)[1]
                return dy, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

            return self._where(kind, exists, layer, skip, weights, kept, dy)

        return lax.scan(body, dy, (self._slots(kind, chunk), saved), reverse=True)

    def _scan_weight_backward(self, kind: str, chunk, saved, frontier):
        backward = self.backward[kind]

        def body(_, slot):
            (*weights, exists), kept, at_frontier = slot

            def layer(weights, kept, at_frontier):
                return backward.second(weights, kept, at_frontier, self.d_balance)

            def skip(weights, kept, at_frontier):
                shapes = jax.eval_shape(layer, weights, kept, at_frontier)
                return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

            return None, self._where(kind, exists, layer, skip, weights, kept, at_frontier)

        slots = (self._slots(kind, chunk), saved, frontier)
        return lax.scan(body, None, slots)[1]


class _LayerBackward:
    """A layer of one kind, forward with what is saved of it, and backward in two parts.

    What the pullback holds is the same for all layers of a kind, so that it is taken down when the
    forward is traced, and read when the backward is.
    """

    def __init__(self, kind: str, how: Pass, config: Config):
        self.kind, self.how, self.config = kind, how, config
        self.block = Block(how, kind == DENSE)
        self.structure: Any = None
        self.of_weights: list[int | None] = []
        self.parts: SplitBackward | None = None

    def forward(self, params, fixed, x, of_tokens: Tokens):
        """(y, (saved, (balance, load, rounds))). Weights are not among what is saved."""
        how = self.how

        def apply(params, x):
            variables = how.gathered(_joined(params, fixed, self.config))
            outputs: Any = self.block.apply(variables, x, of_tokens, None)
            y, _, stats = outputs
            y = how.layout.constrain(y, "batch", "residual")
            if stats is None:
                return (y, jnp.zeros(())), (jnp.zeros(0, jnp.int32), jnp.zeros(()))
            return (y, stats.balance_loss), (stats.load_E, stats.rounds.astype(jnp.float32))

        (y, balance), pull, (load, rounds) = jax.vjp(how.saving(apply), params, x, has_aux=True)
        leaves, self.structure = jax.tree.flatten(pull)
        known = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves((params, fixed)))}
        self.of_weights = [known.get(id(leaf)) for leaf in leaves]
        saved = [leaf for leaf, i in zip(leaves, self.of_weights) if i is None]
        return y, (saved, (balance, load, rounds))

    def first(self, weights, saved, dy, d_balance):
        """(dx, (gradients of weights made on the way, by their place, and the frontier))."""
        inputs = (jax.tree.leaves(weights), saved, dy, d_balance)
        self.parts = split_backward(self._pullback, *inputs)
        (dx,), early, frontier = self.parts.first(*inputs)
        return dx, (early, (frontier, dy))

    def second(self, weights, saved, frontier, d_balance):
        """The other gradients of weights, by their place."""
        assert self.parts is not None
        values, dy = frontier
        late = self.parts.second(values, jax.tree.leaves(weights), saved, dy, d_balance)
        return {i: gradient for i, gradient in enumerate(late) if gradient is not None}

    def _pullback(self, weights, saved, dy, d_balance):
        rest = iter(saved)
        leaves = [next(rest) if i is None else weights[i] for i in self.of_weights]
        d_params, dx = jax.tree.unflatten(self.structure, leaves)((dy, d_balance))
        return [dx], jax.tree.leaves(d_params)


def _joined(trained: Any, fixed: Any, config: Config) -> Any:
    """The variables of layers or ends, of what is trained and what is not."""
    base = fixed if "params" in fixed else None
    return variables_of(trained, fixed.get("router", {}), base, config)


def _zeros_in_f32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree)


def _add_leaves(tree: Any, chunk, gradients: dict[int, Any]) -> Any:
    """The tree with gradients [slots, ...] added at a chunk, by the places of its leaves."""
    leaves, structure = jax.tree.flatten(tree)
    for i, gradient in gradients.items():
        leaves[i] = leaves[i].at[chunk].add(gradient.astype(jnp.float32))
    return jax.tree.unflatten(structure, leaves)
