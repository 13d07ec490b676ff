"""Times paged latent attention on decoding shapes against XLA and torch, in one run.

    python -m benchmarks.bench_decode [--only TEXT] [--out DIR]

Needs a Hopper GPU. One row a shape: microseconds of all kernels together, TFLOP/s, GB/s, the
percentage of the roofline floor (datasheet peaks), relative error against a float64 softmax of one
sequence beside that of a bfloat16 reference, and how many times faster it is than its peers: the
absorbed form by XLA, and by torch's batched products (cuBLAS). Both read contiguous rows; nothing
else on the machine reads pages. The first lines are yardsticks: a copy, and a bfloat16 product.

Keys are in pages at random places. The schedule depends on lengths only and is shared by all layers
of a step, so that it is timed on its own; so are appending a token and the absorbed projections.
Data are random normal, the L2 cache is flushed before every call, times are medians of CUPTI's
kernel durations.
"""

import argparse
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bench_gemm import _kernel_microseconds, machine, microseconds
from dsv3_jax.analysis.hardware import accelerator
from dsv3_jax.kernels.mla_decode import pallas_gpu, reference
from dsv3_jax.kernels.mla_decode.schedule import PAGE, make_schedule
from dsv3_jax.model.cache import PagedCache, append_paged
from dsv3_jax.quantization.block_scaled import PER_TOKEN, quantize

LATENT, ROPE = 512, 64
SCALE = 1 / math.sqrt(192)  # of V3's expanded heads, 128 + 64


@dataclass(frozen=True)
class Shape:
    """`batch` sequences of `length` tokens; the last `new` of each ask, with `heads` heads."""

    batch: int
    heads: int
    length: int
    new: int = 1
    fp8: bool = False

    @property
    def label(self) -> str:
        """The row's name in tables."""
        suffix = " fp8" if self.fp8 else ""
        return f"b {self.batch}, {self.heads} heads x {self.new}, {self.length} tokens{suffix}"

    @property
    def flops(self) -> int:
        """Of both products, over all keys."""
        return 2 * self.batch * self.new * self.heads * self.length * (2 * LATENT + ROPE)

    @property
    def bytes(self) -> int:
        """Every cached row once, queries and outputs once."""
        row = LATENT + 4 * LATENT // 128 + 2 * ROPE if self.fp8 else 2 * (LATENT + ROPE)
        return self.batch * (self.length * row + 2 * self.new * self.heads * (2 * LATENT + ROPE))


SHAPES = (
    Shape(128, 128, 4096),
    Shape(128, 128, 4096, new=2),
    Shape(128, 64, 4096),
    Shape(128, 16, 4096),
    Shape(1, 128, 32768),
    Shape(1, 128, 4096),
    Shape(32, 128, 4096),
    Shape(128, 64, 4096, fp8=True),
)


@functools.partial(jax.jit, static_argnums=0)
def _draw(shape: Shape, key):
    keys = jax.random.split(key, 4)
    queries = (shape.batch, shape.new, shape.heads)
    pages = shape.batch * shape.length // PAGE
    sizes = ((*queries, LATENT), (*queries, ROPE), (pages, PAGE, LATENT), (pages, PAGE, ROPE))
    return tuple(jax.random.normal(k, size, jnp.bfloat16) for k, size in zip(keys, sizes))


def operands(shape: Shape) -> tuple[Any, ...]:
    """Queries, pages in any order, table and lengths."""
    q_latent, q_rope, latent, rope = _draw(shape, jax.random.key(0))
    if shape.fp8:
        latent = jax.jit(lambda x: quantize(x, PER_TOKEN))(latent)
    pages = np.random.default_rng(0).permutation(rope.shape[0]).astype(np.int32)
    lengths = jnp.full(shape.batch, shape.length, jnp.int32)
    return q_latent, q_rope, latent, rope, jnp.asarray(pages.reshape(shape.batch, -1)), lengths


def _errors(out, q_latent, q_rope, latent, rope, table, lengths) -> list[float]:
    """Relative errors of the first sequence: of `out`, and of a bfloat16 reference."""
    pages = (latent[table[0]], rope[table[0]], jnp.arange(table.shape[1], dtype=jnp.int32)[None])
    first = (q_latent[:1], q_rope[:1], *pages, lengths[:1])
    plain = jax.jit(functools.partial(reference.mla_decode, scale=SCALE))(*first)
    # On the host: XLA takes half a minute to tune float32 products at the highest precision.
    q, q_r, keys, ropes = (np.asarray(x.astype(jnp.float32), np.float64) for x in first[:4])
    keys, ropes = keys.reshape(-1, LATENT), ropes.reshape(-1, ROPE)
    new = q.shape[1]
    exact = np.zeros(q.shape[1:])
    for t in range(new):
        seen = int(lengths[0]) - (new - 1 - t)
        logits = SCALE * (q[0, t] @ keys[:seen].T + q_r[0, t] @ ropes[:seen].T)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        exact[t] = weights / weights.sum(-1, keepdims=True) @ keys[:seen]
    return [
        float(np.linalg.norm(np.asarray(x[0].astype(jnp.float32)) - exact) / np.linalg.norm(exact))
        for x in (out[:1], plain)
    ]


@jax.jit
def _xla(q_latent, q_rope, latent, rope, lengths):
    return reference.mla_decode_contiguous(q_latent, q_rope, latent, rope, lengths, scale=SCALE)


def torch_microseconds(shape: Shape) -> float | None:
    """Time of the absorbed form by torch's batched products; None where there is no torch."""
    try:
        import torch
    except ImportError:
        return None
    on_gpu = dict(device="cuda", dtype=torch.bfloat16)
    rows = shape.new * shape.heads
    q = torch.randn(shape.batch, rows, LATENT + ROPE, **on_gpu)
    keys = torch.randn(shape.batch, shape.length, LATENT + ROPE, **on_gpu)
    buffer = torch.zeros(64 << 20, device="cuda")

    def attend():
        logits = torch.bmm(q, keys.mT)
        weights = torch.softmax(logits * SCALE, -1, dtype=torch.float32).to(torch.bfloat16)
        return torch.bmm(weights, keys[..., :LATENT])

    def calls():
        for _ in range(10):
            buffer.add_(1)
            attend()
        torch.cuda.synchronize()

    attend()
    torch.cuda.synchronize()
    return _kernel_microseconds(calls)


def measure(shape: Shape) -> dict[str, Any]:
    """One row of the table."""
    work = operands(shape)
    parts = pallas_gpu.parts_of(shape.new * shape.heads)
    plan = jax.jit(functools.partial(make_schedule, parts=parts))
    schedule = plan(work[-1])

    @jax.jit
    def ours(schedule, *work):
        return pallas_gpu.mla_decode(*work, scale=SCALE, schedule=schedule)

    row = {"shape": shape.label, "us": microseconds(ours, (schedule, *work))}
    row["schedule_us"] = microseconds(plan, (work[-1],))
    row["error"] = row["plain_error"] = row["xla_us"] = row["torch_us"] = None
    if not shape.fp8:
        row["error"], row["plain_error"] = _errors(ours(schedule, *work), *work)
        rows = tuple(x.reshape(shape.batch, -1, x.shape[-1]) for x in work[2:4])
        row["xla_us"] = microseconds(_xla, (*work[:2], *rows, work[-1]))
        row["torch_us"] = torch_microseconds(shape)
    chip = accelerator("h200" if "H200" in machine() else "h100")
    floor = max(shape.flops / chip.peak_flops(False), shape.bytes / chip.hbm_bandwidth)
    row["tflops"], row["gb_s"] = shape.flops / row["us"] / 1e6, shape.bytes / row["us"] / 1e3
    row["floor_percent"] = 100 * floor / (row["us"] * 1e-6)
    return row


def around() -> dict[str, float]:
    """Microseconds of what surrounds the kernel in a layer: 128 sequences, 128 heads."""
    shape = Shape(128, 128, 4096)
    q_latent, q_rope, latent, rope, table, lengths = operands(shape)
    nope = jax.random.normal(jax.random.key(1), (128, 1, 128, 128), jnp.bfloat16)
    w_uk = jax.random.normal(jax.random.key(2), (128, 128, LATENT), jnp.bfloat16)
    cache = PagedCache(latent, rope, table)
    new = (q_latent[:, :, 0], q_rope[:, :, 0])
    append = jax.jit(append_paged, donate_argnums=0)
    state = [cache]

    def step():
        state[0] = append(state[0], *new, lengths - 1)
        return state[0]

    absorb = jax.jit(lambda q, w: jnp.einsum("BTNH,NHC->BTNC", q, w))
    expand = jax.jit(lambda c, w: jnp.einsum("BTNC,NUC->BTNU", c, w))
    return {
        "append one token": microseconds(step, ()),
        "q by W^UK": microseconds(absorb, (nope, w_uk)),
        "context by W^UV": microseconds(expand, (q_latent, w_uk)),
    }


def yardsticks() -> dict[str, float]:
    """GB/s of a copy, and TFLOP/s of a bfloat16 product, 8192 x 8192 x 8192."""
    x = jnp.zeros(1 << 28, jnp.float32)
    copy = 2 * x.nbytes / microseconds(jax.jit(lambda x: x * 2), (x,)) / 1e3
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = 2 * 8192**3 / microseconds(jax.jit(lambda a: a @ a), (a,)) / 1e6
    return {"copy GB/s": copy, "bf16 8192^3 TFLOP/s": product}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| shape | us | TFLOP/s | GB/s | of the floor | error | bf16 error | x XLA | x torch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [f"{row[k]:.1e}" if row[k] else "" for k in ("error", "plain_error")]
        cells += [f"{row[k] / row['us']:.1f}" if row[k] else "" for k in ("xla_us", "torch_us")]
        lines.append(
            f"| {row['shape']} | {row['us']:.1f} | {row['tflops']:.0f} | {row['gb_s']:.0f} "
            f"| {row['floor_percent']:.0f} % | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parses the command line, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="shapes whose label holds this text")
    parser.add_argument("--out", type=Path, help="folder for decode.json and decode.md")
    options = parser.parse_args()
    start, rows = machine(), []
    told: dict[str, Any] = {"before": start, "yardsticks": yardsticks()}
    print(start, told["yardsticks"], flush=True)
    for shape in SHAPES:
        if options.only in shape.label:
            rows.append(measure(shape))
            print(table(rows[-1:]).splitlines()[-1], f"{rows[-1]['schedule_us']:.1f}", flush=True)
    if not options.only:
        told["around"] = around()
        print(told["around"])
    told |= {"rows": rows, "after": machine()}
    print(f"{table(rows)}\nbefore: {start}\nafter: {told['after']}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "decode.json").write_text(json.dumps(told, indent=1))
        (options.out / "decode.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
