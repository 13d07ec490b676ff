"""Softmax over rows of an accumulator: what is shared and summed by columns, for Hopper.

Scores of FP8 pages are transposed, [64 tokens, heads]: a maximum or a sum over tokens goes across
lanes and warps. So neither is worked out for each page. A vector of columns has its numbers in
every lane that needs them. Of the sums each lane holds its share there, what its rows amount to,
which adding and scaling keep; they are put together at the end (`leave`). Interpreted, shares are
the sums.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from dsv3_jax.kernels.hopper import WGMMA, interpreted, plgpu
from dsv3_jax.kernels.hopper_integers import plus, times
from dsv3_jax.kernels.mla_decode import fp8_pages, wgmma
from dsv3_jax.kernels.mla_decode.registers import (
    THREADS,
    array,
    assemble,
    global_address,
    held,
    names,
    row_and_column,
    shared_address,
    tile_address,
)

LAYOUT = WGMMA.reduce(0)
ROWS = WGMMA.reduce(1)
LANE = plgpu.ShapeDtypeStruct(
    (THREADS,), jnp.float32, layout=plgpu.Layout.WG_STRIDED((THREADS,), 1)
)
SCALAR = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)
PLAIN = plgpu.RefType()
BARRIERS = 8  # of the hardware, from there on, one for each warpgroup; Mosaic's are the first four
WARPS = 4


def partials() -> int:
    """How many partial results of a vector of columns a warpgroup leaves."""
    return 1 if interpreted() else WARPS


def across(vector: Any) -> Any:
    """A vector of columns as an array [64, columns]."""
    return lax.broadcast_in_dim(vector, (64, *vector.shape), [1])


def fold(x: Any, factor: Any, start: Any, less: Any) -> Any:
    """x [64 tokens, columns] times a token's factor, plus its `start`, less a column's number."""
    if interpreted():
        down = lambda tokens: lax.broadcast_in_dim(tokens, x.shape, [0])  # noqa: E731
        return x * down(factor) + (down(start) - across(less))

    @plgpu.inline_mgpu(arg_types=(WGMMA, ROWS, ROWS, LAYOUT), return_type=wgmma.like(x))
    def multiply_add(_, x, factor, start, less):
        numbers = wgmma.numbers_of(x)
        count = len(numbers)
        first = 2 * count  # of the operands that follow x
        lines = ["{ .reg .f32 s;"]
        for i in range(count):
            row, column = i // 2 % 2, i // 4 * 2 + i % 2
            lines.append(f"sub.rn.f32 s, ${first + 2 + row}, ${first + 4 + column};")
            lines.append(f"fma.rn.f32 ${i}, ${count + i}, ${first + row}, s;")
        operands = [*numbers, *held(factor), *held(start), *held(less)]
        folded = assemble("f" * count, operands, "f" * len(operands), [*lines, "}"])
        return wgmma.as_accumulator(folded)

    return multiply_add(x, factor, start, less)


def nothing(count: int) -> Any:
    """Zeros of so many columns; shares of sums to begin with."""
    return plgpu.layout_cast(jnp.zeros((count,), jnp.float32), LAYOUT)


class Published(NamedTuple):
    """Of a page's weights: the lanes' shares of their sums, and a lane's largest exponent."""

    shares: Any
    largest: Any


def nothing_published(count: int) -> Published:
    """Of no weights, of so many columns."""
    if interpreted():
        return Published(nothing(count), jnp.float32(-jnp.inf))
    lowest = jnp.full((THREADS,), -jnp.inf, jnp.float32)
    return Published(nothing(count), plgpu.layout_cast(lowest, LANE.layout))


def publish(weights: Any, x: Any, made: Published, factor: Any, quarter: int) -> Published:
    """Writes weights 2^x [64 tokens, columns] as float16, for 16 columns, to a tile [64, 64].

    That is named as bfloat16. What was made before is returned with that quarter: its weights,
    times a factor for each token, among the shares.
    """
    shares, largest = made
    vector = plgpu.ShapeDtypeStruct(shares.shape, jnp.float32, layout=LAYOUT)
    if interpreted():
        part = slice(16 * quarter, 16 * quarter + 16)
        p = jnp.exp2(x[:, part])
        weights[:, part] = lax.bitcast_convert_type(p.astype(jnp.float16), jnp.bfloat16)
        total = jnp.sum(p * lax.broadcast_in_dim(factor, p.shape, [0]), axis=0)
        shares = lax.dynamic_update_slice(shares, total, (16 * quarter,))
        return Published(shares, jnp.maximum(largest, jnp.max(x[:, part])))

    @plgpu.inline_mgpu(
        arg_types=(wgmma.REF, WGMMA, LAYOUT, LANE.layout, ROWS), return_type=(vector, LANE)
    )
    def write(_, weights, x, shares, largest, factor):
        lines = ["{ .reg .b32 h<4>, a; .reg .f32 p<8>;", f"xor.b32 a, $13, {32 * quarter};"]
        lines += [f"ex2.approx.ftz.f32 p{i}, ${5 + i};" for i in range(8)]
        lines += [f"cvt.rn.f16x2.f32 h{i}, p{2 * i + 1}, p{2 * i};" for i in range(4)]
        lines.append("stmatrix.sync.aligned.m8n8.x4.shared.b16 [a], {h0, h1, h2, h3};")
        for i in (0, 1, 4, 5):
            column = i // 4 * 2 + i % 2
            lines.append(f"mul.rn.f32 ${column}, p{i}, $14;")
            lines.append(f"fma.rn.f32 ${column}, p{i + 2}, $15, ${column};")
        lines.append("max.f32 $4, $16, $5;")
        lines += [f"max.f32 $4, $4, ${5 + i};" for i in range(1, 8)]
        numbers = wgmma.numbers_of(x)[8 * quarter : 8 * quarter + 8]
        operands = [*numbers, tile_address(weights), *held(factor), *held(largest)]
        made = assemble("f" * 5, operands, "f" * 8 + "rfff", [*lines, "}"])
        all_of_them = held(shares)
        all_of_them[4 * quarter : 4 * quarter + 4] = made[:4]
        return array(all_of_them, vector), array(made[4:], LANE)

    return Published(*write(weights, x, shares, largest, factor))


def exceeds(largest: Any, limit: float, me: int) -> Any:
    """1 where a thread of warpgroup `me` has a number beyond a limit; else 0.

    Waits for its four warps, and wgmma sees what they have written.
    """
    if interpreted():
        plgpu.commit_smem()
        return (largest > limit).astype(jnp.int32)

    @plgpu.inline_mgpu(arg_types=(LANE.layout,), return_type=SCALAR)
    def vote(_, largest):
        lines = [
            f"{{ .reg .pred p, q; setp.gt.f32 p, $1, {_float(limit)};",
            "fence.proxy.async.shared::cta;",
            f"bar.red.or.pred q, {BARRIERS + me}, {THREADS}, p; selp.b32 $0, 1, 0, q; }}",
        ]
        return _scalar(assemble("r", held(largest), "f", lines)[0])

    return vote(largest)


def together(me: int, commit: bool = False) -> None:
    """Waits for the four warps of warpgroup `me`; its barrier's number takes no register.

    `commit`: wgmma sees what they have written.
    """
    if interpreted():
        return plgpu.commit_smem() if commit else None
    text = [f"bar.sync {BARRIERS + me}, {THREADS};"]
    if commit:
        text = ["fence.proxy.async.shared::cta;", *text]
    return plgpu.inline_mgpu()(lambda _: assemble("", [], "", text) and None)()


def leave_largest(x: Any, columns: Any) -> None:
    """Writes the largest numbers of each warp's rows of x [64, columns] to columns [warps, 64]."""
    if interpreted():
        columns[0, : x.shape[1]] = jnp.max(x, axis=0)
        return

    @plgpu.inline_mgpu(arg_types=(PLAIN, WGMMA))
    def write(_, columns, x):
        numbers = wgmma.numbers_of(x)
        pairs = [i for i in range(len(numbers)) if i % 4 < 2]
        _leave(columns, [arith.maximumf(numbers[i], numbers[i + 2]) for i in pairs], "max")

    write(columns, x)


def leave(shares: Any, columns: Any) -> None:
    """Writes the sums of each warp's lanes' shares to columns [warps, 64]."""
    if interpreted():
        columns[0, : shares.shape[0]] = shares
        return

    @plgpu.inline_mgpu(arg_types=(PLAIN, LAYOUT))
    def write(_, columns, shares):
        _leave(columns, held(shares), "add")

    write(columns, shares)


def store(out: Any, tile: Any) -> None:
    """Writes a tile [64 columns of values, heads] of a result to memory, out [heads, 64]."""
    if interpreted():
        out[...] = fp8_pages.in_order(tile).T.astype(out.dtype)
        return

    @plgpu.inline_mgpu(arg_types=(PLAIN, WGMMA))
    def write(_, out, tile):
        memref = ir.MemRefType(out.type)
        size = utils.bitwidth(memref.element_type) // 8
        pitch = memref.get_strides_and_offset()[0][0] * size
        warp, row, column = row_and_column()
        offset = plus(times(column, 2 * pitch), times(warp, 16 * size), times(row, 2 * size))
        numbers = wgmma.numbers_of(tile)
        lines = ["{ .reg .b32 t;"]
        for i in range(len(numbers)):
            if i % 4 >= 2:
                continue
            place = f"[${len(numbers)}+{(i // 4 * 8 + i % 2) * pitch}]"
            if size == 2:
                lines.append(f"cvt.rn.bf16x2.f32 t, ${i + 2}, ${i}; st.global.b32 {place}, t;")
            else:
                lines.append(f"st.global.v2.f32 {place}, {{${i}, ${i + 2}}};")
        operands = [*numbers, global_address(out, offset)]
        assemble("", operands, "f" * len(numbers) + "l", [*lines, "}"])

    write(out, tile)


def _float(x: float) -> str:
    return f"0f{np.float32(x).view(np.uint32):08X}"


def _leave(columns, numbers, operation: str) -> None:
    """Writes a lane's columns' numbers, put together over the lanes that have the same columns."""
    warp, row, column = row_and_column()
    place, count = plus(times(warp, 256), times(column, 8)), len(numbers)
    lines = [f"{{ .reg .f32 t; .reg .pred p; setp.eq.u32 p, ${2 * count + 1}, 0;"]
    for i in range(count):
        lines.append(f"mov.f32 ${i}, ${count + i};")
        for lane in (4, 8, 16):
            lines.append(f"shfl.sync.bfly.b32 t, ${i}, {lane}, 31, 0xffffffff;")
            lines.append(f"{operation}.f32 ${i}, ${i}, t;")
    for i in range(count // 2):
        lines.append(f"@p st.shared.v2.f32 [${2 * count}+{32 * i}], {names(2 * i, 2)};")
    operands = [*numbers, plus(shared_address(columns), place), row]
    assemble("f" * count, operands, "f" * count + "rr", [*lines, "}"])


def _scalar(value) -> Any:
    return fragmented_array.FragmentedArray.splat(value, (), is_signed=True)
