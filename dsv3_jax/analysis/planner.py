"""Searches meshes, schedules and micro-batches for a model on a cluster; returns the best few.

Exhaustive over the divisors. Pipelines are ranked by their published bubbles, and the front runners
simulated, so a plan is never better than what `estimate` says of it. Candidates that do not fit the
model or the memory are counted by reason and dropped.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from dsv3_jax.analysis.estimate import DEFAULT_EFFICIENCY, Efficiency, StepEstimate, estimate_step
from dsv3_jax.analysis.hardware import Accelerator
from dsv3_jax.analysis.serving import DecodeEstimate, estimate_decode
from dsv3_jax.config import Config, ParallelConfig, PipelineConfig, UserError

Goal = Literal["training", "tpot"]
# Left free for the runtime, fragmentation and communication buffers.
USABLE_MEMORY = 0.92
# Tensor parallelism is not tried below this many columns of an expert: the estimate gives every
# matmul the same efficiency, which narrow ones do not reach.
MIN_SHARD_WIDTH = 512


# Schedules that training runs; the others are only estimated.
EXECUTED = get_args(get_type_hints(PipelineConfig)["schedule"])


@dataclass(frozen=True)
class Plan:
    """One way to use the cluster, and what it gives."""

    mesh: ParallelConfig
    schedule: str
    micro_batch_size: int
    remat: str
    batch: int  # requests a device, when decoding
    estimate: StepEstimate | DecodeEstimate
    state: str = "zero1"  # sharding.state

    @property
    def score(self) -> float:
        """Higher is better: tokens a second, of the mesh or (decoding) of a request."""
        if isinstance(self.estimate, DecodeEstimate):
            return self.estimate.tokens_per_second_per_request
        return self.estimate.tokens_per_second

    @property
    def executed(self) -> bool:
        """Whether training runs its schedule, so that `configured` says all of it."""
        return self.mesh.pipe == 1 or self.schedule in EXECUTED

    def configured(self, config: Config) -> Config:
        """A run's config with this plan for training in it."""
        return _configured(
            config, self.mesh, self.schedule, self.state, self.micro_batch_size, self.remat
        )


@dataclass(frozen=True)
class Search:
    """The plans found, best first, and how many candidates fell to which reason."""

    plans: list[Plan]
    tried: int
    dropped: dict[str, int]


def plan_training(
    config: Config,
    device: Accelerator,
    devices: int,
    best: int = 5,
    efficiency: Efficiency = DEFAULT_EFFICIENCY,
) -> Search:
    """The fastest ways to train config.model with its batch size on `devices` devices.

    Searches pipe, data, node, local and tensor (context stays as configured), the schedules, ZeRO-1
    and (without a pipeline) FSDP, 1 to 4 sequences a device and micro-batch, and rematerialisation.
    UserError when nothing fits.
    """
    dropped: Counter[str] = Counter()
    plans, tried = [], 0
    for mesh in _meshes(config, device, devices):
        shards = mesh.data * mesh.node * mesh.local
        for schedule, state, sequences in _ways(mesh):
            micro = sequences * shards
            if config.train.batch_size % micro:
                dropped["batch is not a multiple of the micro-batch"] += 1
                continue
            for remat in ("none", "dots", "v3", "full"):
                tried += 1
                candidate = _configured(config, mesh, schedule, state, micro, remat)
                try:
                    made = estimate_step(candidate, device, schedule, efficiency, simulated=False)
                except UserError:
                    dropped["mesh, schedule and model do not fit"] += 1
                    break
                if made.memory.total > USABLE_MEMORY * device.hbm_bytes:
                    dropped["memory"] += 1
                    continue
                plans.append(Plan(mesh, schedule, micro, remat, 0, made, state))
                break  # more rematerialisation only costs time
    search = _best(plans, tried, dropped, 4 * best)
    exact = [_simulated(config, device, plan, efficiency) for plan in search.plans]
    return _best(exact, tried, dropped, best)


def _configured(
    config: Config, mesh: ParallelConfig, schedule: str, state: str, micro: int, remat: str
) -> Config:
    train: Any = {"micro_batch_size": micro, "remat": remat}
    sharding: Any = {"state": state}
    pipeline: Any = {}
    if schedule in EXECUTED:
        pipeline = {"schedule": schedule}
    return dataclasses.replace(
        config,
        mesh=mesh,
        train=dataclasses.replace(config.train, **train),
        sharding=dataclasses.replace(config.sharding, **sharding),
        pipeline=dataclasses.replace(config.pipeline, **pipeline),
    )


def _ways(mesh: ParallelConfig) -> Iterator[tuple[str, str, int]]:
    """(schedule, sharding.state, sequences a device and micro-batch) that a mesh is tried with."""
    schedules = ("1f1b", "zb1p", "dualpipe", "dualpipev") if mesh.pipe > 1 else ("1f1b",)
    # A pipeline's ranks hold their stages for the whole step.
    states = ("zero1",) if mesh.pipe > 1 else ("zero1", "fsdp")
    yield from itertools.product(schedules, states, (1, 2, 4))


def _simulated(config: Config, device: Accelerator, plan: Plan, efficiency: Efficiency) -> Plan:
    """The plan with its pipeline simulated in place of the formula."""
    made = estimate_step(plan.configured(config), device, plan.schedule, efficiency)
    return dataclasses.replace(plan, estimate=made)


def plan_decoding(
    config: Config,
    device: Accelerator,
    devices: int,
    batch: int,
    context: int,
    best: int = 5,
    efficiency: Efficiency = DEFAULT_EFFICIENCY,
) -> Search:
    """The meshes with the shortest time per output token for `batch` requests on all devices.

    Searches node, local and tensor; each data-parallel device takes an equal share of the batch.
    Replicas of the whole group ("data") divide it too.
    """
    dropped: Counter[str] = Counter()
    plans, tried = [], 0
    for mesh in _meshes(config, device, devices):
        if mesh.pipe > 1:
            continue
        tried += 1
        each, left = divmod(batch, devices // mesh.tensor)
        if left or not each:
            dropped["batch does not spread evenly over the devices"] += 1
            continue
        # mesh_problems also checks the training batch, which decoding does not use.
        train = dataclasses.replace(config.train, batch_size=devices, micro_batch_size=None)
        candidate = dataclasses.replace(config, mesh=mesh, train=train)
        try:
            made = estimate_decode(candidate, device, each, context, efficiency)
        except UserError:
            dropped["mesh and model do not fit"] += 1
            continue
        if made.memory.total > USABLE_MEMORY * device.hbm_bytes:
            dropped["memory"] += 1
            continue
        plans.append(Plan(mesh, "decode", 0, "none", each, made))
    return _best(plans, tried, dropped, best)


def _best(plans: list[Plan], tried: int, dropped: Counter[str], best: int) -> Search:
    if not plans:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in dropped.most_common(4))
        raise UserError(f"none of {tried} candidates fits: {reasons or 'no mesh has that size'}")
    # Among equals, fewer axes and the experts of a node together.
    plans.sort(key=lambda p: (-p.score, p.mesh.tensor, p.mesh.pipe, -p.mesh.local))
    return Search(plans[:best], tried, dict(dropped))


def _meshes(config: Config, device: Accelerator, devices: int) -> Iterator[ParallelConfig]:
    """Every mesh of exactly `devices` devices whose inner axes stay within a scale-up domain."""
    if devices < 1:
        raise UserError(f"{devices=} must be positive")
    context = config.mesh.context
    if devices % context:
        raise UserError(f"mesh.context={context} must divide {devices=}")
    rest = devices // context
    for pipe in _divisors(rest):
        if pipe > config.model.num_hidden_layers:
            continue
        for tensor in _divisors(rest // pipe):
            width = config.model.moe_intermediate_size // tensor
            if tensor > 1 and width < MIN_SHARD_WIDTH:
                continue
            for local in _divisors(rest // pipe // tensor):
                if local * tensor * context > device.scale_up_domain or tensor > 8:
                    continue
                for node in _divisors(rest // pipe // tensor // local):
                    if config.model.n_routed_experts % (node * local):
                        continue
                    data = rest // (pipe * tensor * local * node)
                    yield ParallelConfig(pipe, data, node, local, context, tensor)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
