"""Softmax over rows of an accumulator: what is shared and summed by columns, for Hopper.

Scores of FP8 pages are transposed, [64 tokens, 64 heads]: a maximum or a sum over tokens goes
across lanes, warps and warpgroups. So neither is worked out for each page. A vector of columns has
its numbers in every lane that needs them; one that is `a lane's share` has in each lane what that
lane's rows amount to, and is summed over lanes at the end (`leave`). Interpreted, it is the sum of
a warpgroup's rows.
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
)

LAYOUT = WGMMA.reduce(0)
ROWS = WGMMA.reduce(1)
VECTOR = plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=LAYOUT)
SCALAR = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)
PLAIN = plgpu.RefType()
MEETING = 8  # a hardware barrier of both warpgroups, then one for each; Mosaic's are the first four
WARPS = 4


def partials() -> int:
    """How many partial results of a vector of columns a warpgroup leaves."""
    return 1 if interpreted() else WARPS


def across(vector: Any) -> Any:
    """A vector of columns as an array [64, 64]."""
    return lax.broadcast_in_dim(vector, (64, 64), [1])


def exceeds(x: Any, top: Any, rise: float) -> Any:
    """1 if a number of this thread's, of x [64 tokens, columns], exceeds its column's by `rise`."""
    if interpreted():
        return (jnp.max(x - across(top)) > rise).astype(jnp.int32)

    @plgpu.inline_mgpu(arg_types=(WGMMA, LAYOUT), return_type=SCALAR)
    def compare(_, x, top):
        limit = np.float32(rise).view(np.uint32)
        lines = ["{ .reg .pred p; .reg .f32 m, t; mov.f32 m, 0fFF800000;"]
        for column in range(16):
            first = 1 + column // 2 * 4 + column % 2
            lines.append(f"max.f32 t, ${first}, ${first + 2}; sub.f32 t, t, ${33 + column};")
            lines.append("max.f32 m, m, t;")
        lines.append(f"setp.gt.f32 p, m, 0f{limit:08X}; selp.b32 $0, 1, 0, p; }}")
        operands = [*_accumulator(x), *held(top)]
        return _scalar(assemble("r", operands, "f" * 48, lines)[0])

    return compare(x, top)


def publish(weights: Any, p: Any) -> None:
    """Writes weights [64 tokens, 64 columns] as float16.

    The tile [64, 64] is named as bfloat16.
    """
    if interpreted():
        weights[...] = lax.bitcast_convert_type(p.astype(jnp.float16), jnp.bfloat16)
        return

    @plgpu.inline_mgpu(arg_types=(wgmma.REF, WGMMA))
    def write(_, weights, p):
        lines = ["{ .reg .b32 h<16>, a;"]
        for pair in range(4):
            numbers = range(4 * pair, 4 * pair + 4)
            lines += [f"cvt.rn.f16x2.f32 h{i}, ${2 * i + 1}, ${2 * i};" for i in numbers]
            lines.append(f"xor.b32 a, $32, {32 * pair};")
            four = ", ".join(f"h{i}" for i in numbers)
            lines.append(f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [a], {{{four}}};")
        operands = [*_accumulator(p), tile_address(weights)]
        assemble("", operands, "f" * 32 + "r", [*lines, "}"])

    write(weights, p)


def agree(flag: Any, me: int) -> Any:
    """Whether a thread of this warpgroup has a flag."""
    if interpreted():
        return flag

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,), return_type=SCALAR)
    def vote(_, flag):
        lines = [
            "{ .reg .pred p, q; setp.ne.b32 p, $1, 0;",
            f"bar.red.or.pred q, {MEETING + 1 + me}, {THREADS}, p; selp.b32 $0, 1, 0, q; }}",
        ]
        (any_flag,) = assemble("r", [flag.registers.item()], "r", lines)
        return _scalar(any_flag)

    return vote(flag)


def meet() -> None:
    """Waits for both warpgroups; wgmma sees what they have written."""
    text = ["fence.proxy.async.shared::cta;", f"bar.sync {MEETING}, {2 * THREADS};"]
    plgpu.inline_mgpu()(lambda _: assemble("", [], "", text) and None)()


def together(me: int, commit: bool = False) -> None:
    """Waits for the four warps of warpgroup `me`; its barrier's number takes no register.

    `commit`: wgmma sees what they have written.
    """
    if interpreted():
        return plgpu.commit_smem() if commit else None
    text = [f"bar.sync {MEETING + 1 + me}, {THREADS};"]
    if commit:
        text = ["fence.proxy.async.shared::cta;", *text]
    return plgpu.inline_mgpu()(lambda _: assemble("", [], "", text) and None)()


def add(total: Any, p: Any, factor: Any) -> Any:
    """A lane's share of the sums of p [64 tokens, columns], times a factor for each token."""
    if interpreted():
        return total + jnp.sum(p * lax.broadcast_in_dim(factor, p.shape, [0]), axis=0)

    @plgpu.inline_mgpu(arg_types=(LAYOUT, WGMMA, ROWS), return_type=VECTOR)
    def accumulate(_, total, p, factor):
        lines = []
        for i in range(32):
            column = i // 4 * 2 + i % 2
            start = f"${16 + column}" if i % 4 < 2 else f"${column}"
            lines.append(f"fma.rn.f32 ${column}, ${32 + i}, ${64 + i // 2 % 2}, {start};")
        operands = [*held(total), *_accumulator(p), *held(factor)]
        results = assemble("f" * 16, operands, "f" * 50, lines)
        return array(results, VECTOR)

    return accumulate(total, p, factor)


def leave_largest(x: Any, columns: Any) -> None:
    """Writes the largest numbers of each warp's rows of x to columns [warps, 64]."""
    if interpreted():
        columns[0] = jnp.max(x, axis=0)
        return

    @plgpu.inline_mgpu(arg_types=(PLAIN, WGMMA))
    def write(_, columns, x):
        numbers = _accumulator(x)
        largest = [arith.maximumf(numbers[i], numbers[i + 2]) for i in range(32) if i % 4 < 2]
        _leave(columns, largest, "max")

    write(columns, x)


def leave(total: Any, columns: Any) -> None:
    """Writes the sums of each warp's lanes' shares to columns [warps, 64]."""
    if interpreted():
        columns[0] = total
        return

    @plgpu.inline_mgpu(arg_types=(PLAIN, LAYOUT))
    def write(_, columns, total):
        _leave(columns, held(total), "add")

    write(columns, total)


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
        operands = [*_accumulator(tile), global_address(out, offset)]
        assemble("", operands, "f" * 32 + "l", [*lines, "}"])

    write(out, tile)


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


def _accumulator(tile) -> list[Any]:
    return held(tile.to_layout(wgmma.ACCUMULATOR))


def _scalar(value) -> Any:
    return fragmented_array.FragmentedArray.splat(value, (), is_signed=True)
