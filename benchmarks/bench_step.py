"""Times a training step in parts on one GPU: a stage of MoE layers, and the slice, BF16 and FP8.

    python -m benchmarks.bench_step [--only stage|slice] [--remat v3]

Needs a Hopper GPU. The stage (configs/h200_stage.py) is its layers alone, forward and backward of 8
micro-batches, with what they read of the weights made once; no optimizer. The slice
(configs/h200_slice.py) is a whole step; its backward pass is what forward and backward take beyond
the forward alone, its optimizer what a step takes beyond both. Milliseconds by the clock, medians
of five; TFLOP/s are the model's operations, MTP's among them, once forward and twice backward.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

from benchmarks.timing import machine
from dsv3_jax.analysis.model_cost import training_flops_per_token
from dsv3_jax.config import Config, QuantConfig, load_config
from dsv3_jax.model.forward_pass import Tokens
from dsv3_jax.model.stack import run_layers
from dsv3_jax.model.step_weights import with_made
from dsv3_jax.model.transformer import init_variables
from dsv3_jax.training.loss import training_loss, training_pass
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.state import init_state
from dsv3_jax.training.step import for_products, gradients, jit_train_step

REPEATS = 5


def stage_gradients(variables: Any, rows: jax.Array, d_rows: jax.Array, config: Config) -> Any:
    """Gradients of the layers' weights, f32, added up over rows [A, B, T, D] of micro-batches."""
    how, params = training_pass(config), variables["params"]
    multiplied, made = for_products(params, config)
    tokens = Tokens(jnp.arange(rows.shape[2])[None])

    def product(params, x, d_x):
        layers = {**variables, "params": with_made(params, made)}
        y, _, _ = run_layers(layers, x, tokens, how)
        return jnp.sum(y.astype(jnp.float32) * d_x.astype(jnp.float32))

    gradient = jax.grad(product, (0, 1))

    def one_more(total, operands):
        of_weights, of_rows = gradient(multiplied, *operands)
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, of_weights)
        return total, of_rows

    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(one_more, zeros, (rows, d_rows))


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


def time_stage(config: Config) -> None:
    """Prints the stage's row."""
    call, operations = stage(config)
    ms = milliseconds(call)
    print(
        f"| stage, {config.quant.preset} | {ms:.1f} | | | | {operations / ms / 1e9:.0f} |",
        flush=True,
    )


def mean_loss(state: Any, rows: jax.Array, settings: Any, config: Config) -> jax.Array:
    """The loss of the first micro-batch, without a gradient."""
    variables = {"params": with_made(*for_products(state.params, config)), "router": state.router}
    return training_loss(variables, rows[0], settings.mtp_loss_weight, config)[0]


def time_slice(config: Config) -> None:
    """Prints the slice's row: the step, and its parts by differences of nested programs."""
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
    tokens = train.batch_size * train.seq_len
    operations = tokens * training_flops_per_token(config.model, train.seq_len, mtp=True)
    print(
        f"| slice, {config.quant.preset} | {ms:.1f} | {forward:.1f} | {both - forward:.1f} "
        f"| {ms - both:.1f} | {operations / ms / 1e9:.0f} |",
        flush=True,
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["stage", "slice"])
    parser.add_argument("--remat", default="v3")
    options = parser.parse_args()
    print(machine())
    print(
        "| what | ms | forward | backward | optimizer | TFLOP/s |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for name, measure in (("stage", time_stage), ("slice", time_slice)):
        config = load_config(f"configs/h200_{name}.py")
        train = dataclasses.replace(config.train, remat=options.remat)
        for preset in ("bf16", "fp8_paper") if options.only in (None, name) else ():
            measure(dataclasses.replace(config, train=train, quant=QuantConfig(preset=preset)))


if __name__ == "__main__":
    main()
