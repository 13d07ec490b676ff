"""Which layers each stage of a pipeline has, and weights as its ranks hold them while they work.

A run's state is the same with and without a pipeline: stacks of layers, held in slices by all
devices. For a step each rank gets the layers of its stages. Stages differ in how many they have, so
that each rank has slots for the most that one has; what lies in a slot without a layer is not read.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Int

from dsv3_jax.analysis.memory import split_into_stages
from dsv3_jax.config import Config
from dsv3_jax.model.placement import shardings
from dsv3_jax.model.stack import DENSE, MOE
from dsv3_jax.parallel.schedules import PipelineSchedule, make_schedule
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.parallel.ticks import (
    FORWARD,
    INPUT_BACKWARD,
    WEIGHT_BACKWARD,
    TickTables,
    stages_of_rank,
    tick_tables,
)

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
    tables = tick_tables(schedule, config.pipeline.backward == "whole")
    return StagePlan(schedule, tables, stages, layers)


def to_stages(tree: Any, kind: str, plan: StagePlan, layout: Layout) -> Any:
    """A stack's leaves [L, ...] as [ranks, chunks, slots, ...], each rank's on its devices."""
    numbers = np.maximum(plan.layers[kind], 0)
    where = specs_of_layer(tree, kind, layout, stored=layout.gathers_each_layer)
    return jax.tree.map(
        lambda leaf, spec: layout.place(leaf[numbers], PartitionSpec("pipe", None, None, *spec)),
        tree,
        where,
    )


def from_stages(tree: Any, kind: str, plan: StagePlan) -> Any:
    """Undoes `to_stages`: leaves [ranks, chunks, slots, ...] as [L, ...]."""
    numbers = plan.layers[kind].reshape(-1)
    (places,) = np.nonzero(numbers != NO_LAYER)
    order = places[np.argsort(numbers[places])]
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:])[order], tree)


def specs_of_layer(tree: Any, kind: str, layout: Layout, stored: bool) -> Any:
    """How a layer of a stack [L, ...] lies on its rank's devices, each leaf's PartitionSpec."""
    of_stack = shardings({kind: tree}, layout, stored=stored)[kind]
    return jax.tree.map(lambda sharding: PartitionSpec(*sharding.spec[1:]), of_stack)
