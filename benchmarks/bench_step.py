"""Times a training step in parts on one GPU: a stage of MoE layers, and the slice, BF16 and FP8.

    python -m benchmarks.bench_step [--only stage|slice] [--remat v3] [--classes] [--picture F.png]

Needs a Hopper GPU. The stage (configs/h200_stage.py) is its layers alone, forward and backward of 8
micro-batches, with what they read of the weights made once; no optimizer; remat `v3` unless said.
The slice (configs/h200_slice.py) is a whole step, of one row, of one with its head in FP8 too, and
of four rows with half the experts, remat `none`; its backward pass is what forward and backward
take beyond
the forward alone, its optimizer what a step takes beyond both. Milliseconds by the clock, medians
of five; TFLOP/s are the model's operations, MTP's among them, once forward and twice backward.
--classes adds what the slice's kernels go to, by the profiler, for a program without CUDA graphs,
whose kernels have no names there. The last row is transformers' step in a process of its own,
before ours take the memory, beside our BF16 slice without MTP; it says so where torch is missing.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

from benchmarks.bars import plot
from benchmarks.kernel_classes import classed, kernels, table
from benchmarks.timing import machine
from dsv3_jax.analysis.model_cost import training_flops_per_token
from dsv3_jax.config import Config, QuantConfig, load_config
from dsv3_jax.model.forward_pass import Tokens
from dsv3_jax.model.stack import run_layers
from dsv3_jax.model.transformer import init_variables
from dsv3_jax.training.loss import training_loss, training_pass
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.state import init_state
from dsv3_jax.training.step import for_products, gradients, jit_train_step

REPEATS = 5


def stage_gradients(variables: Any, rows: jax.Array, d_rows: jax.Array, config: Config) -> Any:
    """Gradients of the layers' weights, f32, added up over rows [A, B, T, D] of micro-batches."""
    how = training_pass(config)
    weights = for_products(variables["params"], config).summing(adds=len(rows) > 1)
    tokens = Tokens(jnp.arange(rows.shape[2])[None])

    def product(trained, x, d_x):
        layers = {**variables, "params": weights.held(trained)}
        y, _, _ = run_layers(layers, x, tokens, how)
        return jnp.sum(y.astype(jnp.float32) * d_x.astype(jnp.float32))

    gradient = jax.grad(product, (0, 1))

    def one_more(total, operands):
        of_weights, of_rows = gradient(weights.trained, *operands)
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, of_weights)
        return total, of_rows

    zeros = jax.tree.map(jnp.zeros_like, weights.trained)
    total, of_rows = jax.lax.scan(one_more, zeros, (rows, d_rows))
    return weights.gradients(total), of_rows


def stage(config: Config) -> tuple[Callable[[], Any], float]:
    """A call of `stage_gradients` on random rows, and the operations that it counts for."""
    model, train = config.model, config.train
    shapes = jax.eval_shape(partial(init_variables, config=model), jax.random.key(0))
    layers = {kind: {"moe_layers": tree["moe_layers"]} for kind, tree in shapes.items()}

    @jax.jit
    def make(key):
        leaves, structure = jax.tree.flatten(layers)
        keys = jax.random.split(key, len(leaves))
        drawn = [
            jax.random.normal(k, leaf.shape, leaf.dtype) * model.initializer_range
            if leaf.ndim > 2
            else jnp.ones(leaf.shape, leaf.dtype)
            for k, leaf in zip(keys, leaves)
        ]
        return jax.tree.unflatten(structure, drawn)

    micro = train.micro_batch_size or train.batch_size
    shape = (train.batch_size // micro, micro, train.seq_len, model.hidden_size)
    rows, d_rows = (
        jax.jit(partial(jax.random.normal, shape=shape, dtype=jnp.bfloat16))(jax.random.key(i))
        for i in (1, 2)
    )
    variables = make(jax.random.key(0))
    step = jax.jit(partial(stage_gradients, config=config))
    head = 6 * model.vocab_size * model.hidden_size
    tokens = train.batch_size * train.seq_len
    operations = tokens * (training_flops_per_token(model, train.seq_len) - head)
    return partial(step, variables, rows, d_rows), operations


def milliseconds(call: Callable[[], Any]) -> float:
    """Median of the clock around a call whose results are waited for."""
    jax.block_until_ready(call())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


class Timed(NamedTuple):
    """A row of the table."""

    name: str
    ms: float
    rate: float  # TFLOP/s
    parts: tuple[float, ...] = ()  # forward, backward, optimizer
    classes: str = ""  # of its kernels, a table

    def __str__(self) -> str:
        parts = [f"{part:.1f}" for part in self.parts] or [""] * 3
        return "| " + " | ".join([self.name, f"{self.ms:.1f}", *parts, f"{self.rate:.0f}"]) + " |"


def time_stage(config: Config, classes: bool) -> Timed:
    """The stage's row."""
    del classes
    call, operations = stage(config)
    ms = milliseconds(call)
    return Timed(f"stage, {config.quant.preset}", ms, operations / ms / 1e9)


def mean_loss(state: Any, rows: jax.Array, settings: Any, config: Config) -> jax.Array:
    """The loss of the first micro-batch, without a gradient."""
    weights = for_products(state.params, config)
    variables = {"params": weights.held(weights.trained), "router": state.router}
    return training_loss(variables, rows[0], settings.mtp_loss_weight, config)[0]


def time_slice(config: Config, classes: bool) -> Timed:
    """The slice's row: the step, and its parts by differences of nested programs."""
    schedule, train = Schedule(config), config.train
    shape = (schedule.max_micro_batches, schedule.micro_batch_size, train.seq_len + 1)
    rows = jax.random.randint(jax.random.key(1), shape, 0, config.model.vocab_size, jnp.int32)
    state = jax.jit(partial(init_state, config=config))(jax.random.key(0))
    settings = schedule.settings(0)
    forward = milliseconds(
        partial(jax.jit(partial(mean_loss, config=config)), state, rows, settings)
    )
    both = milliseconds(partial(jax.jit(partial(gradients, config=config)), state, rows, settings))
    step = jit_train_step(config, training_pass(config).layout, state)
    holder = [state]

    def whole():
        holder[0], metrics = step(holder[0], rows, settings)
        return metrics

    ms = milliseconds(whole)
    of_kernels = ""
    if classes:
        lowered = step.lower(holder[0], rows, settings)
        step = lowered.compile(compiler_options={"xla_gpu_enable_command_buffer": ""})
        of_kernels = table(classed(kernels(whole, step.as_text())))
    tokens = train.batch_size * train.seq_len
    operations = tokens * training_flops_per_token(config.model, train.seq_len, mtp=True)
    parts = forward, both - forward, ms - both
    mtp = "" if config.model.num_nextn_predict_layers else " without MTP"
    rows_of_step = f", {train.batch_size} rows" if train.batch_size > 1 else ""
    name = f"slice{mtp}{rows_of_step}, {config.quant.preset}"
    return Timed(name, ms, operations / ms / 1e9, parts, of_kernels)


def of_transformers(config: Config) -> Timed | None:
    """transformers' step of one row, without MTP; None, and a line, where it does not run."""
    command = [sys.executable, "-m", "benchmarks.transformers_step"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print("transformers beside it: no,", (done.stderr.strip().splitlines() or ["?"])[-1][:200])
        return None
    ms, length = float(done.stdout.split()[-1]), config.train.seq_len
    operations = length * training_flops_per_token(config.model, length)
    return Timed("slice without MTP, transformers", ms, operations / ms / 1e9)


def plans(options: argparse.Namespace) -> Iterator[tuple[Any, Config]]:
    """What is measured, in order: how, and the config."""
    for name, measure, remat, presets in (
        ("stage", time_stage, "v3", ("bf16", "fp8_paper")),
        ("slice", time_slice, "none", ("bf16", "fp8_paper", "fp8_head")),
    ):
        if options.only not in (None, name):
            continue
        config = load_config(f"configs/h200_{name}.py")
        train = dataclasses.replace(config.train, remat=options.remat or remat)
        config = dataclasses.replace(config, train=train)
        for preset in presets:
            yield measure, dataclasses.replace(config, quant=QuantConfig(preset))
        if name == "slice":
            model = dataclasses.replace(config.model, n_routed_experts=8, n_group=4)
            rows, fp8 = dataclasses.replace(train, batch_size=4), QuantConfig("fp8_paper")
            yield measure, dataclasses.replace(config, model=model, train=rows, quant=fp8)
            model = dataclasses.replace(config.model, num_nextn_predict_layers=0)
            yield measure, dataclasses.replace(config, model=model)


def main() -> None:
    """Prints the table, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["stage", "slice"])
    parser.add_argument("--remat", choices=["none", "dots", "v3", "full"])
    parser.add_argument("--classes", action="store_true")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    print(machine())
    slice_config = load_config("configs/h200_slice.py")
    peer = None if options.only == "stage" else of_transformers(slice_config)
    print(
        "| what | ms | forward | backward | optimizer | TFLOP/s |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    rows = []
    for measure, config in plans(options):
        rows.append(measure(config, options.classes))
        print(rows[-1], flush=True)
    if peer is not None:
        rows.append(peer)
        print(peer)
    for row in rows:
        if row.classes:
            print(f"\n{row.name}:\n\n{row.classes}")
    if options.picture:
        bars = [{"us": 1e3 * row.ms, "tflops": row.rate} for row in rows]
        plot(bars, [row.name for row in rows], {}, options.picture)


if __name__ == "__main__":
    main()
