"""What a run is and what it runs on, in a few lines."""

import dataclasses
import importlib
import sys

import jax

from dsv3_jax.analysis.hardware import peak_bf16_flops
from dsv3_jax.config import Config
from dsv3_jax.parallel.compiler_options import overlap_options, rounding_line
from dsv3_jax.training.dry_run import parameter_counts
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.state import TrainState

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax.checkpoint", "numpy")


def banner(config: Config, abstract: TrainState) -> list[str]:
    """Backend, versions, mesh, parameters, what MFU is measured by, and the run's folder."""
    main_model, mtp = parameter_counts(abstract)
    devices = jax.devices()
    kind, processes = devices[0].device_kind, jax.process_count()
    versions = [f"{p.split('.')[0]} {_version(p)}" for p in PACKAGES]
    mesh = ", ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(config.mesh).items())
    peak = peak_bf16_flops(kind)
    return [
        f"backend     {jax.default_backend()}, {len(devices)} x {kind}"
        + (f", {processes} processes" if processes > 1 else ""),
        f"versions    python {sys.version.split()[0]}, " + ", ".join(versions),
        f"mesh        {mesh}",
        f"parameters  {main_model:,} in the main model, {mtp:,} more in MTP",
        f"mfu         of {peak / 1e12:,.1f} TFLOP/s, a device's dense BF16 peak; MTP counts"
        if peak
        else f"mfu         none: the peak of {kind} is not known",
        *_products_line(config),
        *_weights_line(config),
        *_warmup_line(config),
        *_overlap_line(config),
        f"run         {config.run_dir}, seed {config.seed}",
    ]


def _products_line(config: Config) -> list[str]:
    """Where a float32 model is not multiplied in float32."""
    line = rounding_line(jax.default_backend(), config.model.dtype)
    return [f"products    {line}"] if line else []


def _weights_line(config: Config) -> list[str]:
    """Where FP8 weights are not those of the float32 master: copies of it are gathered (FSDP)."""
    copied = config.mesh.pipe > 1 or config.mesh.tensor > 1
    if config.sharding.state != "fsdp" or config.quant.preset == "bf16" or not copied:
        return []
    return [
        f"weights     gathered in {config.model.dtype}, as mesh.pipe or mesh.tensor is over 1: FP8 "
        "products quantise that copy"
    ]


def _overlap_line(config: Config) -> list[str]:
    """What XLA is told besides where halves of a micro-batch go in opposite phases."""
    if not config.expert_parallel.overlap:
        return []
    told = [f"{name}={value}" for name, value in overlap_options(jax.default_backend()).items()]
    line = "overlap     halves of each micro-batch in opposite phases"
    return [line + (f"; XLA is told {', '.join(told)}" if told else "")]


def _warmup_line(config: Config) -> list[str]:
    """Where the run ends before its learning rate is what was asked for."""
    warmup, steps = config.schedule.warmup_steps, config.schedule.steps or config.train.steps
    if warmup <= steps:
        return []
    rate = config.optimizer.learning_rate * steps / warmup
    return [
        f"warm-up     schedule.warmup_steps={warmup} of {steps} steps: the learning rate comes to "
        f"{rate:.3g} at most, not to {config.optimizer.learning_rate:.3g}"
    ]


def batch_line(config: Config, schedule: Schedule, start: int | None) -> str:
    """How many rows a step reads, and in how many passes."""
    first, last, micro = (
        schedule.rows(start or 0),
        config.train.batch_size,
        schedule.micro_batch_size,
    )
    line = f"batch       {last} rows of {config.train.seq_len} tokens"
    if first < last:
        line = f"batch       {first} rows of {config.train.seq_len} tokens, growing to {last}"
    line += f", {micro} a pass"
    if not start and first == last and config.schedule.batch_start_ratio < 1:
        line += (
            f": schedule.batch_start_ratio={config.schedule.batch_start_ratio:g} has no effect, "
            "as a step cannot read less than that"
        )
    return line


def _version(package: str) -> str:
    return getattr(importlib.import_module(package), "__version__", "?")
