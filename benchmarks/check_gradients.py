"""Gradients of one training step over data or pipe, in BF16, beside those of one GPU, leaf by leaf.

    python -m benchmarks.check_gradients                  # two GPUs, or four; V3's widths
    python -m benchmarks.check_gradients --virtual 2      # tiny, float32, virtual CPU devices
    python -m benchmarks.check_gradients --choices 8      # of 8 experts: no route can flip

A dense layer and three MoE layers of 8 experts, 4 micro-batches of 2,048 tokens a device, remat
"full". Kernels that only GPUs have are in the backward pass, which is why tests on CPUs are not
enough. A line for each mesh: the loss, and the relative error of a leaf's gradient, the median and
the worst. In BF16 a mesh changes the order of sums, so that tokens near a tie go to other experts:
`data` says how much of an error that makes. The exit code is 1 where a gradient is not finite, or
where a pipeline's worst error is more than twice that of `data`.
"""

import argparse
import dataclasses
import os
import sys
import time
from functools import partial
from typing import Any

# What one mesh's program has used is given back: the next one's scratch is one piece of 40 GiB.
os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.errors import relative_error
from benchmarks.multi_gpu_timing import begin, compile_all, failure
from dsv3_jax.config import (
    Config,
    ExpertParallelConfig,
    ModelConfig,
    ParallelConfig,
    PipelineConfig,
    TrainConfig,
)
from dsv3_jax.model.placement import shardings
from dsv3_jax.parallel.mesh import batch_sharding, make_mesh
from dsv3_jax.parallel.sharding import make_layout
from dsv3_jax.training.schedule import StepSettings
from dsv3_jax.training.state import abstract_state, init_state
from dsv3_jax.training.step import gradients

MESHES = {
    2: {
        "one device": (ParallelConfig(), "1f1b"),
        "data 2": (ParallelConfig(data=2), "1f1b"),
        "pipe 2, 1f1b": (ParallelConfig(pipe=2), "1f1b"),
        "pipe 2, zb1p": (ParallelConfig(pipe=2), "zb1p"),
    },
    4: {
        "one device": (ParallelConfig(), "1f1b"),
        "data 4": (ParallelConfig(data=4), "1f1b"),
        "pipe 2 x local 2, 1f1b": (ParallelConfig(pipe=2, local=2), "1f1b"),
        "pipe 4, eager_1f1b": (ParallelConfig(pipe=4), "eager_1f1b"),
    },
}
ROUNDING = 1e-6  # of sums in float32 in another order


def main() -> int:
    """Prints the table; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--virtual", type=int, default=0, help="tiny, on as many CPU devices")
    parser.add_argument("--cache", default="", help="folder for compiled programs")
    parser.add_argument("--choices", type=int, default=2, help="experts of a token, of 8")
    options = parser.parse_args()
    begin(options.virtual, options.cache)
    devices, quick = jax.device_count(), bool(options.virtual)
    if devices not in MESHES:
        parser.error(f"{devices} devices; there are meshes for {' and '.join(map(str, MESHES))}")
    configs = {
        name: config_of(mesh, schedule, devices, options.choices, quick)
        for name, (mesh, schedule) in MESHES[devices].items()
    }
    built = compile_all({name: partial(program, config) for name, config in configs.items()})
    want, worst = None, {}
    for name, config in configs.items():
        if isinstance(built[name], Exception):
            print(f"{name:22} {failure(built[name])}", flush=True)
            return 1
        start = time.perf_counter()
        loss, grads = run(config, *built[name])
        if want is None:
            want = grads
        apart = jax.tree.map(relative_error, grads, want)
        found = sorted((float(e), _name(path)) for path, e in jax.tree.leaves_with_path(apart))
        errors = np.asarray([error for error, _ in found])
        worst[name] = errors.max() if np.isfinite(errors).all() else np.inf
        print(
            f"{name:22} loss {loss:.6f}, error median {np.median(errors):.2e}, worst "
            f"{found[-1][0]:.2e} ({found[-1][1]}), not finite {np.sum(~np.isfinite(errors))} of "
            f"{len(errors)}, {time.perf_counter() - start:.1f} s",
            flush=True,
        )
        del grads
    limit = max(2 * worst[f"data {devices}"], ROUNDING)
    return int(not all(error <= limit for error in worst.values()))


def config_of(
    mesh: ParallelConfig, schedule: Any, devices: int, choices: int, quick: bool
) -> Config:
    """The step's config on this mesh."""
    model = dataclasses.replace(
        ModelConfig(), vocab_size=8192, num_hidden_layers=4, first_k_dense_replace=1,
        n_routed_experts=8, num_experts_per_tok=choices, n_group=1, topk_group=1,
        num_nextn_predict_layers=0, dtype="bfloat16",
    )  # fmt: skip
    train = TrainConfig(
        batch_size=4 * devices, micro_batch_size=devices, seq_len=2048, remat="full"
    )
    if quick:
        model = dataclasses.replace(
            model, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
            num_attention_heads=2, vocab_size=300, q_lora_rank=32, kv_lora_rank=16,
            qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, dtype="float32",
        )  # fmt: skip
        train = dataclasses.replace(train, seq_len=32)
    pipeline = PipelineConfig(schedule=schedule)
    expert = ExpertParallelConfig(transport="auto")
    return Config(
        model=model, mesh=mesh, train=train, pipeline=pipeline, expert_parallel=expert
    ).validate()


def program(config: Config) -> tuple[Any, Any]:
    """The compiled gradients, and the shardings of what they take."""
    devices = jax.devices()[: config.mesh.num_devices]
    layout = make_layout(make_mesh(config.mesh, devices), config.sharding, config.expert_parallel)
    state = abstract_state(config, layout)
    count = config.train.batch_size // config.micro_batch_size
    shape = (count, config.micro_batch_size, config.train.seq_len + 1)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(layout.mesh, batch_dim=1))

    def of_step(state, rows, settings):
        with layout.compiling():
            loss, _, grads, _ = gradients(state, rows, settings, config, layout)
        return loss, layout.constrain_tree(grads, shardings(grads, layout, stored=True))

    compiled = jax.jit(of_step).lower(state, rows, _settings(count)).compile()
    places = jax.tree.map(lambda leaf: leaf.sharding, (state, rows))
    return compiled, places


def run(config: Config, compiled: Any, places: Any) -> tuple[float, Any]:
    """The loss and the gradients, on the first device, of the same weights and tokens."""
    state = jax.jit(partial(init_state, config=config), out_shardings=places[0])(jax.random.key(0))
    count = config.train.batch_size // config.micro_batch_size
    shape = (count, config.micro_batch_size, config.train.seq_len + 1)
    rows = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    loss, grads = compiled(state, jax.device_put(rows, places[1]), _settings(count))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return float(loss), jax.tree.map(lambda leaf: jax.device_put(leaf, here), grads)


def _settings(count: int) -> StepSettings:
    return StepSettings(np.float32(0), np.float32(0), np.float32(0), np.int32(count))


def _name(path: Any) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


if __name__ == "__main__":
    sys.exit(main())
