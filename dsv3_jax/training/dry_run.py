"""What a run would take, without running it: shapes, parameters and memory per device."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dsv3_jax.analysis.prediction import predict
from dsv3_jax.config import Config
from dsv3_jax.data.checks import problems
from dsv3_jax.model.placement import shardings
from dsv3_jax.parallel.picture import draw
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.training.continuation import refusal
from dsv3_jax.training.manifest import steps_in
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.state import TrainState, abstract_state
from dsv3_jax.training.step_program import lowered_step

# One weight of each kind of cut, shown in the report.
DRAWN = ("lm_head", "moe_layers/self_attn/o_proj", "moe_layers/mlp/experts/down_proj")


def count_parameters(tree: Any) -> int:
    """Elements of all leaves, arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def parameter_counts(state: TrainState) -> tuple[int, int]:
    """Parameters of the main model, router biases included, and those that only MTP has."""
    trees = (state.params, state.router)
    mtp = sum(
        count_parameters(sub) for tree in trees for name, sub in tree.items() if name[:4] == "mtp_"
    )
    return count_parameters(trees) - mtp, mtp


def dry_run_report(config: Config, layout: Layout, base: Any = None) -> str:
    """A text: every parameter's shape, the counts, and memory per device by XLA's own analysis.

    `base` is what a LoRA run's adapters belong to, as shapes (`frozen.abstract_base`).
    """
    state = abstract_state(config, layout)
    lines = ["parameters"]
    for tree in (state.params, state.router):
        for name, leaf in _by_name(tree).items():
            line = f"  {name:<52} {leaf.dtype!s:>8} {list(leaf.shape)!s:<24}"
            if not layout.one_device:
                line += f" {list(leaf.sharding.shard_shape(leaf.shape))} on a device"
            lines.append(line.rstrip())
    main, mtp = parameter_counts(state)
    lines.append(f"  {main:,} in the main model, {mtp:,} more in MTP")

    memory = lowered_step(config, layout, state, base).compile().memory_analysis()
    gib = 2.0**30
    rows = {
        "master weights, f32": _bytes((state.params, state.router)) / gib,
        f"moments, {config.optimizer.moment_dtype}": _bytes(state.opt_state) / gib,
        "gradients, activations and scratch": memory.temp_size_in_bytes / gib,
        "peak of one training step": _peak(memory) / gib,
    }
    if base is not None:
        rows = {"frozen base": _bytes(base) / gib, **rows}
    if (predicted := predict(config, layout.platform)) is not None:
        rows["the same, predicted for accelerators"] = predicted.peak / gib
    lines.append(f"memory per device, GiB (XLA's analysis of the step for {layout.platform})")
    lines += [f"  {name:<40} {value:10.3f}" for name, value in rows.items()]
    lines.append("  " + fit_line(_peak(memory), device_bytes(layout)))
    axes = ", ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(config.mesh).items())
    schedule = Schedule(config)
    lines += [
        f"mesh: {axes}",
        f"a step reads {config.train.batch_size} rows of {config.train.seq_len} tokens in "
        f"{schedule.max_micro_batches} micro-batches (full batch); "
        f"the run, {schedule.tokens(config.train.steps):,} tokens in {config.train.steps:,} steps",
    ]
    wrong = problems(config)
    lines += [f"data: the run would stop: {problem}" for problem in wrong]
    if not wrong:
        lines.append(f"data: {config.data.path} is there, and the model has its tokenizer's ids")
    lines.append(f"run: {_of_its_folder(config, state)}")
    if not layout.one_device:
        lines += ["", "which devices hold which part", *_pictures(config, layout, state)]
    return "\n".join(lines)


def _of_its_folder(config: Config, state: TrainState) -> str:
    """Whether the run would begin in its folder, go on there, or stop. Nothing there is hashed."""
    checkpoints = Path(config.run_dir).absolute() / "checkpoints"
    steps = steps_in(checkpoints)
    if config.resume == "never" or not steps:
        return f"a new one, in {config.run_dir}"
    step = steps[-1] if config.resume == "auto" else int(config.resume)
    weights = {"params": state.params, "router": state.router}
    if why := refusal(checkpoints / str(step), config, weights):
        return f"it would stop: {why}"
    if step >= config.train.steps and config.resume == "auto":
        return f"nothing to do: {config.run_dir} is at step {step} of {config.train.steps}"
    return f"it would go on from {checkpoints / str(step)}; its data are not compared here"


def fit_line(wanted: int, there: int | None) -> str:
    """Whether a step's peak fits a device, in GiB."""
    if there is None:
        return "whether it fits is not known: no device of that kind is here"
    sizes = [size / 2**30 for size in (wanted, there)]
    needed, had = (f"{size:,.0f}" if size >= 100 else f"{size:.3g}" for size in sizes)
    return f"{'fits' if wanted <= there else 'does not fit'}: {needed} GiB of {had} a device"


def device_bytes(layout: Layout) -> int | None:
    """Memory that a device of the mesh has for JAX; virtual CPU devices share the host's.

    None when the devices are descriptions of others, or do not say.
    """
    if not isinstance(layout.mesh, Mesh):
        return None
    device = layout.mesh.devices.flat[0]
    if device not in jax.local_devices():
        return None
    if device.platform == "cpu":
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return host // len(jax.local_devices())
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def _pictures(config: Config, layout: Layout, state: TrainState) -> list[str]:
    """Tokens, and each kind of weight as it is used and as it is held between steps."""
    rows = (config.micro_batch_size, config.train.seq_len)
    lines = []
    for where, tokens in (("inside", "seq"), ("between", "residual")):
        lines.append(f"  tokens {where} blocks, {rows[0]} rows x {rows[1]} positions")
        lines += ["    " + line for line in draw(layout.sharding("batch", tokens), rows)]
    used = _by_name(shardings(state.params, layout))
    for name, leaf in _by_name(state.params).items():
        if name in DRAWN:
            for when, place in (("used", used[name]), ("held between steps", leaf.sharding)):
                lines.append(f"  {name} {list(leaf.shape)}, {when}")
                lines += ["    " + line for line in draw(place, leaf.shape)]
    return lines


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _bytes(tree: Any) -> int:
    """Bytes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _peak(memory: Any) -> int:
    aliased = memory.alias_size_in_bytes
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - aliased
    )
