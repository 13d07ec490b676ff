"""Which layers each stage of a pipeline has, and weights as its ranks hold them while they work.

A run's state is the same with and without a pipeline: stacks of layers, held in slices by all
devices. For a step each rank gets the layers of its stages. Stages differ in how many they have, so
that each rank has slots for the most that one has; what lies in a slot without a layer is not read.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Int

from dsv3_jax.analysis.memory import split_into_stages
from dsv3_jax.config import Config
from dsv3_jax.model.placement import shardings
from dsv3_jax.model.stack import DENSE, MOE
from dsv3_jax.parallel.schedules import PipelineSchedule, make_schedule
from dsv3_jax.parallel.sharding import Layout, axes_of
from dsv3_jax.parallel.ticks import (
    FORWARD,
    INPUT_BACKWARD,
    WEIGHT_BACKWARD,
    TickTables,
    stages_of_rank,
    tick_tables,
)

ACTS = {FORWARD: "forward", INPUT_BACKWARD: "input_gradient", WEIGHT_BACKWARD: "weight_gradients"}
NO_LAYER = -1
EMBEDDING, LOSS = "embedding", "loss"


@dataclass(frozen=True, eq=False)
class StagePlan:
    """A pipeline's schedule, and the layers of its stages.

    Fields:
        schedule, tables: what runs when.
        stages: [ranks, chunks], the stage of each.
        layers: for each kind of layer its numbers in the stack, [ranks, chunks, slots], NO_LAYER
            in a slot without one, which are the last; kinds that the model has not are left out.
    """

    schedule: PipelineSchedule
    tables: TickTables
    stages: Int[np.ndarray, "R V"]
    layers: dict[str, Int[np.ndarray, "R V slots"]]

    @property
    def works(self) -> list[tuple[int, str, Int[np.ndarray, "R V"]]]:
        """What acts consist of, in order: (op, what it is on, how often each stage has that)."""
        kinds = [(kind, (numbers != NO_LAYER).sum(-1)) for kind, numbers in self.layers.items()]
        first = (EMBEDDING, (self.stages == 0).astype(np.int64))
        last = (LOSS, (self.stages == self.stages.max()).astype(np.int64))
        acts = {
            FORWARD: [first, *kinds],
            INPUT_BACKWARD: [last, *reversed(kinds), first],
            WEIGHT_BACKWARD: kinds,
        }
        return [(op, *work) for op, of_act in acts.items() for work in of_act]

    def turns_of_ticks(self) -> dict[str, float]:
        """How often the loop over each work turns in a tick, by its name; the mean of all ranks."""
        num_ticks, num_ranks = self.tables.op.shape
        often = self.schedule.num_microbatches / (num_ticks * num_ranks)
        return {work_name(op, what): int(n.sum()) * often for op, what, n in self.works}


def work_name(op: int, what: str) -> str:
    """What the loop over a work is called in a program."""
    return f"{ACTS[op]}_of_{what}"


@functools.lru_cache(maxsize=8)
def plan_stages(config: Config) -> StagePlan:
    """The plan of a run: stages of about equal cost, in the order of the model.

    The embedding is in the first, final norm, head and MTP modules are in the last. `Config`'s
    checks name what does not fit.
    """
    ranks, model = config.mesh.pipe, config.model
    microbatches = config.train.batch_size // config.micro_batch_size
    schedule = make_schedule(config.pipeline.schedule, ranks, microbatches)
    stages = np.array([stages_of_rank(schedule, rank) for rank in range(ranks)], np.int32)
    counts = split_into_stages(model, schedule.num_stages)
    layers = {}
    for kind, total, of_stage in (
        (DENSE, model.num_dense_layers, [stage.dense_layers for stage in counts]),
        (MOE, model.num_moe_layers, [stage.moe_layers for stage in counts]),
    ):
        assert sum(of_stage) == total
        if total:
            numbers = np.full((len(of_stage), max(of_stage)), NO_LAYER, np.int32)
            first = np.cumsum([0, *of_stage])
            for stage, count in enumerate(of_stage):
                numbers[stage, :count] = np.arange(first[stage], first[stage] + count)
            layers[kind] = numbers[stages]
    tables = tick_tables(schedule, config.pipeline.takes_backward_whole())
    return StagePlan(schedule, tables, stages, layers)


def to_stages(tree: Any, kind: str, plan: StagePlan, layout: Layout) -> Any:
    """A stack's leaves [L, ...] as [ranks, chunks, slots, ...], each rank's on its devices.

    layout: of a rank's devices. Each device sends every rank its slice of that rank's layers; XLA,
    asked for the layers of slices, would make whole stacks everywhere.
    """
    numbers = np.maximum(plan.layers[kind], 0)
    used = specs_of_layer(tree, kind, layout, stored=layout.gathers_each_layer)

    def of_ranks(leaf, of_state, of_rank, spec):
        if not layout.ranks_take_slices:
            return layout.place(leaf[numbers], PartitionSpec("pipe", None, None, *spec))
        take = functools.partial(_taken, numbers=numbers, dim=_dim_of_pipe(of_state))
        there = PartitionSpec("pipe", None, None, *of_rank[1:])
        sliced = _on_all(take, layout, of_state, there)(leaf)
        return layout.place(sliced, PartitionSpec("pipe", None, None, *spec))

    return jax.tree.map(of_ranks, tree, *_slices(tree, kind, layout), used)


def from_stages(tree: Any, kind: str, plan: StagePlan) -> Any:
    """Undoes `to_stages`: leaves [ranks, chunks, slots, ...] as [L, ...]."""
    order = _order(plan, kind)
    return jax.tree.map(lambda leaf: _in_runs(leaf.reshape(-1, *leaf.shape[3:]), order), tree)


def slices_from_stages(tree: Any, like: Any, kind: str, plan: StagePlan, layout: Layout) -> Any:
    """`from_stages` of leaves in slices of a rank's devices; as the state's, `like`, lie after."""
    order = _order(plan, kind)

    def of_all(leaf, of_state, of_rank):
        give = functools.partial(_given_back, order=order, dim=_dim_of_pipe(of_state))
        here = PartitionSpec("pipe", None, None, *of_rank[1:])
        return _on_all(give, layout, here, of_state)(leaf)

    return jax.tree.map(of_all, tree, *_slices(like, kind, layout))


def _in_runs(leaf, numbers: np.ndarray):
    """leaf[numbers] as slices of neighbours: XLA of jax 0.11 aborts at the gather, where `pipe`
    cuts the dim and other axes others (spmd_partitioner_util.cc, AlignGroupsWith)."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    parts = [jax.lax.slice_in_dim(leaf, int(run[0]), int(run[-1]) + 1) for run in runs]
    return jnp.concatenate(parts)


def _order(plan: StagePlan, kind: str) -> np.ndarray:
    """The place of each layer of the stack among [ranks, chunks, slots], as one dim."""
    numbers = plan.layers[kind].reshape(-1)
    (places,) = np.nonzero(numbers != NO_LAYER)
    return places[np.argsort(numbers[places])]


def _slices(tree: Any, kind: str, layout: Layout) -> tuple[Any, Any]:
    """How a stack's slices lie on all devices, and on a rank's: specs of [L, ...]."""
    both = dataclasses.replace(layout, outer=()), layout
    found = (shardings({kind: tree}, each, stored=True)[kind] for each in both)
    of_state, of_rank = (jax.tree.map(lambda sharding: sharding.spec, each) for each in found)
    return of_state, of_rank


def _on_all(function, layout: Layout, here: PartitionSpec, there: PartitionSpec):
    return jax.shard_map(
        function, mesh=layout.mesh, in_specs=(here,), out_specs=there, check_vma=False
    )


def _dim_of_pipe(spec: PartitionSpec) -> int | None:
    """The dim that `pipe` cuts, the last of its axes."""
    return next((dim for dim, axes in enumerate(spec) if "pipe" in axes_of(axes)), None)


def _taken(leaf, numbers: np.ndarray, dim: int | None):
    stages = leaf[numbers]
    if dim is None:
        return jax.lax.dynamic_index_in_dim(stages, jax.lax.axis_index("pipe"), 0)
    return jax.lax.all_to_all(stages, "pipe", 0, dim + 2, tiled=True)


def _given_back(leaf, order: np.ndarray, dim: int | None):
    if dim is None:
        leaf = jax.lax.all_gather(leaf, "pipe", axis=0, tiled=True)
    else:
        leaf = jax.lax.all_to_all(leaf, "pipe", dim + 2, 0, tiled=True)
    return leaf.reshape(-1, *leaf.shape[3:])[order]


def specs_of_layer(tree: Any, kind: str, layout: Layout, stored: bool) -> Any:
    """How a layer of a stack [L, ...] lies on its rank's devices, each leaf's PartitionSpec."""
    of_stack = shardings({kind: tree}, layout, stored=stored)[kind]
    return jax.tree.map(lambda sharding: PartitionSpec(*sharding.spec[1:]), of_stack)
