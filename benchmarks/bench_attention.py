"""Times attention on the real shapes against cuDNN (through torch) and XLA, in one run.

    python -m benchmarks.bench_attention [--only TEXT] [--out DIR]

Needs a Hopper GPU. A row is a pass (forward, or forward and backward) over one shape: microseconds,
TFLOP/s, how many times faster it is than torch's cuDNN attention and than XLA's, and the relative
errors beside those of XLA's bfloat16 products with a float32 softmax. Operations are counted with
the causal half: 2 (P + U) a pair forward, and 2 (3 P + 2 U) backward, whatever a kernel repeats.

Data are random normal, the L2 cache is flushed before every call, times are medians of CUPTI's
kernel durations. cuDNN's backward pass as torch calls it adds up dQ in any order (torch refuses it
in deterministic mode), ours has one order. XLA keeps the logits in memory, so its rows end where
they no longer fit.
"""

import argparse
import contextlib
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.bars import plot
from benchmarks.errors import relative_error
from benchmarks.side_by_side import answer
from benchmarks.side_by_side import rows as rows_of
from benchmarks.timing import machine, microseconds, microseconds_in_torch
from dsv3_jax.kernels.attention import api

OWN, SHARED, VALUE = 128, 64, 128  # dims of a head's own key, of the shared key, of the value
SCALE = (OWN + SHARED) ** -0.5
PEERS = {"cuDNN": "cudnn_us", "XLA": "xla_us"}
CHECKED_ROWS = 512  # the last ones, of two heads
XLA_LOGITS = 8 << 30  # bytes of float32 logits up to which XLA is timed


@dataclass(frozen=True)
class Shape:
    """One batch of rows that attend to themselves."""

    heads: int
    length: int
    backward: bool

    @property
    def flops(self) -> int:
        """Multiplications and additions of the pairs that see each other."""
        key, value = OWN + SHARED, VALUE
        each = 2 * (key + value) + (2 * (3 * key + 2 * value) if self.backward else 0)
        return self.heads * self.length**2 // 2 * each

    @property
    def label(self) -> str:
        """The row's name in tables."""
        name = "forward + backward" if self.backward else "forward"
        return f"{name}, {self.heads} heads, S {self.length}"


Plain = tuple[Callable[..., Any], ...]  # `_plain` in float32, and in bfloat16

SHAPES = tuple(
    Shape(heads, length, backward)
    for heads, length in ((128, 2048), (128, 4096), (128, 8192), (32, 16384), (128, 32768))
    for backward in (False, True)
    if length <= 16384 or not backward
)


@functools.partial(jax.jit, static_argnums=0)
def operands(shape: Shape) -> tuple[jax.Array, ...]:
    """Random normal q, keys with values, shared keys, and the output's cotangent."""
    rows, heads = (1, shape.length), shape.heads
    sizes = (
        (*rows, heads, OWN + SHARED),
        (*rows, heads, OWN + VALUE),
        (*rows, SHARED),
        (*rows, heads, VALUE),
    )
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return tuple(jax.random.normal(key, size, jnp.bfloat16) for size, key in zip(sizes, keys))


def attention_of(implementation: str, backward: bool) -> Any:
    """A jitted pass over `operands`: output and log-sum-exp, then gradients of the first three."""

    def attend(q, kv, k_shared):
        return api.mla_attention(q, kv, k_shared, scale=SCALE, implementation=implementation)

    def run(q, kv, k_shared, dout):
        if not backward:
            return attend(q, kv, k_shared)
        (out, lse), vjp = jax.vjp(attend, q, kv, k_shared)
        return out, lse, *vjp((dout, jnp.zeros_like(lse)))

    return jax.jit(run)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _plain(q, kv, k_shared, head, rows: int, dtype):
    """Output of the last rows of one head, in plain products of `dtype` and a float32 softmax."""
    first = kv.shape[1] - rows
    q = q[0, first:, head].astype(dtype)
    k = jnp.concatenate([kv[0, :, head, :OWN], k_shared[0]], axis=-1).astype(dtype)
    with jax.default_matmul_precision("highest"):
        logits = jnp.dot(q, k.T, preferred_element_type=jnp.float32) * SCALE
        mask = jnp.arange(first, kv.shape[1])[:, None] >= jnp.arange(kv.shape[1])
        probs = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1).astype(dtype)
        return jnp.dot(probs, kv[0, :, head, OWN:].astype(dtype))


def errors(inputs: Sequence[jax.Array], out: jax.Array, plain: Plain) -> list[float]:
    """Relative errors of the output's last rows: ours, and of bfloat16 products."""
    exactly, roughly = plain
    rows, heads = min(CHECKED_ROWS, out.shape[1]), out.shape[2]
    worst = [0.0, 0.0]
    for head in (0, heads - 1):
        exact = exactly(*inputs[:3], jnp.int32(head))
        for i, got in enumerate((out[0, -rows:, head], roughly(*inputs[:3], jnp.int32(head)))):
            worst[i] = max(worst[i], float(relative_error(got, exact)))
    return worst


def cudnn_microseconds(shape: Shape) -> float | None:
    """Time of torch's cuDNN attention; None where torch does not have it or it refuses."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return None
    on_gpu: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)
    sizes = (OWN + SHARED, OWN + SHARED, VALUE)
    q, k, v = (
        torch.randn(1, shape.heads, shape.length, size, requires_grad=True, **on_gpu)
        for size in sizes
    )
    dout = torch.randn(1, shape.heads, shape.length, VALUE, **on_gpu)

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def run():
        if not shape.backward:
            with torch.no_grad():
                return attend()
        q.grad = k.grad = v.grad = None
        return attend().backward(dout)

    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return microseconds_in_torch(run)
    except RuntimeError as error:
        print(f"cuDNN, {shape.label}: {error}"[:300])
        return None
    finally:
        del q, k, v, dout
        torch.cuda.empty_cache()


def prepare(shape: Shape) -> Callable[[], dict[str, Any]]:
    """A row's measurement, compiled."""
    draw = operands.lower(shape)
    rows, head = min(CHECKED_ROWS, shape.length), jax.ShapeDtypeStruct((), jnp.int32)
    plain = tuple(
        _plain.lower(*draw.out_info[:3], head, rows, dtype).compile()
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    ours = attention_of("pallas_gpu", shape.backward).lower(*draw.out_info).compile()
    xla = None
    if shape.heads * shape.length**2 * 4 <= XLA_LOGITS:
        xla = attention_of("reference", shape.backward).lower(*draw.out_info).compile()
    with contextlib.suppress(ImportError):
        import torch as _  # noqa: F401, seconds
    return functools.partial(measure, shape, draw.compile(), ours, plain, xla)


def measure(
    shape: Shape,
    draw: Callable[[], Any],
    ours: Callable[..., Any],
    plain: Plain,
    xla: Callable[..., Any] | None,
) -> dict[str, Any]:
    """One row of the table."""
    inputs = draw()
    first, second = ours(*inputs), ours(*inputs)
    same = all(bool((a == b).all()) for a, b in zip(first, second))
    error, plain_error = errors(inputs, first[0], plain)
    del first, second
    us = microseconds(ours, inputs)
    xla_us = microseconds(xla, inputs) if xla is not None else None
    del inputs
    return {
        "shape": shape.label,
        "us": us,
        "tflops": shape.flops / us / 1e6,
        "error": error,
        "bf16_error": plain_error,
        "same_twice": same,
        "xla_us": xla_us,
        "cudnn_us": cudnn_microseconds(shape),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| attention 192/128, causal | us | TFLOP/s | error | bf16 products | same twice "
        "| x cuDNN | x XLA |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ratios = [
            f"{row[key] / row['us']:.2f}" if row[key] else "" for key in ("cudnn_us", "xla_us")
        ]
        lines.append(
            f"| {row['shape']} | {row['us']:.1f} | {row['tflops']:.0f} | {row['error']:.1e} "
            f"| {row['bf16_error']:.1e} | {'yes' if row['same_twice'] else 'NO'} "
            f"| {' | '.join(ratios)} |"
        )
    return "\n".join(lines)


def write(folder: Path, start: str, rows: Sequence[dict[str, Any]]) -> None:
    """The rows so far as JSON, as a table and as a plot."""
    folder.mkdir(parents=True, exist_ok=True)
    told = dict(before=start, after=machine(), rows=rows)
    (folder / "attention.json").write_text(json.dumps(told, indent=1))
    (folder / "attention.md").write_text(table(rows) + "\n")
    labels = [row["shape"] for row in rows]
    unit = "TFLOP/s, causal half counted"
    plot(rows, labels, PEERS, folder / "attention.png", unit)


def main() -> None:
    """Parses the command line, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="shapes whose label holds this text")
    parser.add_argument("--out", type=Path, help="folder for attention.json, .md and .png")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        return answer(functools.partial(prepare, SHAPES[options.row]))
    start, rows = machine(), []
    print(start, flush=True)
    labels = [shape.label for shape in SHAPES]
    numbers = [i for i, label in enumerate(labels) if options.only in label]
    for row in rows_of("benchmarks.bench_attention", labels, numbers):
        rows.append(row)
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        if options.out:
            write(options.out, start, rows)
    print(f"{table(rows)}\nbefore: {start}\nafter: {machine()}")


if __name__ == "__main__":
    main()
