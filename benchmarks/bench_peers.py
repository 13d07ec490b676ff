"""Kernels of the transport `pallas` on one GPU, whose own memory holds what four peers would have.

    python -m benchmarks.bench_peers                             # V3's shapes: 4,096 tokens a peer
    python -m benchmarks.bench_peers --multiprocessors 8 16 20

This GPU has the first quarter of 256 experts. Without NVLink the times are lower bounds: what so
many multiprocessors can copy. They are of kernels, with a cold L2 cache; each result is compared
with the reference first. Then the experts' feed-forward on those rows, FP8, its weights' numbers
made.
`bench_multi_gpu` measures the whole exchange between GPUs.
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.errors import relative_error
from benchmarks.multi_gpu_timing import compile_all, failure
from benchmarks.timing import machine, microseconds
from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.fused.api import quantize_blocks, quantize_rows
from dsv3_jax.kernels.grouped_gemm.api import KERNEL_ALIGNMENT
from dsv3_jax.kernels.hopper import plgpu
from dsv3_jax.kernels.peers import api, pallas_gpu
from dsv3_jax.model.linear import grouped_feed_forward
from dsv3_jax.model.router import route
from dsv3_jax.parallel.grouping import plan
from dsv3_jax.quantization.block_scaled import StepWeight, StraightThrough
from dsv3_jax.quantization.recipe import RECIPES

PEERS = 4


class Here(pallas_gpu.Peers):
    """Peers whose rows lie in this GPU's memory, copied as theirs are."""

    def fetch(self, source: Any, target: Any, arrived: Any) -> None:
        """One bulk copy, as between GPUs."""
        inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        plgpu.copy_gmem_to_smem(source, target, arrived, oob_mode=inside)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of a peer")
    parser.add_argument("--multiprocessors", type=int, nargs="+", default=[16, 20, 32])
    options = parser.parse_args()
    model = ModelConfig()
    dim, experts = model.hidden_size, model.n_routed_experts // PEERS
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (PEERS * options.tokens, dim))
    gate = jax.random.normal(keys[1], (model.n_routed_experts, dim)) / dim**0.5
    routing = jax.jit(lambda x: route(x, gate, jnp.zeros(len(gate)), model))(x)
    own = jnp.where(routing.experts_TK < experts, routing.experts_TK, experts)
    entries = 2 * options.tokens * model.num_experts_per_tok
    planned = jax.jit(lambda own: plan(own, experts, KERNEL_ALIGNMENT, entries))
    groups, sizes, load = planned(own)
    slots, num_rows, start = groups.slot_TK, groups.token_M.shape[0], jnp.cumsum(sizes) - sizes
    slots = slots.astype(jnp.int32)
    free = jnp.stack([start + load, start + sizes], axis=1)
    asked = (slots < num_rows).any(1, keepdims=True)
    everyone = jnp.arange(len(x), dtype=jnp.int32)[:, None]
    once = jnp.where(asked, everyone, len(x))
    x, none = x.astype(jnp.bfloat16), jnp.zeros((1, 2), jnp.int32)
    rows = jax.random.normal(keys[2], (num_rows, dim), jnp.bfloat16)
    print(
        f"{machine()}\n{asked.sum()} rows, {asked[options.tokens :].sum()} of them of others, to "
        f"{(slots < num_rows).sum()} places among {num_rows}, {sizes.sum()} in use"
    )

    jobs: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for name, of_all in (("BF16", x), ("FP8", x.astype(jnp.float8_e4m3fn))):
        for count in options.multiprocessors:
            gather = partial(_gather, num_rows=num_rows, multiprocessors=count)
            jobs[f"gather {name}, {count} SMs"] = gather, (of_all, slots, free)
        to_one = partial(_gather, num_rows=len(x), multiprocessors=options.multiprocessors[-1])
        jobs[f"gather {name} once, {count} SMs"] = to_one, (of_all, once, none)
    summed = (rows, routing.weights_TK, slots)
    backward = (rows, x, routing.weights_TK, slots, free)
    jobs["sums"] = partial(api.sum_slots, implementation="pallas_gpu"), summed
    jobs["their gradients"] = partial(api.sum_slots_backward, implementation="pallas_gpu"), backward
    jobs["plan"] = planned, (own,)
    jobs |= _feed_forward(model, rows, sizes, experts)
    built = compile_all({n: partial(_compiled, f, a) for n, (f, a) in jobs.items()})
    check(built, jobs, num_rows)
    for name, (_, operands) in jobs.items():
        if isinstance(built[name], Exception):
            print(f"{name:36} {failure(built[name])}", flush=True)
            continue
        print(f"{name:36} {microseconds(built[name], operands):9.1f} us", flush=True)


def check(built: dict[str, Any], jobs: dict[str, Any], num_rows: int) -> None:
    """Raises RuntimeError where a kernel's result is not the reference's."""
    for name, (_, operands) in jobs.items():
        if name.startswith("gather"):
            of_all, slots, _ = operands
            token, choice = np.nonzero(
                np.asarray(slots) < (len(of_all) if "once" in name else num_rows)
            )
            got = built[name](*operands)[slots[token, choice]]
            apart = float((got != of_all[token]).sum())
        elif name == "sums":
            want = api.sum_slots(*operands, implementation="reference")
            apart = float(relative_error(built[name](*operands), want))
        elif name == "their gradients":
            reference = jax.jit(partial(api.sum_slots_backward, implementation="reference"))
            slots = operands[3][operands[3] < num_rows]
            (d_rows, d_weights), (rows, weights) = built[name](*operands), reference(*operands)
            apart = max(
                float(relative_error(d_rows[slots], rows[slots])),
                float(relative_error(d_weights, weights)),
            )
        else:
            continue
        if not apart <= 1e-3:
            raise RuntimeError(f"{name} is {apart} apart from the reference")


def _feed_forward(model: ModelConfig, rows, sizes, experts: int) -> dict[str, Any]:
    """The experts' two products, forward and with their backward pass, as a step runs them."""
    recipe, width = RECIPES["fp8_paper"], model.moe_intermediate_size
    recipes = (recipe.experts_gate_up_proj, recipe.experts_down_proj)
    keys = jax.random.split(jax.random.key(1), 2)
    gate_up = 0.02 * jax.random.normal(keys[0], (experts, 2, width, rows.shape[1]))
    down = 0.02 * jax.random.normal(keys[1], (experts, rows.shape[1], width))
    made = [
        jax.jit(partial(quantize_blocks, scale_format=of.weight.scale_format))(matrices)
        for of, matrices in zip(recipes, (gate_up.reshape(experts, -1, rows.shape[1]), down))
        if of is not None
    ]
    numbers = jax.jit(partial(quantize_rows, scale_format="ue8m0"))(rows)

    def forward(masters, carrier, numbers, made, sizes):
        wide, narrow = (StepWeight(w, *of) for w, of in zip(masters, made))
        arrived = StraightThrough(numbers, carrier)
        return grouped_feed_forward(arrived, wide, narrow, sizes, KERNEL_ALIGNMENT, recipes)

    def and_back(masters, carrier, numbers, made, sizes, d_y):
        of = partial(forward, numbers=numbers, made=made, sizes=sizes)
        y, pull_back = jax.vjp(of, masters, carrier)
        return y, *pull_back(d_y)

    operands = ((gate_up, down), jnp.zeros_like(rows), numbers, made, sizes)
    return {
        "feed-forward": (forward, operands),
        "feed-forward and backward": (and_back, (*operands, rows)),
    }


def _gather(x, slots, free, *, num_rows: int, multiprocessors: int):
    rest = pallas_gpu.beside(multiprocessors)
    x = x.reshape(PEERS, -1, x.shape[-1])
    return pallas_gpu.gather_from(Here(PEERS), x, slots, free, num_rows, multiprocessors, rest)


def _compiled(function: Any, operands: tuple[Any, ...]) -> Any:
    return jax.jit(function).lower(*operands).compile()


if __name__ == "__main__":
    main()
