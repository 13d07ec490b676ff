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
from dsv3_jax.model.ends import embed_tokens, gathered_ends
from dsv3_jax.model.forward_pass import Pass, Tokens
from dsv3_jax.model.placement import shardings
from dsv3_jax.model.stack import DENSE, MOE
from dsv3_jax.model.transformer import finish, tokens_of
from dsv3_jax.parallel.pipeline import (
    Place,
    Work,
    empty_slots,
    read_slot,
    run_ticks,
    write_slot,
)
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.parallel.ticks import FORWARD, INPUT_BACKWARD, WEIGHT_BACKWARD
from dsv3_jax.training.extensions import NONE, Extensions
from dsv3_jax.training.layer_backward import LayerBackward, joined
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
from dsv3_jax.training.stages import (
    EMBEDDING,
    LOSS,
    StagePlan,
    from_stages,
    plan_stages,
    slices_from_stages,
    specs_of_layer,
    to_stages,
    work_name,
)

PIPE = PartitionSpec("pipe")


class Kept(NamedTuple):
    """What acts keep for later ones, by kind of layer: [slots, layers of a stage, ...]."""

    saved: dict[str, Any]  # by forwards, for both backward passes
    pending: dict[str, Any]  # by gradients of inputs, for those of weights


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
    edge: Callable[..., Any] = lambda op, place, x: x,
    base: dict[str, Any] | None = None,
    extensions: Extensions = NONE,
) -> tuple[LossTerms, Any]:
    """Sums over the step's micro-batches: the terms of the loss, and the gradients of the weights.

    Those are of the losses times per_token. Weights come as `step` holds them, adapters with the
    frozen `base` that they belong to. `edge` is called at the start and the end of each tick of a
    rank, as run_ticks has it, such as for time stamps (benchmarks/bench_pipeline.py).
    """
    plan = plan_stages(config)
    inside = dataclasses.replace(layout, outer=("pipe",))
    stacks, ends = held_by_ranks(variables, base, plan, inside)
    how = training_pass(config, inside, extensions)
    rank = partial(_rank, plan=plan, config=config, how=how, per_token=per_token, edge=edge)
    totals = jax.shard_map(
        rank,
        mesh=layout.mesh,
        in_specs=(PIPE, PartitionSpec(), PartitionSpec(), PartitionSpec()),
        out_specs=_lies_on(PIPE, PartitionSpec()),
        axis_names={"pipe"},
        check_vma=False,  # a pullback inside cannot say along which axes it varies
    )(stacks, ends, rows, settings)
    trained = variables["params"]
    of_layers = {
        k: slices_from_stages(totals.layers[k], trained[k], k, plan, inside)
        if inside.ranks_take_slices
        else from_stages(totals.layers[k], k, plan)
        for k in plan.layers
        if k in trained
    }
    gradients = totals.ends | of_layers
    load = {f"mtp_{depth}": of_depth for depth, of_depth in enumerate(totals.mtp_load)}
    if MOE in plan.layers:
        load[MOE] = from_stages(totals.load, MOE, plan)
    rounds = totals.rounds.sum()
    return LossTerms(totals.ce, totals.mtp, totals.balance, load, rounds), gradients


def held_by_ranks(
    variables: dict[str, Any], base: dict[str, Any] | None, plan: StagePlan, inside: Layout
) -> tuple[Any, Any]:
    """(stacks by kind, ends) as ranks hold them while they work, both as (trained, fixed).

    inside: the layout of a rank's devices.
    """
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
        for kind in plan.layers
    }

    def at_ends(tree):
        ends = {name: part for name, part in tree.items() if name not in plan.layers}
        where = shardings(ends, inside, stored=inside.gathers_each_layer)
        return inside.constrain_tree(ends, where)

    return stacks, (at_ends(trained), {name: at_ends(tree) for name, tree in fixed.items()})


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
    edge,
):
    """The totals of one rank of `pipe`, and of all ranks where they are sums over them."""
    stacks = jax.tree.map(lambda leaf: leaf[0], stacks)
    rank = Rank(stacks, ends, rows, settings, plan, config, how, per_token)
    _, batch, row_len = tokens_of_rows(rows).shape
    micro = (batch, row_len - 1, config.model.hidden_size)
    message = jax.ShapeDtypeStruct(micro, config.model.dtype)
    totals = run_ticks(
        plan.tables,
        [rank.work(*work) for work in plan.works],
        rank.zeros(),
        rank.buffers(message),
        message,
        settings.num_micro_batches,
        edge,
    )
    summed = totals._replace(layers=None, load=None, rounds=None)
    summed = jax.tree.map(lambda x: lax.psum(x, "pipe"), summed)
    return summed._replace(
        layers=jax.tree.map(lambda leaf: leaf[None], totals.layers),
        load=totals.load[None],
        rounds=lax.pmax(totals.rounds, "pipe"),
    )


class Rank:
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
        self.kinds = [kind for kind in (DENSE, MOE) if kind in plan.layers]
        self.layers = {kind: LayerBackward(kind, how, config) for kind in self.kinds}
        self.sums = {  # each device adds up the slice of a gradient that it will apply
            kind: specs_of_layer(_without_chunks(stacks[kind][0]), kind, how.layout, stored=True)
            for kind in self.kinds
        }

    def zeros(self) -> Totals:
        """Totals before the first tick."""
        model, (_, chunks, slots) = self.config.model, self.plan.layers[self.kinds[-1]].shape
        depths = model.num_nextn_predict_layers
        zero = jnp.zeros(())
        return Totals(
            {k: self._zero_sums(k) for k in self.kinds},
            self._ends_in_slices(_zeros_in_f32(self.ends)),
            *(zero, zero, zero),
            jnp.zeros((chunks, slots, model.n_routed_experts), jnp.int32),
            jnp.zeros((depths, model.n_routed_experts), jnp.int32),
            jnp.zeros(len(tokens_of_rows(self.rows))),
        )

    def buffers(self, message: jax.ShapeDtypeStruct) -> Kept:
        """Room for what the acts keep of each layer, zeros."""
        tables, kept = self.plan.tables, Kept({}, {})
        _, of_tokens = self.tokens(0)
        for kind in self.kinds:
            layer, slots = self.layers[kind], self.plan.layers[kind].shape[-1]
            weights = self.weights(kind, 0, 0)
            _, saved, stats = jax.eval_shape(layer.forward, weights, message, of_tokens)
            _, _, pending = jax.eval_shape(layer.first, weights, saved, message, stats.balance)
            kept.saved[kind] = empty_slots(saved, tables.num_saved, slots)
            kept.pending[kind] = empty_slots(pending, tables.num_pending, slots)
        return kept

    def work(self, op: int, what: str, counts) -> Work:
        """The work of an act on one of the ends, or on the layers of this kind."""
        of_layers = {
            FORWARD: self._forward,
            INPUT_BACKWARD: self._input_backward,
            WEIGHT_BACKWARD: self._weight_backward,
        }
        of_ends = {
            (FORWARD, EMBEDDING): self.embedding,
            (INPUT_BACKWARD, LOSS): self._loss,
            (INPUT_BACKWARD, EMBEDDING): self._embedding_backward,
        }
        run = partial(of_layers[op], what) if what in self.kinds else of_ends[op, what]
        return Work(op, counts, op == INPUT_BACKWARD, run, work_name(op, what))

    def _forward(self, kind: str, totals: Totals, kept: Kept, place: Place, i, x):
        """A layer's output; what the layer saved is kept."""
        chunk, m = place.chunk, place.microbatch
        _, of_tokens = self.tokens(m)
        weights = self.weights(kind, chunk, i)
        x, saved, stats = self.layers[kind].forward(weights, x, of_tokens)
        saved = write_slot(kept.saved[kind], saved, place.saved, i)
        if kind == MOE:
            totals = totals._replace(
                balance=totals.balance + stats.balance,
                load=totals.load.at[chunk, i].add(stats.load),
                rounds=totals.rounds.at[m].max(stats.rounds),
            )
        return totals, kept._replace(saved=kept.saved | {kind: saved}), x

    def _input_backward(self, kind: str, totals: Totals, kept: Kept, place: Place, i, dy):
        """The gradient of a layer's input; those of its weights that are made on the way."""
        weights = self.weights(kind, place.chunk, i)
        saved = read_slot(kept.saved[kind], place.saved, i)
        dx, early, pending = self.layers[kind].first(weights, saved, dy, self.d_balance)
        pending = write_slot(kept.pending[kind], pending, place.pending, i)
        totals = self._add_at(totals, kind, early, place.chunk, i)
        return totals, kept._replace(pending=kept.pending | {kind: pending}), dx

    def _weight_backward(self, kind: str, totals: Totals, kept: Kept, place: Place, i, x):
        """Adds the gradients of a layer's weights that are not there yet."""
        weights = self.weights(kind, place.chunk, i)
        saved = read_slot(kept.saved[kind], place.saved, i)
        pending = read_slot(kept.pending[kind], place.pending, i)
        late = self.layers[kind].second(weights, saved, pending)
        return self._add_at(totals, kind, late, place.chunk, i), kept, x

    def _zero_sums(self, kind: str) -> Any:
        def place(zeros, spec):
            return self._slice(zeros, PartitionSpec(None, None, *spec))

        return jax.tree.map(place, _zeros_in_f32(self.stacks[kind][0]), self.sums[kind])

    def _add_at(self, totals: Totals, kind: str, gradients: dict[int, Any], chunk, slot) -> Totals:
        """Totals with gradients of a layer's weights, by the places of its leaves, added."""
        leaves, structure = jax.tree.flatten(totals.layers[kind])
        specs = jax.tree.leaves(self.sums[kind], is_leaf=lambda x: isinstance(x, PartitionSpec))
        for i, gradient in gradients.items():
            part = self._slice(gradient.astype(jnp.float32), specs[i])
            total = self._slice(read_slot(leaves[i], chunk, slot) + part, specs[i])
            leaves[i] = write_slot(leaves[i], total, chunk, slot)
        layers = totals.layers | {kind: jax.tree.unflatten(structure, leaves)}
        return totals._replace(layers=layers)

    def _slice(self, gradient, spec: PartitionSpec):
        return (
            self.how.layout.place(gradient, spec) if self.how.layout.ranks_take_slices else gradient
        )

    def _ends_in_slices(self, of_ends: Any) -> Any:
        if not self.how.layout.ranks_take_slices:
            return of_ends
        where = shardings(of_ends, self.how.layout, stored=True)
        return self.how.layout.constrain_tree(of_ends, where)

    def weights(self, kind: str, chunk, i) -> Any:
        """What is trained of a layer, and what is not."""
        return read_slot(self.stacks[kind], chunk, i)

    def micro_batch(self, m) -> Rows:
        """Its rows."""
        return jax.tree.map(lambda x: x[m], self.rows)

    def tokens(self, m) -> tuple[Any, Tokens]:
        """(ids, what layers are told of them) of a micro-batch."""
        rows = self.micro_batch(m)
        segments = documents(rows, self.config)
        ids = self.how.layout.whole_rows(tokens_of_rows(rows)[:, :-1])
        return ids, tokens_of(ids, self.how, segments, real_tokens(rows))

    def all_ends(self, trained: Any = None) -> Any:
        """The parameters that no layer of a stack has."""
        trained = self.ends if trained is None else trained
        return joined(trained, self.fixed_ends, self.config)["params"]

    def _embed(self, ends, ids):
        gathered = gathered_ends(ends, self.how)
        x = embed_tokens(gathered, self.how.layout.in_order(ids), self.how)
        return self.how.layout.constrain(x, "batch", "residual")

    def embedding(self, totals: Any, kept: Any, place: Place, i, x):
        """The work of the first stage before its layers."""
        ids, _ = self.tokens(place.microbatch)
        return totals, kept, self._embed(self.all_ends(), ids).astype(x.dtype)

    def _embedding_backward(self, totals: Totals, kept: Kept, place: Place, i, dx):
        if not totals.ends:  # those of adapters are frozen
            return totals, kept, dx
        ids, _ = self.tokens(place.microbatch)
        name = "embed_tokens"
        _, pull = jax.vjp(
            lambda table: self._embed(self.ends | {name: table}, ids), self.ends[name]
        )
        (d_table,) = pull(dx)
        ends = totals.ends | {name: totals.ends[name] + self._ends_in_slices({name: d_table})[name]}
        return totals._replace(ends=ends), kept, dx

    def _loss(self, totals: Totals, kept: Kept, place: Place, i, y):
        """The loss of a micro-batch from the last layer's output, and the gradients of both."""
        m = place.microbatch
        rows, (ids, of_tokens) = self.micro_batch(m), self.tokens(m)

        def of_output(ends, y):
            params = gathered_ends(self.all_ends(ends), self.how)
            variables = {"params": params, "router": self.fixed_ends["router"]}
            states = finish(variables, y, ids, of_tokens, self.how)
            weight, segments = self.settings.mtp_loss_weight, documents(rows, self.config)
            nats, ce, mtp = prediction_nats(params, states, rows, weight, segments, self.how)
            stats = states.mtp_stats
            balance = sum((s.balance_loss.sum() for s in stats), jnp.zeros(()))
            loss = nats + self.alpha * balance
            load = jnp.stack([s.load_E for s in stats]) if stats else totals.mtp_load
            rounds = jnp.stack([s.rounds for s in stats]).max() if stats else jnp.zeros(())
            return loss * self.per_token, (ce, mtp, balance, load, rounds.astype(jnp.float32))

        gradient = jax.value_and_grad(of_output, argnums=(0, 1), has_aux=True)
        (_, (ce, mtp, balance, load, rounds)), (d_ends, dy) = gradient(self.ends, y)
        totals = totals._replace(
            ends=jax.tree.map(jnp.add, totals.ends, self._ends_in_slices(_in_f32(d_ends))),
            ce=totals.ce + ce,
            mtp=totals.mtp + mtp,
            balance=totals.balance + balance,
            mtp_load=totals.mtp_load + load,
            rounds=totals.rounds.at[m].max(rounds),
        )
        return totals, kept, dy


def _zeros_in_f32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree)


def _in_f32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _without_chunks(stack: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stack)
