"""Parts of bench_multi_gpu: collectives alone, and every transport's dispatch and combine."""

import importlib.util
import subprocess
import sys
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import kernel_classes
from benchmarks.errors import relative_error
from benchmarks.multi_gpu_timing import (
    AXES,
    Options,
    compile_all,
    failure,
    kernel_by_kernel,
    mesh_of,
    seconds_of,
)
from dsv3_jax.config import ExpertParallelConfig, ModelConfig
from dsv3_jax.model.linear import group_alignment
from dsv3_jax.model.router import route
from dsv3_jax.parallel.collectives import exchange as all_to_all
from dsv3_jax.parallel.collectives import vary
from dsv3_jax.parallel.exchange import make_exchange
from dsv3_jax.parallel.expert import combine, dispatch
from dsv3_jax.quantization.block_scaled import BlockScaled, StraightThrough, dequantize

SPLIT = PartitionSpec(AXES)


class Case(NamedTuple):
    """A way of the exchange."""

    transport: str
    dispatch_format: str = "none"
    nodes: int = 1
    multiprocessors: int = 20

    def __str__(self) -> str:
        shape = f", {self.nodes} nodes" if self.nodes > 1 else ""
        with_ = f", {self.multiprocessors} SMs" if self.transport == "pallas" else ""
        form = "BF16" if self.dispatch_format == "none" else "FP8"
        return f"{self.transport}, {form} out{shape}{with_}"


CASES = [
    *(Case(t, form) for t in ("pallas", "padded", "allgather") for form in ("none", "fp8")),
    *(Case("pallas", form, 1, 32) for form in ("none", "fp8")),
    Case("pallas", "fp8", 2),
    Case("padded", "fp8", 2),
    Case("ragged"),
    Case("ragged", "fp8"),
]


class Inputs(NamedTuple):
    """Tokens, gate weights and choices of all devices, and what of them must travel."""

    x: Any
    weights: Any
    experts: Any
    leaving: float  # rows that leave a device, on average
    received: float  # rows that a device needs, its own included


def inputs_of(mesh, tokens: int, model: ModelConfig) -> Inputs:
    """Random tokens with V3's router."""
    devices = mesh.size
    sharding = NamedSharding(mesh, SPLIT)
    keys = jax.random.split(jax.random.key(0), 2)
    num_experts, dim = model.n_routed_experts, model.hidden_size

    def draw():
        x = jax.random.normal(keys[0], (tokens * devices, dim))
        gate = jax.random.normal(keys[1], (num_experts, dim)) / dim**0.5
        routing = route(x, gate, jnp.zeros(num_experts), model)
        return x.astype(jnp.bfloat16), routing.weights_TK, routing.experts_TK

    x, weights, experts = jax.jit(draw, out_shardings=(sharding,) * 3)()
    place = np.asarray(experts).reshape(devices, tokens, -1) // (num_experts // devices)
    pairs = np.stack([(place == peer).any(-1) for peer in range(devices)], -1).sum(1)
    return Inputs(
        x, weights, experts, (pairs.sum() - np.trace(pairs)) / devices, pairs.sum() / devices
    )


def collectives(options: Options) -> None:
    """all_to_all, all_gather, psum_scatter and the local addition of as many bytes."""
    mesh, quick = mesh_of(), bool(options.virtual)
    devices, tokens, dim = mesh.size, 64 if quick else 4096, 256 if quick else 7168
    sharding = NamedSharding(mesh, SPLIT)
    full = jax.jit(
        lambda: jax.random.normal(jax.random.key(0), (devices**2, tokens, dim), jnp.bfloat16),
        out_shardings=sharding,
    )()
    ways = {
        "all_to_all": lambda b: all_to_all(b, AXES),
        "all_gather": lambda b: lax.all_gather(b[0], AXES, tiled=True),
        "psum_scatter": lambda b: lax.psum_scatter(b, AXES),
        "local x + 1": lambda b: b + jnp.bfloat16(1),
    }

    def program(function):
        spread = jax.shard_map(function, mesh=mesh, in_specs=(SPLIT,), out_specs=SPLIT)
        return jax.jit(spread).lower(full).compile()

    leaving = (devices - 1) * tokens * dim * 2
    for name, built in compile_all({n: partial(program, f) for n, f in ways.items()}).items():
        seconds = seconds_of(built, full, quick=quick)
        moved = 2 * devices * tokens * dim * 2 if name.startswith("local") else leaving
        print(f"{name:44} {1e3 * seconds:8.3f} ms {moved / seconds / 1e9:7.1f} GB/s", flush=True)


def exchange(options: Options) -> None:
    """Dispatch, combine, both, and both with their backward, of every transport."""
    quick = bool(options.virtual)
    model = ModelConfig(hidden_size=512 if quick else 7168, n_routed_experts=64 if quick else 256)
    tokens = (options.tokens or [32 if quick else 4096])[0]
    mesh = mesh_of()
    given = inputs_of(mesh, tokens, model)
    print(
        f"{mesh.size} devices, {tokens} tokens each, hidden {model.hidden_size}, "
        f"{given.leaving:.0f} rows leave a device, {given.received:.0f} with its own"
    )
    cases = [c for c in CASES if mesh.size % c.nodes == 0 and mesh.size // c.nodes > 1]
    if options.ways:
        cases = [c for c in cases if c.transport in options.ways]
    elif quick:
        cases = [c for c in cases if c.transport != "ragged"]
    built = compile_all({c: partial(_programs, c, model, tokens, given) for c in cases})
    print(f"{'ms':38} dispatch  combine     both  fwd+bwd | GB/s both (DeepEP), fwd+bwd | error")
    for case in cases:
        if isinstance(built[case], Exception):
            print(f"{case!s:38} {failure(built[case])}", flush=True)
            continue
        try:
            print(f"{case!s:38} {_measure(case, built[case], given, model, quick)}", flush=True)
        except Exception as error:
            print(f"{case!s:38} {failure(error)}", flush=True)


def profile(options: Options) -> None:
    """What one dispatch and combine, and their backward pass, spend on a GPU, kernel by kernel."""
    quick = bool(options.virtual)
    model = ModelConfig(hidden_size=512 if quick else 7168, n_routed_experts=64 if quick else 256)
    tokens = (options.tokens or [32 if quick else 4096])[0]
    given = inputs_of(mesh_of(), tokens, model)
    cases = [Case(way, form) for way in options.ways or ["pallas"] for form in ("none", "fp8")]
    programs = partial(_programs, how=kernel_by_kernel())
    built = compile_all({c: partial(programs, c, model, tokens, given) for c in cases})
    for case in cases:
        if isinstance(built[case], Exception):
            print(f"{case!s:38} {failure(built[case])}", flush=True)
            continue
        operands, rows, _ = _operands(case, built[case], given)
        operands.append(rows if case.dispatch_format == "fp8" else operands[1])
        for name, more in (("both", []), ("fwd+bwd", operands[:1])):
            program = built[case][name]
            call = partial(program, *operands, *more)
            found = kernel_classes.kernels(call, program.as_text(), calls=4)
            total = sum(kernel.ms for kernel in found) / jax.device_count()
            print(f"{case}, {name}: {1e3 * total:.0f} us in kernels of a GPU, and which")
            for kernel in found[: 24 if name == "both" else 32]:
                each, launches = kernel.ms / jax.device_count(), kernel.launches
                told = f"{1e3 * each:8.1f} us {launches / jax.device_count():4.1f}x"
                print(f"{told}  {kernel.name[:44]:44} {kernel.result[:34]:34} {kernel.path[-60:]}")
            sys.stdout.flush()


def _programs(
    case: Case, model: ModelConfig, tokens: int, given: Inputs, how: Any = None
) -> dict[str, Any]:
    """The parts of a case, compiled with the compiler options `how`, and their mesh."""
    mesh = mesh_of(case.nodes)
    config = ExpertParallelConfig(
        transport=case.transport,  # pyright: ignore[reportArgumentType]
        dispatch_format=case.dispatch_format,  # pyright: ignore[reportArgumentType]
        combine_format="bf16",
        multiprocessors=case.multiprocessors,
    )
    way = make_exchange(
        config,
        dict(mesh.shape),
        AXES,
        tokens=tokens,
        per_token=model.num_experts_per_tok,
        num_experts=model.n_routed_experts,
        max_nodes=model.topk_group,
        quantized_rows=case.dispatch_format == "fp8",
    )
    assert way.entries is not None
    alignment = group_alignment(way.entries, way.experts, None, None)
    spread = partial(jax.shard_map, mesh=mesh, out_specs=SPLIT)

    def there(x, w, e):
        x, w, e = vary((x, w, e), AXES)
        return dispatch(x, w, e, way, alignment)

    def alone(x, w, e):
        rows, sizes, handle = there(x, w, e)
        # What carries a gradient back is no array in a program that does not return it.
        return rows.numbers if isinstance(rows, StraightThrough) else rows, sizes, handle

    def both(x, w, e, given):
        rows, _, handle = there(x, w, e)
        if isinstance(rows, StraightThrough):  # what the experts make of FP8 numbers is BF16
            return combine(_instead(rows.carrier, given), handle, way), rows.numbers
        return combine(rows, handle, way), None

    def and_back(x, w, e, given, d_y):
        y, pull_back, numbers = jax.vjp(lambda x, w: both(x, w, e, given), x, w, has_aux=True)
        return y, *pull_back(d_y), numbers

    def shapes(tree):
        sharding = NamedSharding(mesh, SPLIT)
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
        )

    operands = shapes((given.x, given.weights, given.experts))
    rows, _, handle = jax.eval_shape(spread(there, in_specs=(SPLIT,) * 3), *operands)
    rows = shapes(jax.ShapeDtypeStruct(rows.shape, given.x.dtype))
    given_rows = rows if case.dispatch_format == "fp8" else operands[1]
    parts = {
        "dispatch": (alone, operands),
        "combine": (lambda r, h: combine(r, h, way), (rows, shapes(handle))),
        "both": (both, (*operands, given_rows)),
        "fwd+bwd": (and_back, (*operands, given_rows, operands[0])),
    }
    return {
        name: jax.jit(spread(f, in_specs=(SPLIT,) * len(o))).lower(*o).compile(how)
        for name, (f, o) in parts.items()
    } | {"mesh": mesh}


@jax.custom_vjp
def _instead(carrier, given):
    """The given rows, whose gradient is the carrier's."""
    return given


_instead.defvjp(lambda carrier, given: (given, None), lambda _, d_rows: (d_rows, None))


def _operands(case: Case, programs: dict[str, Any], given: Inputs):
    """Tokens, weights and choices; the experts' rows, as they arrived, and the handle."""
    place = NamedSharding(programs["mesh"], SPLIT)
    operands = [jax.device_put(a, place) for a in given[:3]]
    rows, _, handle = programs["dispatch"](*operands)
    if isinstance(rows, BlockScaled):
        rows = jax.jit(lambda numbers: dequantize(numbers, jnp.bfloat16))(rows)
    return operands, rows, handle


def _measure(case: Case, programs: dict[str, Any], given: Inputs, model: ModelConfig, quick: bool):
    operands, rows, handle = _operands(case, programs, given)
    more = rows if case.dispatch_format == "fp8" else operands[1]
    y, d_x, d_w, _ = programs["fwd+bwd"](*operands, more, operands[0])
    again = programs["fwd+bwd"](*operands, more, operands[0])
    same = all(bool((a == b).all()) for a, b in zip((y, d_x, d_w), again))
    # Experts that change nothing: each token comes back times the sum of its gate weights.
    want = np.asarray(given.x[:64], np.float32) * np.asarray(given.weights[:64].sum(1)[:, None])
    error = max(float(relative_error(got[:64], want)) for got in (y, d_x))
    took = {
        "dispatch": seconds_of(programs["dispatch"], *operands, quick=quick),
        "combine": seconds_of(programs["combine"], rows, handle, quick=quick),
        "both": seconds_of(programs["both"], *operands, more, quick=quick),
        "fwd+bwd": seconds_of(programs["fwd+bwd"], *operands, more, operands[0], quick=quick),
    }
    dim = model.hidden_size
    out = 2 * dim if case.dispatch_format == "none" else dim + dim // 128 * 4
    sent = given.leaving * (out + 2 * dim)
    rate, both_ways = sent / took["both"] / 1e9, 2 * sent / took["fwd+bwd"] / 1e9
    times = " ".join(f"{1e3 * seconds:8.3f}" for seconds in took.values())
    said = f"{rate:6.1f} ({rate * given.received / given.leaving:.1f}), {both_ways:6.1f}"
    return f"{times} | {said} | {error:.1e}{'' if same else ' NOT THE SAME BITS TWICE'}"


TORCH = """
import os, statistics, sys, time, torch, torch.distributed as dist, torch.multiprocessing as mp
def main(rank, n):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    torch.cuda.set_device(rank); dist.init_process_group("nccl", rank=rank, world_size=n)
    def seconds_of(f):
        for _ in range(5): f()
        times = []
        for _ in range(5):
            dist.barrier(); torch.cuda.synchronize(); start = time.perf_counter()
            for _ in range(20): f()
            torch.cuda.synchronize(); times.append((time.perf_counter() - start) / 20)
        return statistics.median(times)
    a = torch.randn(n * 4096, 7168, device="cuda", dtype=torch.bfloat16); b = torch.empty_like(a)
    x = a[:4096].contiguous(); leaving = (n - 1) * 4096 * 7168 * 2
    for name, f in {"all_to_all_single": lambda: dist.all_to_all_single(b, a),
                    "all_gather": lambda: dist.all_gather_into_tensor(b, x),
                    "reduce_scatter": lambda: dist.reduce_scatter_tensor(x, a)}.items():
        took = seconds_of(f)
        if rank == 0:
            rate = leaving / took / 1e9
            print(f"{'torch ' + name:44} {1e3 * took:8.3f} ms {rate:7.1f} GB/s", flush=True)
    dist.destroy_process_group()
if __name__ == "__main__":
    n = torch.cuda.device_count(); mp.spawn(main, args=(n,), nprocs=n)
"""


def torch_collectives(options: Options) -> None:
    """The same collectives by torch.distributed, one process a GPU; nothing without torch."""
    if options.virtual or importlib.util.find_spec("torch") is None:
        print("torch.distributed: not measured, no torch or no GPU")
        return
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "torch_collectives.py"
        script.write_text(TORCH)
        subprocess.run([sys.executable, str(script)], check=True)
