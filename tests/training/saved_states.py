"""Tiny states to save, and functions of a test's file run in a process of their own."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import Config, ModelConfig

CONFIG = Config(model=ModelConfig(hidden_size=64, num_hidden_layers=4))
META = {"config": dataclasses.asdict(CONFIG), "tokens": 12345}
OPTIMIZER = optax.adamw(1e-2)


def make_state(seed: int) -> dict:
    """A little of everything a training state holds; odd sizes."""
    key = jax.random.key(seed)
    params = {
        "embed_tokens": jax.random.normal(key, (7, 5)),
        "moe_layers": {"mlp": {"gate": jax.random.normal(key, (2, 3, 5))}},
    }
    return {
        "params": params,
        "router": {"moe_layers": {"mlp": {"e_score_correction_bias": jnp.full((2, 3), 0.1)}}},
        "opt_state": OPTIMIZER.init(params),
        "moments": jnp.arange(5, dtype=jnp.bfloat16) / 3,
        "step": jnp.int32(seed),
        "key": key,
        "nothing": {},
    }


ABSTRACT = jax.eval_shape(lambda: make_state(0))


def run_file(
    file: str, what: str, folder: Path, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs one function of a test's file in a fresh process with 8 CPU devices."""
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, file, what, str(folder)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert not check or result.returncode == 0, result.stderr
    return result


def run_named(functions: dict[str, Callable[[Path], None]]) -> None:
    """What such a process runs: the function that the command line names, on its folder."""
    jax.config.update("jax_num_cpu_devices", 8)
    functions[sys.argv[1]](Path(sys.argv[2]))
