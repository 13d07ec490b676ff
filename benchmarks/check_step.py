"""Compares the gradients of a whole FP8 step by the kernels with those by their references.

    python -m benchmarks.check_step [--config configs/half_billion.py] [--layers 2]

Needs a GPU for which there are kernels. Tests compare each kernel with its reference; this is all
of them together, as `train.py` runs them. Numbers cannot be equal: a sum that rounds differently
moves what lies near the middle of two FP8 numbers by a whole step of 6 %, and a token near two
experts to the other one. So there are two controls: the references again, with every parameter
moved at random by what rounding a product to bfloat16 moves it (2e-3); the further one counts. One
row a parameter: distances (Frobenius, relative) of kernels and of the controls to the references,
and of both implementations to bfloat16; then their lengths along the references' gradient. A step
is right when the kernels are
no further from the references than the control, no further from bfloat16 than the references are,
of the right length, and the same bits in a second run. Exit code 1 if not.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

from benchmarks.errors import relative_error
from dsv3_jax.config import Config, QuantConfig, load_config
from dsv3_jax.kernels import backend
from dsv3_jax.model.transformer import init_variables
from dsv3_jax.training.loss import training_loss
from dsv3_jax.training.step import for_products

MOVED = 2e-3  # what rounding a product to bfloat16 costs
SLACK = 1.25  # between two draws of the same noise
LENGTH = 0.02  # of a gradient along the right one, beyond the control's


class Run(NamedTuple):
    """One way to compute the step."""

    preset: Literal["fp8_paper", "bf16"]
    implementation: str | None = None  # None: what `train.py` uses


RUNS = {
    "kernels": Run("fp8_paper"),
    "references": Run("fp8_paper", "reference"),
    "control": Run("fp8_paper", "reference"),
    "second control": Run("fp8_paper", "reference"),
    "bfloat16": Run("bf16"),
}
PAIRS = (
    ("kernels", "references"),
    ("control", "references"),
    ("kernels", "bfloat16"),
    ("references", "bfloat16"),
)


def gradients(variables: Any, rows: jax.Array, config: Config) -> tuple[jax.Array, Any]:
    """The loss of rows of tokens, and its gradients summed over tokens, as in training."""
    tokens = float(rows.shape[0] * (rows.shape[1] - 1))

    weights = for_products(variables["params"], config).summing(adds=False)

    def loss_of(trained):
        weight = jnp.float32(config.schedule.mtp_loss_weight)
        loss, _ = training_loss(variables | {"params": weights.held(trained)}, rows, weight, config)
        return loss * tokens, loss

    (_, loss), grads = jax.value_and_grad(loss_of, has_aux=True)(weights.trained)
    return loss, weights.gradients(jax.tree.map(lambda g: g.astype(jnp.float32), grads))


def moved(params: Any, by: float, seed: int) -> Any:
    """The parameters, each times 1 + `by` times a normal number."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [by * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys)]
    return jax.tree.unflatten(tree, [x * (1 + n) for x, n in zip(leaves, noise)])


@jax.jit
def distances(grads: Any, exact: Any) -> Any:
    """Relative distance of each leaf."""
    return jax.tree.map(relative_error, grads, exact)


@jax.jit
def lengths(grads: Any, exact: Any) -> Any:
    """How long each leaf is along `exact`; noise leaves 1, a wrong scale does not."""
    return jax.tree.map(lambda a, b: jnp.sum(a * b) / jnp.sum(b * b), grads, exact)


def further_from_one(a: jax.Array, b: jax.Array) -> jax.Array:
    """Of two numbers the one that is further from 1."""
    return jnp.where(jnp.abs(a - 1) > jnp.abs(b - 1), a, b)


def compiled(
    runs: set[Run], variables: Any, rows: jax.Array, config: Config
) -> dict[Run, Callable[..., Any]]:
    """Each run's step; what was chosen for the kernels' is printed."""

    def lowered(run: Run) -> Any:
        preset = dataclasses.replace(config, quant=QuantConfig(run.preset))
        step = jax.jit(functools.partial(gradients, config=preset))
        with backend.use(run.implementation) if run.implementation else nullcontext():
            return step.lower(variables, rows)

    programs = {run: lowered(run) for run in runs}
    for choice in backend.choices():
        print(choice)
    with ThreadPoolExecutor() as pool:
        return dict(zip(programs, pool.map(lambda x: x.compile(), programs.values())))


def report(results: dict[str, tuple[jax.Array, Any]]) -> int:
    """Prints losses and a row for each parameter; how many are off."""
    print({name: float(loss) for name, (loss, _) in results.items()})
    columns = [distances(results[a][1], results[b][1]) for a, b in PAIRS]
    columns += [lengths(results[a][1], results[b][1]) for a, b in PAIRS[:2]]
    # A length of few numbers is one draw of noise: the further of two controls counts.
    second, exact = results["second control"][1], results["references"][1]
    columns[1] = jax.tree.map(jnp.maximum, columns[1], distances(second, exact))
    columns[5] = jax.tree.map(further_from_one, columns[5], lengths(second, exact))
    heads = [f"{a} - {b}" for a, b in PAIRS] + [f"{a} along {b}" for a, b in PAIRS[:2]]
    print(f"{'relative distance':56}", *heads, sep=" | ")
    off = 0
    for (path, _), *row in zip(
        jax.tree_util.tree_leaves_with_path(columns[0]), *map(jax.tree.leaves, columns)
    ):
        ours, control, to_plain, references_to_plain, length, control_length = map(float, row)
        right = ours <= SLACK * control and to_plain <= SLACK * references_to_plain
        right &= abs(length - 1) <= SLACK * abs(control_length - 1) + LENGTH
        off += not right
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        print(f"{name:56}", *(f"{float(x):.3f}" for x in row), "" if right else "OFF", flush=True)
    return off


def main() -> int:
    """Computes the step in four ways and tells how far apart they are; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="configs/half_billion.py")
    parser.add_argument("--layers", type=int, default=2, help="more of them amplify more")
    options = parser.parse_args()
    config = load_config(options.config)
    model = dataclasses.replace(config.model, num_hidden_layers=options.layers)
    config = dataclasses.replace(config, model=model)
    variables = jax.jit(functools.partial(init_variables, config=config.model))(jax.random.key(0))
    shape = (config.train.batch_size, config.train.seq_len + 1)
    rows = jax.random.randint(jax.random.key(1), shape, 0, config.model.vocab_size)
    programs = compiled(set(RUNS.values()), variables, rows, config)

    def step(name: str) -> tuple[jax.Array, Any]:
        params = variables["params"]
        if "control" in name:
            params = moved(params, MOVED, seed=list(RUNS).index(name))
        return programs[RUNS[name]](variables | {"params": params}, rows)

    results = {name: step(name) for name in RUNS}
    off = report(results)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), step("kernels"), results["kernels"])
    twice = all(jax.tree.leaves(same))
    print(f"{off} parameters off; the same bits twice: {twice}")
    return 1 if off or not twice else 0


if __name__ == "__main__":
    raise SystemExit(main())
