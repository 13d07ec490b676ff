"""How a run is spread over devices and processes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.rules import UserError, require_positive, round_up


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes, slowest link first; the product is the number of devices used."""

    pipe: int = 1
    data: int = 1  # 0: as many as the other axes leave and as divide the batch
    node: int = 1
    local: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def num_devices(self) -> int:
        """Devices the mesh takes, with data=0 counted as 1."""
        return math.prod(max(size, 1) for size in dataclasses.astuple(self))

    def problems(self) -> list[str]:
        """What is wrong with the axis sizes."""
        found: list[str] = []
        if self.data < 0:
            found.append(f"data={self.data} must be positive, or 0 for all devices that are left")
        others = [f.name for f in dataclasses.fields(self) if f.name != "data"]
        require_positive(found, self, others)
        return found

    def check_model(self, model: ModelConfig) -> None:
        """UserError, with all reasons, when this mesh cannot hold the model."""
        if found := [f"mesh.{p}" for p in self.problems()] or self.indivisible(model):
            raise UserError("the mesh does not fit the model:\n  - " + "\n  - ".join(found))

    def indivisible(self, model: ModelConfig, redundant_experts: int = 0) -> list[str]:
        """Dims of the model that their mesh axes do not divide."""
        found: list[str] = []
        sizes = {"num_attention_heads": model.num_attention_heads, "vocab_size": model.vocab_size}
        if model.num_dense_layers:
            sizes["intermediate_size"] = model.intermediate_size
        if model.n_shared_experts:
            width = model.n_shared_experts * model.moe_intermediate_size
            sizes["n_shared_experts x moe_intermediate_size"] = width
        for name, size in sizes.items():
            if size % self.tensor:
                found.append(
                    f"model.{name}={size} must be a multiple of mesh.tensor={self.tensor}: use "
                    f"mesh.tensor={math.gcd(size, self.tensor)} or {round_up(size, self.tensor)}"
                )
        expert_shards = self.node * self.local
        places = model.n_routed_experts + redundant_experts
        if places % expert_shards:
            more = f" and {redundant_experts} redundant ones" if redundant_experts else ""
            found.append(
                f"model.n_routed_experts={model.n_routed_experts}{more} must be a multiple of "
                f"mesh.node x mesh.local = {expert_shards}: use mesh.node x mesh.local = "
                f"{math.gcd(places, expert_shards)}"
            )
        return found


@dataclass(frozen=True)
class ShardingConfig:
    """How the state and the sequence are spread over a mesh, beyond the sizes of its axes."""

    # What devices that compute with the same weight hold between steps. zero1: a slice each of the
    # master weight and its moments; weights are gathered once a step. fsdp: the same slices, but
    # each layer is gathered when it runs and its gradient goes back at once. replicated: all of it.
    state: Literal["zero1", "fsdp", "replicated"] = "zero1"
    # Over mesh.context. allgather: every device gets the latents of the whole sequence. ring: they
    # travel around, and a device has an early and a late piece of the sequence for equal work.
    context: Literal["allgather", "ring"] = "allgather"


@dataclass(frozen=True)
class ExpertParallelConfig:
    """How tokens reach experts on other devices and come back (docs/parallelism.md)."""

    # local: every device holds all experts. allgather: everybody sees all tokens. padded: buffers
    # of a fixed size for each peer. ragged: as padded, but only the rows in use are sent. pallas:
    # GPUs of one host read each other's rows over NVLink, in the last hop. auto: the faster.
    transport: Literal["auto", "local", "allgather", "padded", "ragged", "pallas"] = "allgather"
    multiprocessors: int = 20  # of a GPU that transport "pallas" may use
    # Shared experts in FP8 run on a second stream of a GPU while rows travel by "pallas". On four
    # H200s a layer's forward pass is 1 % faster so, and training as fast as without.
    shared_beside: bool = False
    # Each device's rows of a micro-batch are cut in two: while one half's tokens travel to their
    # experts or back, the other half is computed. Changes the order of work and sums, no more. An
    # earlier form was 3 % slower on four H200s; this one has not run on GPUs (docs/log.md).
    overlap: bool = False
    # True: a token goes to each node once and is handed on there; False: straight to each device.
    hierarchical: bool = True
    capacity_factor: float = 2.0  # rows that buffers hold, over those of an even load
    # What happens to rows that do not fit. rounds: they are sent in further rounds, whose loop
    # stands behind the first; loop: it has the first in it, too, for half the program, and nothing
    # beside it; error: the output is NaN, so that the step is not applied. None is ever left out.
    overflow: Literal["rounds", "loop", "error"] = "rounds"
    # On the wire: tokens to experts (forward) and their gradients (backward), and the way back.
    dispatch_format: Literal["none", "fp8"] = "none"
    combine_format: Literal["none", "bf16", "logfmt10"] = "none"

    def problems(self) -> list[str]:
        """What is wrong with the options of the exchange."""
        found: list[str] = []
        require_positive(found, self, ["capacity_factor", "multiprocessors"])
        return found

    def not_overlapped(
        self, mesh: ParallelConfig, micro_batch_size: int, moe_layers: int
    ) -> list[str]:
        """Why training cannot have `overlap`, each with the nearest that works."""
        found: list[str] = []
        if not self.overlap:
            return found
        wanted = "expert_parallel.overlap lays the exchange of one half over the work of the other"
        if mesh.node * mesh.local == 1 or not moe_layers:
            return [
                f"{wanted}, but mesh.node x mesh.local = {mesh.node * mesh.local} and "
                f"{moe_layers} MoE layers exchange nothing: use --mesh.local 2 or more, or "
                "--expert-parallel.no-overlap"
            ]
        if self.transport in ("auto", "pallas"):
            found.append(
                f"{wanted}, but transport={self.transport!r} "
                + ("may be 'pallas', which " if self.transport == "auto" else "")
                + "moves rows by kernels that take turns with the others: use "
                "--expert-parallel.transport padded"
            )
        if self.overflow == "loop":
            found.append(
                f"{wanted}, but overflow='loop' has exchange and products in a loop, in which no "
                "attention lies: use --expert-parallel.overflow rounds"
            )
        rows = 2 * max(mesh.data, 1) * mesh.node * mesh.local
        if micro_batch_size % rows:
            found.append(
                f"{wanted}, so a micro-batch of {micro_batch_size} sequences must be a multiple of "
                f"2 x mesh.data x mesh.node x mesh.local = {rows}: use --train.micro-batch-size "
                f"{round_up(micro_batch_size, rows)}, or --expert-parallel.no-overlap"
            )
        return found


# Schedules in which weights' gradients wait for a bubble; dualpipe is one of the cost models alone.
APART = ("zb1p", "dualpipe", "dualpipev")


@dataclass(frozen=True)
class PipelineConfig:
    """How micro-batches go through the stages on the ranks of mesh.pipe (docs/parallelism.md)."""

    # 1f1b: one forward, one backward in turn. eager_1f1b: with twice as many forwards first, all
    # ranks do the same at a time and none waits for another's longer act; twice the activations.
    # interleaved: 1f1b with two stages a rank, half the bubble and more activations. zb1p: weights'
    # gradients fill the bubble. dualpipev: two stages a rank, folded into a V, the smallest bubble;
    # the paper's DualPipe with one copy of the weights.
    schedule: Literal["1f1b", "eager_1f1b", "interleaved", "zb1p", "dualpipev"] = "1f1b"
    # Ranks meet after each act. apart: the gradient of the input and that of the weights are two
    # acts; whole: one act, with a third fewer meetings, which zb1p and dualpipev cannot; auto:
    # whole where the schedule can. apart is faster where the weights' gradient takes more than
    # about half of a forward, and keeps what it reads until its act.
    backward: Literal["auto", "apart", "whole"] = "auto"
    # Where these are two acts: whether those of FP8 products and routed experts are, too. They fill
    # bubbles then, and what they read waits for them, as many times as there are ranks.
    experts_apart: bool = True

    @property
    def stages_per_rank(self) -> int:
        """How many stages each rank holds."""
        return 2 if self.schedule in ("interleaved", "dualpipev") else 1

    def takes_backward_whole(self, schedule: str = "") -> bool:
        """Whether both gradients are one act; under another schedule, if one is given."""
        return self.backward != "apart" and (schedule or self.schedule) not in APART

    def takes_experts_apart(self, schedule: str = "") -> bool:
        """Whether gradients inside of shard_maps are two acts; the schedule as above."""
        return self.experts_apart and not self.takes_backward_whole(schedule)

    def misfits(self, ranks: int, microbatches: int, layers: int) -> list[str]:
        """Why so many ranks cannot run the schedule, each with the nearest that works."""
        found: list[str] = []
        if ranks == 1:
            return found
        stages = ranks * self.stages_per_rank
        if stages > layers + 1:
            nearest = (layers + 1) // self.stages_per_rank
            found.append(
                f"mesh.pipe={ranks} under {self.schedule} needs {stages} stages, but "
                f"model.num_hidden_layers={layers} fill {layers}, and the last may have the head "
                f"alone: use mesh.pipe={nearest} or less"
            )
        if self.backward == "whole" and self.schedule in APART:
            found.append(
                f"pipeline.backward='whole', but {self.schedule} takes backward passes apart: use "
                "--pipeline.backward apart, or --pipeline.schedule 1f1b"
            )
        of_batch = f"train.batch_size / micro_batch_size = {microbatches} micro-batches"
        if self.schedule == "dualpipev" and microbatches < 2 * ranks:
            found.append(
                f"dualpipev needs at least 2 x mesh.pipe = {2 * ranks} micro-batches, but there "
                f"are {of_batch}: use {2 * ranks}, or --pipeline.schedule zb1p"
            )
        if self.schedule == "interleaved" and microbatches % ranks:
            found.append(
                f"interleaved takes micro-batches in groups of mesh.pipe={ranks}, but there are "
                f"{of_batch}: use {round_up(microbatches, ranks)}, or --pipeline.schedule 1f1b"
            )
        return found


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run on several hosts, one on each, find and watch each other.

    Under SLURM's srun everything is found out; under Kubernetes JobSet everything but the number of
    processes is (launch/). What is given here goes before what is found.
    """

    coordinator: str | None = None  # HOST:PORT of process 0, reachable from all
    num_processes: int | None = None
    process_id: int | None = None  # 0 to num_processes - 1
    start_timeout: int = 300  # seconds until all processes must have started
    heartbeat_timeout: int = 100  # seconds without a sign of life until the others end

    def problems(self) -> list[str]:
        """What is wrong with the numbers of processes."""
        found: list[str] = []
        require_positive(found, self, ["start_timeout", "heartbeat_timeout"])
        if self.num_processes is not None and self.num_processes <= 0:
            found.append(f"num_processes={self.num_processes} must be positive")
        if self.process_id is not None and self.process_id < 0:
            found.append(f"process_id={self.process_id} must not be negative")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            found.append(f"coordinator={self.coordinator!r} must be HOST:PORT")
        return found
