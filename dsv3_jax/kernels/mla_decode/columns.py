"""Softmax over rows of an accumulator: what is shared and summed by columns, for Hopper.

Scores of FP8 pages are transposed, [64 tokens, 64 heads]: a maximum or a sum over tokens goes
across lanes and warps. So neither is worked out for each page. A vector of columns has its numbers
in every lane that needs them. The sums are held as each lane's share, what its rows amount to, in
shared memory, where registers are scarce, and are put together at the end (`leave`). Interpreted,
they are one vector.
"""

from typing import Any

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
    warp_and_lane,
)

LAYOUT = WGMMA.reduce(0)
ROWS = WGMMA.reduce(1)
TILE = plgpu.ShapeDtypeStruct((64, 64), jnp.float32, layout=WGMMA)
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
    """A vector of columns as an array [64, 64]."""
    return lax.broadcast_in_dim(vector, (64, 64), [1])


def largest(x: Any, half: int, used: int) -> Any:
    """A lane's largest number of x [64 tokens, columns], of half of the columns before `used`."""
    end = min(32 * half + 32, used)
    if interpreted():
        return jnp.max(x[:, 32 * half : end])

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=LANE)
    def compare(_, x):
        operands = wgmma.numbers_of(x)[16 * half : end // 2]
        count = len(operands)
        lines = ["{ .reg .f32 m, n; max.f32 m, $1, $2; max.f32 n, $3, $4;"]
        lines += [f"max.f32 {'mn'[i % 2]}, {'mn'[i % 2]}, ${1 + i};" for i in range(4, count)]
        return array(assemble("f", operands, "f" * count, [*lines, "max.f32 $0, m, n; }"]), LANE)

    return compare(x)


def fold(x: Any, factor: Any, start: Any, used: int) -> Any:
    """x [64 tokens, columns] times a token's factor, plus `start`, a number for each token or x's.

    All in one instruction a number. Columns from `used` on stay as they are.
    """
    rows = start.ndim == 1
    if interpreted():
        down = lambda tokens: lax.broadcast_in_dim(tokens, x.shape, [0])  # noqa: E731
        folded = x * down(factor) + (down(start) if rows else start)
        return folded.at[:, used:].set(x[:, used:])

    @plgpu.inline_mgpu(arg_types=(WGMMA, ROWS, ROWS if rows else WGMMA), return_type=TILE)
    def multiply_add(_, x, factor, start):
        count, numbers = used // 2, wgmma.numbers_of(x)
        factors, first = [f"${2 * count + i}" for i in range(2)], 2 * count + 2
        lines = [
            f"fma.rn.f32 ${i}, ${count + i}, {factors[i // 2 % 2]}, "
            f"${first + (i // 2 % 2 if rows else i)};"
            for i in range(count)
        ]
        starts = held(start) if rows else wgmma.numbers_of(start)[:count]
        operands = [*numbers[:count], *held(factor), *starts]
        folded = assemble("f" * count, operands, "f" * len(operands), lines)
        return wgmma.as_accumulator([*folded, *numbers[count:]])

    return multiply_add(x, factor, start)


def publish(weights: Any, x: Any, sums: Any, factor: Any, quarter: int) -> None:
    """Writes weights 2^x [64 tokens, 64 columns] as float16, for a quarter of the columns.

    The tile [64, 64] is named as bfloat16. Adds them, times a factor for each token, to the lanes'
    shares of the sums.
    """
    if interpreted():
        part = slice(16 * quarter, 16 * quarter + 16)
        p = jnp.exp2(x[:, part])
        weights[:, part] = lax.bitcast_convert_type(p.astype(jnp.float16), jnp.bfloat16)
        sums[part] += jnp.sum(p * lax.broadcast_in_dim(factor, p.shape, [0]), axis=0)
        return

    @plgpu.inline_mgpu(arg_types=(wgmma.REF, WGMMA, PLAIN, ROWS))
    def write(_, weights, x, sums, factor):
        place = f"[$9+{16 * THREADS * quarter}]"
        lines = ["{ .reg .b32 h<4>, a; .reg .f32 p<8>, t<4>;", f"xor.b32 a, $8, {32 * quarter};"]
        lines.append(f"ld.shared.v4.f32 {{t0, t1, t2, t3}}, {place};")
        lines += [f"ex2.approx.ftz.f32 p{i}, ${i};" for i in range(8)]
        lines += [f"cvt.rn.f16x2.f32 h{i}, p{2 * i + 1}, p{2 * i};" for i in range(4)]
        lines.append("stmatrix.sync.aligned.m8n8.x4.shared.b16 [a], {h0, h1, h2, h3};")
        for i in range(8):
            column, row = i // 4 * 2 + i % 2, i // 2 % 2
            lines.append(f"fma.rn.f32 t{column}, p{i}, ${10 + row}, t{column};")
        lines.append(f"st.shared.v4.f32 {place}, {{t0, t1, t2, t3}}; }}")
        numbers = wgmma.numbers_of(x)[8 * quarter : 8 * quarter + 8]
        operands = [*numbers, tile_address(weights), _share(sums), *held(factor)]
        assemble("", operands, "f" * 8 + "rrff", lines)

    write(weights, x, sums, factor)


def agree(a: Any, b: Any, limit: float, me: int) -> Any:
    """1 where a thread of this warpgroup has a number beyond a limit, of two; else 0."""
    if interpreted():
        return (jnp.maximum(a, b) > limit).astype(jnp.int32)

    @plgpu.inline_mgpu(arg_types=(LANE.layout,) * 2, return_type=SCALAR)
    def vote(_, *numbers):
        lines = [
            "{ .reg .pred p, q; .reg .f32 m; max.f32 m, $1, $2;",
            f"setp.gt.f32 p, m, {_float(limit)};",
            f"bar.red.or.pred q, {BARRIERS + me}, {THREADS}, p; selp.b32 $0, 1, 0, q; }}",
        ]
        operands = [value for number in numbers for value in held(number)]
        return _scalar(assemble("r", operands, "ff", lines)[0])

    return vote(a, b)


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


def sums_shape() -> tuple[int, ...]:
    """Of room in shared memory for a warpgroup's lanes' shares of a vector of columns."""
    return (64,) if interpreted() else (16 * THREADS,)


def clear(sums: Any) -> None:
    """Makes the lanes' shares zero."""
    if interpreted():
        sums[...] = jnp.zeros(64)
        return

    @plgpu.inline_mgpu(arg_types=(PLAIN,))
    def write(_, sums):
        lines = ["{ .reg .f32 z; mov.f32 z, 0f00000000;"]
        for four in range(4):
            lines.append(f"st.shared.v4.f32 [$0+{16 * THREADS * four}], {{z, z, z, z}};")
        assemble("", [_share(sums)], "r", [*lines, "}"])

    write(sums)


def decay(sums: Any, factor: Any) -> None:
    """Multiplies the lanes' shares by a number for each column."""
    if interpreted():
        sums[...] *= factor
        return

    @plgpu.inline_mgpu(arg_types=(PLAIN, LAYOUT))
    def write(_, sums, factor):
        lines = ["{ .reg .f32 t<4>;"]
        for four in range(4):
            lines.append(f"ld.shared.v4.f32 {{t0, t1, t2, t3}}, [$0+{16 * THREADS * four}];")
            lines += [f"mul.f32 t{n}, t{n}, ${1 + 4 * four + n};" for n in range(4)]
            lines.append(f"st.shared.v4.f32 [$0+{16 * THREADS * four}], {{t0, t1, t2, t3}};")
        assemble("", [_share(sums), *held(factor)], "r" + "f" * 16, [*lines, "}"])

    write(sums, factor)


def leave_largest(x: Any, columns: Any, used: int) -> None:
    """Writes the largest numbers of each warp's rows of x to columns [warps, 64].

    Zeros from column `used` on.
    """
    if interpreted():
        columns[0] = jnp.where(jnp.arange(64) < used, jnp.max(x, axis=0), 0.0)
        return

    @plgpu.inline_mgpu(arg_types=(PLAIN, WGMMA))
    def write(_, columns, x):
        numbers = wgmma.numbers_of(x)
        pairs = [i for i in range(used // 2) if i % 4 < 2]
        largest = [arith.maximumf(numbers[i], numbers[i + 2]) for i in pairs]
        zero = utils.c(0.0, ir.F32Type.get())
        _leave(columns, [*largest, *[zero] * (16 - len(largest))], "max")

    write(columns, x)


def leave(sums: Any, columns: Any) -> None:
    """Writes the sums of each warp's lanes' shares to columns [warps, 64]."""
    if interpreted():
        columns[0] = sums[...]
        return

    @plgpu.inline_mgpu(arg_types=(PLAIN, PLAIN))
    def write(_, columns, sums):
        lines = [
            f"ld.shared.v4.f32 {names(4 * four, 4)}, [$16+{16 * THREADS * four}];"
            for four in range(4)
        ]
        _leave(columns, assemble("f" * 16, [_share(sums)], "r", lines), "add")

    write(columns, sums)


def store(out: Any, tile: Any) -> None:
    """Writes a tile [64 columns of values, 64 heads] of a result to memory, out [64 heads, 64]."""
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
        lines = ["{ .reg .b32 t;"]
        for i in range(32):
            if i % 4 >= 2:
                continue
            place = f"[$32+{(i // 4 * 8 + i % 2) * pitch}]"
            if size == 2:
                lines.append(f"cvt.rn.bf16x2.f32 t, ${i + 2}, ${i}; st.global.b32 {place}, t;")
            else:
                lines.append(f"st.global.v2.f32 {place}, {{${i}, ${i + 2}}};")
        operands = [*wgmma.numbers_of(tile), global_address(out, offset)]
        assemble("", operands, "f" * 32 + "l", [*lines, "}"])

    write(out, tile)


def _float(x: float) -> str:
    return f"0f{np.float32(x).view(np.uint32):08X}"


def _share(sums) -> Any:
    """Where this thread's first four numbers of its 16 lie."""
    warp, lane = warp_and_lane()
    return plus(shared_address(sums), times(plus(times(warp, 32), lane), 16))


def _leave(columns, numbers, operation: str) -> None:
    """Writes 16 columns' numbers, put together over the lanes that have the same columns."""
    warp, row, column = row_and_column()
    place = plus(times(warp, 256), times(column, 8))
    lines = ["{ .reg .f32 t; .reg .pred p; setp.eq.u32 p, $33, 0;"]
    for i in range(16):
        lines.append(f"mov.f32 ${i}, ${16 + i};")
        for lane in (4, 8, 16):
            lines.append(f"shfl.sync.bfly.b32 t, ${i}, {lane}, 31, 0xffffffff;")
            lines.append(f"{operation}.f32 ${i}, ${i}, t;")
    for i in range(8):
        lines.append(f"@p st.shared.v2.f32 [$32+{32 * i}], {names(2 * i, 2)};")
    operands = [*numbers, plus(shared_address(columns), place), row]
    assemble("f" * 16, operands, "f" * 16 + "rr", [*lines, "}"])


def _scalar(value) -> Any:
    return fragmented_array.FragmentedArray.splat(value, (), is_signed=True)
