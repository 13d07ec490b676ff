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
import contextlib
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bars import plot
from benchmarks.errors import relative_error
from benchmarks.side_by_side import answer
from benchmarks.side_by_side import rows as rows_of
from benchmarks.timing import copy_rate, machine, microseconds, microseconds_in_torch
from dsv3_jax.analysis.hardware import accelerator
from dsv3_jax.kernels.mla_decode import hopper_block, pallas_gpu, reference
from dsv3_jax.kernels.mla_decode.api import Pages, Rows
from dsv3_jax.kernels.mla_decode.kv_splits import PAGE, split_kv
from dsv3_jax.kernels.mla_decode.operands import fp8_latents, rotated_keys, scaled_keys
from dsv3_jax.model.cache import PagedCache, append
from dsv3_jax.quantization.block_scaled import BlockScaled, dequantize

LATENT, ROPE = 512, 64
SCALE = 1 / math.sqrt(192)  # of V3's expanded heads, 128 + 64
PEERS = {"XLA, contiguous": "xla_us", "torch (cuBLAS), contiguous": "torch_us"}


@dataclass(frozen=True)
class Shape:
    """`batch` sequences of `length` tokens; the last `new` of each ask, with `heads` heads.

    `ragged`: of any lengths from `new` to twice that.
    """

    batch: int
    heads: int
    length: int
    new: int = 1
    fp8: bool = False
    ragged: bool = False

    @property
    def label(self) -> str:
        """The row's name in tables."""
        suffix = " fp8" * self.fp8 + " on average, ragged" * self.ragged
        return f"b {self.batch}, {self.heads} heads x {self.new}, {self.length} tokens{suffix}"

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int32."""
        if not self.ragged:
            return np.full(self.batch, self.length, np.int32)
        rng = np.random.default_rng(0)
        return rng.integers(self.new, 2 * self.length, self.batch, np.int32, endpoint=True)

    @property
    def flops(self) -> int:
        """Of both products, over all keys."""
        return 2 * self.new * self.heads * int(self.lengths.sum()) * (2 * LATENT + ROPE)

    @property
    def bytes(self) -> int:
        """Every cached row once, queries and outputs once."""
        row = LATENT + 4 + 2 * ROPE if self.fp8 else 2 * (LATENT + ROPE)
        queries = self.batch * self.new * self.heads
        return int(self.lengths.sum()) * row + 2 * queries * (2 * LATENT + ROPE)


SHAPES = (
    Shape(128, 128, 4096),
    Shape(128, 128, 4096, new=2),
    Shape(128, 64, 4096),
    Shape(128, 32, 4096),
    Shape(128, 16, 4096),
    Shape(128, 16, 4096, new=2),
    Shape(1, 128, 32768),
    Shape(1, 128, 4096),
    Shape(8, 128, 4096),
    Shape(32, 128, 4096),
    Shape(128, 128, 4096, ragged=True),
    Shape(128, 128, 4096, fp8=True),
    Shape(128, 128, 4096, new=2, fp8=True),
    Shape(128, 64, 4096, fp8=True),
    Shape(128, 32, 4096, fp8=True),
    Shape(128, 16, 4096, fp8=True),
    Shape(128, 16, 4096, new=2, fp8=True),
    Shape(1, 128, 32768, fp8=True),
)


def _draw(shape: Shape, key) -> dict[str, Any]:
    """The arrays of `Pages`, by name."""
    keys = jax.random.split(key, 4)
    queries = (shape.batch, shape.new, shape.heads)
    pages = int((-(-shape.lengths // PAGE)).sum())
    sizes = ((*queries, LATENT), (*queries, ROPE), (pages, PAGE, LATENT), (pages, PAGE, ROPE))
    out = [jax.random.normal(k, size, jnp.bfloat16) for k, size in zip(keys, sizes)]
    if shape.fp8:
        out[2] = fp8_latents(out[2])
        out[3] = scaled_keys(out[2], out[3])
    return dict(zip(("q_latent", "q_rope", "latent", "k_rope"), out, strict=True))


def _table(shape: Shape) -> np.ndarray:
    """The pages of each sequence, in any order."""
    pages = -(-shape.lengths // PAGE)
    numbers = np.random.default_rng(0).permutation(int(pages.sum())).astype(np.int32)
    table = np.full((shape.batch, int(pages.max())), -1, np.int32)
    table[np.arange(table.shape[1]) < pages[:, None]] = numbers
    return table


class Prepared(NamedTuple):
    """A shape's functions, compiled."""

    shape: Shape
    draw: Callable[..., Any]
    plan: Callable[..., Any]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    xla: Callable[..., Any] | None

    @classmethod
    def of(cls, shape: Shape) -> "Prepared":
        """Compiles ours, the reference for one sequence, and the peer."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        drawn = jax.eval_shape(functools.partial(_draw, shape), key)
        table, lengths = (_shape_of(x) for x in (_table(shape), shape.lengths))
        work = Pages(**drawn, block_table=table, lengths=lengths)
        parts = hopper_block.parts_of(shape.new * shape.heads)
        plan = jax.jit(functools.partial(split_kv, parts=parts)).lower(lengths)

        def ours(schedule, work):
            return pallas_gpu.mla_decode(work, scale=SCALE, schedule=schedule)[0]

        xla = None
        if not shape.fp8 and not shape.ragged:
            contiguous = functools.partial(reference.mla_decode_contiguous, scale=SCALE)
            xla = jax.jit(contiguous).lower(jax.eval_shape(_contiguous, work)).compile()
        plain = jax.jit(functools.partial(reference.mla_decode, scale=SCALE))
        return cls(
            shape,
            jax.jit(functools.partial(_draw, shape)).lower(key).compile(),
            plan.compile(),
            jax.jit(ours).lower(plan.out_info, work).compile(),
            plain.lower(jax.eval_shape(_first, work)).compile(),
            xla,
        )


def _contiguous(work: Pages) -> Rows:
    """What the peers read: as many rows, in another order."""
    batch = work.lengths.shape[0]
    latent, k_rope = (x.reshape(batch, -1, x.shape[-1]) for x in (work.latent, work.k_rope))
    return Rows(
        q_latent=work.q_latent,
        q_rope=work.q_rope,
        latent=latent,
        k_rope=k_rope,
        lengths=work.lengths,
    )


def _shape_of(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _first(work: Pages) -> Pages:
    """The first sequence alone, its pages in order in a pool of its own."""
    pages = work.block_table[0]
    latent, k_rope = jax.tree.map(lambda x: x[pages], (work.latent, work.k_rope))
    return Pages(
        q_latent=work.q_latent[:1],
        q_rope=work.q_rope[:1],
        latent=latent,
        k_rope=k_rope,
        block_table=jnp.arange(pages.size, dtype=jnp.int32)[None],
        lengths=work.lengths[:1],
    )


def _errors(out, work: Pages, plain: Callable[..., Any]) -> list[float]:
    """Relative errors of the first sequence: of `out`, and of a bfloat16 reference."""
    first = _first(work)
    approximate, _ = plain(first)
    latent, rope = first.latent, rotated_keys(first.latent, first.k_rope)
    if isinstance(latent, BlockScaled):
        latent = dequantize(latent, jnp.float32)
    # On the host: XLA takes half a minute to tune float32 products at the highest precision.
    q, q_r, keys, ropes = (
        np.asarray(x.astype(jnp.float32), np.float64)
        for x in (first.q_latent, first.q_rope, latent, rope)
    )
    keys, ropes = keys.reshape(-1, LATENT), ropes.reshape(-1, ROPE)
    new = q.shape[1]
    exact = np.zeros(q.shape[1:])
    for t in range(new):
        seen = int(work.lengths[0]) - (new - 1 - t)
        logits = SCALE * (q[0, t] @ keys[:seen].T + q_r[0, t] @ ropes[:seen].T)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        exact[t] = weights / weights.sum(-1, keepdims=True) @ keys[:seen]
    return [float(relative_error(x[0], exact)) for x in (out[:1], approximate)]


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

    def attend():
        logits = torch.bmm(q, keys.mT)
        weights = torch.softmax(logits * SCALE, -1, dtype=torch.float32).to(torch.bfloat16)
        return torch.bmm(weights, keys[..., :LATENT])

    return microseconds_in_torch(attend)


def measure(prepared: Prepared) -> dict[str, Any]:
    """One row of the table."""
    shape = prepared.shape
    drawn = prepared.draw(jax.random.key(0))
    table, lengths = jnp.asarray(_table(shape)), jnp.asarray(shape.lengths)
    work = Pages(**drawn, block_table=table, lengths=lengths)
    schedule = prepared.plan(work.lengths)
    us = microseconds(prepared.ours, (schedule, work))
    error, plain_error = _errors(prepared.ours(schedule, work), work, prepared.plain)
    row = {"shape": shape.label, "us": us, "error": error, "plain_error": plain_error}
    row["schedule_us"] = microseconds(prepared.plan, (work.lengths,))
    row["xla_us"] = row["torch_us"] = None
    if prepared.xla is not None:
        row["xla_us"] = microseconds(prepared.xla, (_contiguous(work),))
        row["torch_us"] = torch_microseconds(shape)
    chip = accelerator("h200" if "H200" in machine() else "h100")
    floor = max(shape.flops / chip.peak_flops(False), shape.bytes / chip.hbm_bandwidth)
    row["tflops"], row["gb_s"] = shape.flops / us / 1e6, shape.bytes / us / 1e3
    row["floor_percent"] = 100 * floor / (us * 1e-6)
    return row


def around() -> dict[str, float]:
    """Microseconds of what surrounds the kernel in a layer: 128 sequences, 128 heads."""
    shape = Shape(128, 128, 4096)
    draw = jax.jit(functools.partial(_draw, shape))
    drawn = draw(jax.random.key(0))
    q_latent, rope = drawn["q_latent"], drawn["k_rope"]
    nope = jax.random.normal(jax.random.key(1), (128, 1, 128, 128), jnp.bfloat16)
    w_uk = jax.random.normal(jax.random.key(2), (128, 128, LATENT), jnp.bfloat16)
    new = (q_latent[:, :, 0], rope[:128, :1])
    start = jnp.asarray(shape.lengths) - 1
    append_token = jax.jit(append, donate_argnums=0)
    table = jnp.asarray(_table(shape))
    state = [PagedCache(latent=drawn["latent"], k_rope=rope, block_table=table)]

    def step():
        state[0] = append_token(state[0], *new, start)
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
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = 2 * 8192**3 / microseconds(jax.jit(lambda a: a @ a), (a,)) / 1e6
    return {"copy GB/s": 1e3 * copy_rate(), "bf16 8192^3 TFLOP/s": product}


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


def prepared_row(number: int) -> Callable[[], dict[str, Any]]:
    """A row's measurement, compiled."""
    prepared = Prepared.of(SHAPES[number])
    with contextlib.suppress(ImportError):
        import torch as _  # noqa: F401, seconds
    return functools.partial(measure, prepared)


def main() -> None:
    """Parses the command line, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="shapes whose label holds this text")
    parser.add_argument("--out", type=Path, help="folder for decode.json, decode.md and decode.png")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        return answer(functools.partial(prepared_row, options.row))
    before, rows = machine(), []
    numbers = [i for i, shape in enumerate(SHAPES) if options.only in shape.label]
    for row in rows_of("benchmarks.bench_decode", [shape.label for shape in SHAPES], numbers):
        rows.append(row)
        print(table(rows[-1:]).splitlines()[-1], f"{rows[-1]['schedule_us']:.1f}", flush=True)
    told: dict[str, Any] = {"before": before, "rows": rows, "yardsticks": yardsticks()}
    if not options.only:
        told["around"] = around()
    told["after"] = machine()
    for name in ("yardsticks", "around"):
        print(told.get(name, ""))
    print(f"{table(rows)}\nbefore: {before}\nafter: {told['after']}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "decode.json").write_text(json.dumps(told, indent=1))
        (options.out / "decode.md").write_text(table(rows) + "\n")
        plot(rows, [row["shape"] for row in rows], PEERS, options.out / "decode.png")


if __name__ == "__main__":
    main()
