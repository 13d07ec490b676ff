"""E4M3 pages as TMA leaves them in shared memory, turned into wgmma's fragments in registers.

A page stays FP8: four groups of 128 columns, [4, 64 tokens, 128] bytes, swizzled over 128. It is
the first operand of both products, which wgmma takes from registers, so that the warpgroups that
multiply convert what they need on the way, and nothing is stored again. E4M3 becomes float16
exactly.

A token has a scale for each group. Its `unit` is 1/32 of the power of two under the largest of
them: numbers are multiplied by ratio = scale / unit (below 64, both float16) as they are converted,
and whoever adds products up multiplies by the unit in float32. So the largest number is 448 * 64 =
28,672, below float16's 65,504; a scale loses bits from 2^-20 of its token's largest one down.

Keys [64 tokens, 64 columns] are fragments of the scores. `ldmatrix` gives a lane four neighbouring
bytes of a row's 16, of which wgmma takes the first two for numbers 2 q and 2 q + 1 of a step of 16
along the contracted dim, the last two for 2 q + 8 and 2 q + 9: `prepare_queries` puts their columns
in that order. Values [64 columns, 64 tokens] are fragments of the output; `ldmatrix` transposes
pairs of bytes, so that rows j and j + 8 of a warp's 16 are columns 2 j and 2 j + 1: `in_order`
undoes that.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir.dialects import arith

from dsv3_jax.kernels.hopper import WGMMA, interpreted, plgpu, swizzled
from dsv3_jax.kernels.hopper_integers import constant, plus, times
from dsv3_jax.kernels.mla_decode import wgmma
from dsv3_jax.kernels.mla_decode.registers import (
    array,
    assemble,
    held,
    names,
    row_and_column,
    shared_address,
    tile_address,
    warp_and_lane,
    words,
)

GROUPS = 4  # of 128 columns, that share a token's scale
GROUP_BYTES = 64 * 128
HEADROOM = 5  # a unit is 2^5 below the power of two under its token's largest scale
SMALLEST = 2.0**-60  # of the largest scales: a unit, and one over it, are far from float32's ends

E4M3 = swizzled(jnp.float8_e4m3fn)
RAW = plgpu.RefType(E4M3)
PLAIN = plgpu.RefType()
ROWS = WGMMA.reduce(1)
FRAGMENT = plgpu.ShapeDtypeStruct((64, 64), jnp.float16, layout=WGMMA)
ROPE_FRAGMENT = plgpu.ShapeDtypeStruct((64, 64), jnp.bfloat16, layout=WGMMA)
UNIT = plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ROWS)


def prepare_queries(tiles: Any) -> None:
    """Makes bfloat16 queries, tiles [4, 64, 64], float16 in the order of `keys`, in place.

    Beyond float16's largest number, 65,504, they are infinite, so that the result shows it; below
    2^-17 they lose bits.
    """
    if interpreted():
        for tile in range(4):
            ordered = _in_steps(tiles[tile].astype(jnp.float32)).astype(jnp.float16)
            tiles[tile] = lax.bitcast_convert_type(ordered, jnp.bfloat16)
        return

    @plgpu.inline_mgpu(arg_types=(wgmma.REF,))
    def prepare(_, tiles):
        warp, lane = warp_and_lane()
        # A thread has a row of two tiles.
        row = plus(times(arith.andi(warp, constant(1)), 32), lane)
        first = times(arith.shrui(warp, constant(1)), 2 * wgmma.TILE_BYTES)
        chunk = times(arith.andi(row, constant(7)), 16)
        address = plus(shared_address(tiles), first, times(row, 128), chunk)
        # A loop, because code that runs once is waited for.
        lines = ["{ .reg .b32 a, b, w<8>, h<8>, x, tile, i; .reg .f32 low, high; .reg .pred p;"]
        lines += ["mov.u32 i, 0;", "AGAIN: shr.u32 tile, i, 2; and.b32 x, i, 3; shl.b32 x, x, 5;"]
        lines.append(f"xor.b32 a, $0, x; mad.lo.u32 a, tile, {wgmma.TILE_BYTES}, a;")
        lines.append("xor.b32 b, a, 16;")
        for half, start in enumerate("ab"):
            four = ", ".join(f"w{4 * half + i}" for i in range(4))
            lines.append(f"ld.shared.v4.b32 {{{four}}}, [{start}];")
        for i in range(8):
            lines += [
                f"shl.b32 x, w{i}, 16; mov.b32 low, x;",
                f"and.b32 x, w{i}, 0xFFFF0000; mov.b32 high, x;",
                f"cvt.rn.f16x2.f32 h{i}, high, low;",
            ]
        for half, start in enumerate("ab"):
            four = ", ".join(f"h{2 * i + half}" for i in range(4))
            lines.append(f"st.shared.v4.b32 [{start}], {{{four}}};")
        lines += ["add.u32 i, i, 1; setp.lt.u32 p, i, 8;", "@p bra AGAIN;"]
        assemble("", [address], "r", [*lines, "}"])

    prepare(tiles)


def in_order(rows: Any) -> Any:
    """Rows [64, ...] of a product with `values`, in the order of the columns they stand for."""
    parts = rows.reshape(4, 2, 8, *rows.shape[1:])
    return jnp.swapaxes(parts, 1, 2).reshape(rows.shape)


def units(scales: Any) -> tuple[Any, Any]:
    """Ratios, for `keys` and `share`, and the unit of each token; from a page's scales [256]."""
    if interpreted():
        four = scales[...].reshape(64, GROUPS)
        largest = jnp.maximum(jnp.max(four, axis=1), jnp.float32(SMALLEST))
        bits = lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
        unit = lax.bitcast_convert_type(bits - (HEADROOM << 23), jnp.float32)
        return (four / unit[:, None]).astype(jnp.float16), unit

    @plgpu.inline_mgpu(arg_types=(PLAIN,), return_type=(words(4), UNIT))
    def read(_, scales):
        warp, row, _ = row_and_column()
        address = plus(shared_address(scales), times(warp, 16 * 16), times(row, 16))
        # $0 to $3: ratios of rows j and j + 8; $4 and $5: their units.
        lines = ["{ .reg .f32 s<8>, m<2>, r<2>; .reg .b32 b<2>, i<2>;"]
        for half in range(2):
            four = ", ".join(f"s{4 * half + g}" for g in range(4))
            lines.append(f"ld.shared.v4.f32 {{{four}}}, [$6+{128 * half}];")
        for half in range(2):
            m, b, i, s = f"m{half}", f"b{half}", f"i{half}", 4 * half
            lines += [
                f"max.f32 {m}, s{s}, s{s + 1};",
                f"max.f32 {m}, {m}, s{s + 2}; max.f32 {m}, {m}, s{s + 3};",
                f"max.f32 {m}, {m}, 0f{np.float32(SMALLEST).view(np.uint32):08X};",
                f"mov.b32 {b}, {m}; and.b32 {b}, {b}, 0x7F800000;",
                f"sub.u32 {b}, {b}, {HEADROOM << 23}; mov.b32 ${4 + half}, {b};",
                f"sub.u32 {i}, 0x7F000000, {b}; mov.b32 r{half}, {i};",  # one over it
            ]
        for g in range(4):
            lines += [
                f"mul.f32 s{g}, s{g}, r0; mul.f32 s{4 + g}, s{4 + g}, r1;",
                f"cvt.rn.f16x2.f32 ${g}, s{4 + g}, s{g};",
            ]
        out = assemble("rrrrff", [address], "r", [*lines, "}"])
        return array(out[:4], words(4)), array(out[4:], UNIT)

    return read(scales)


def share(ratios: Any, table: Any) -> None:
    """Writes a page's ratios to shared memory, [128] words, for `factors`.

    A word is that of two neighbouring tokens; a thread of `factors` finds its eight in a row.
    """
    if interpreted():
        table[...] = ratios
        return

    @plgpu.inline_mgpu(arg_types=(PLAIN, words(4).layout))
    def write(_, table, ratios):
        warp, row, group = row_and_column()
        # Of lane 4 j + q: group q, rows j and j + 8, which are the first or second of a word.
        place = plus(times(arith.shrui(row, constant(1)), 32), times(warp, 8))
        address = plus(
            shared_address(table),
            times(group, 128),
            place,
            times(arith.andi(row, constant(1)), 2),
        )
        lines = ["{ .reg .pred p; .reg .b32 x; .reg .b16 a, b;", "mov.b32 x, $0;"]
        for g in range(1, 4):
            lines.append(f"setp.eq.u32 p, $5, {g}; selp.b32 x, ${g}, x, p;")
        lines.append("mov.b32 {a, b}, x; st.shared.b16 [$4], a; st.shared.b16 [$4+4], b; }")
        assemble("", [*held(ratios), address, group], "rrrrrr", lines)

    write(table, ratios)


def factors(table: Any, group: int) -> Any:
    """The ratios of a page's tokens, as `values` of a group need them."""
    if interpreted():
        return table[...][:, group]

    @plgpu.inline_mgpu(arg_types=(PLAIN,), return_type=words(8))
    def read(_, table):
        _, _, column = row_and_column()
        address = plus(shared_address(table), times(column, 32))
        lines = [
            f"ld.shared.v4.b32 {names(4 * i, 4)}, [$8+{128 * group + 16 * i}];" for i in range(2)
        ]
        return array(assemble("r" * 8, [address], "r", lines), words(8))

    return read(table)


def fetch_keys(page: Any, half: int) -> Any:
    """A thread's bytes of 64 columns of keys, half of a group; for `keys`."""
    group, odd = divmod(half, 2)
    if interpreted():
        return _in_steps(page[group][:, 64 * odd : 64 * odd + 64])

    @plgpu.inline_mgpu(arg_types=(RAW,), return_type=words(8))
    def fetch(_, page):
        lines = ["{ .reg .b32 a;"]
        for i in range(2):
            lines.append(f"xor.b32 a, $8, {64 * odd + 32 * i};")
            four = names(4 * i, 4)
            lines.append(
                f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {four}, [a+{GROUP_BYTES * group}];"
            )
        return array(assemble("r" * 8, [tile_address(page)], "r", [*lines, "}"]), words(8))

    return fetch(page)


def keys(fetched: Any, ratios: Any, half: int) -> Any:
    """Fragments [64 tokens, 64 columns] of keys, each over its token's unit."""
    group = half // 2
    if interpreted():
        ratio = lax.broadcast_in_dim(ratios[:, group], (64, 64), [0])
        return fetched.astype(jnp.float16) * ratio

    @plgpu.inline_mgpu(arg_types=(words(8).layout, words(4).layout), return_type=FRAGMENT)
    def convert(_, fetched, ratios):
        lines = ["{ .reg .b16 a, b; .reg .b32 r<2>; mov.b32 {a, b}, $24;"]
        lines.append("mov.b32 r0, {a, a}; mov.b32 r1, {b, b};")
        for step in range(4):
            for row in range(2):
                place = 4 * step + row
                lines += _converted(f"${16 + 2 * step + row}", place, place + 2, f"r{row}")
        operands = [*held(fetched), held(ratios)[group]]
        return array(assemble("r" * 16, operands, "r" * 9, [*lines, "}"]), FRAGMENT)

    return convert(fetched, ratios)


def rope_keys(tile: Any, unit: Any) -> Any:
    """Fragments [64 tokens, 64] of rotated keys [64, 64] in bfloat16, over the units: exactly."""
    if interpreted():
        return tile[...] * lax.broadcast_in_dim(1 / unit, (64, 64), [0]).astype(jnp.bfloat16)

    @plgpu.inline_mgpu(arg_types=(wgmma.REF, ROWS), return_type=ROPE_FRAGMENT)
    def fetch(_, tile, unit):
        lines = ["{ .reg .b32 a, r<2>;"]
        for step in range(4):
            lines.append(f"xor.b32 a, $16, {32 * step};")
            four = names(4 * step, 4)
            lines.append(f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {four}, [a];")
        for half in range(2):  # one over the unit, twice
            lines.append(f"mov.b32 r{half}, ${17 + half}; sub.u32 r{half}, 0x7F000000, r{half};")
            lines.append(f"prmt.b32 r{half}, r{half}, r{half}, 0x3232;")
        lines += [f"mul.rn.bf16x2 ${i}, ${i}, r{i % 2};" for i in range(16)]
        operands = [tile_address(tile), *held(unit)]
        return array(assemble("r" * 16, operands, "rff", [*lines, "}"]), ROPE_FRAGMENT)

    return fetch(tile, unit)


def fetch_values(page: Any, tile: int) -> Any:
    """A thread's bytes of 64 columns of values, by number; for `values`."""
    group, odd = divmod(tile, 2)
    if interpreted():
        rows = page[group][:, 64 * odd : 64 * odd + 64].T
        return jnp.swapaxes(rows.reshape(4, 8, 2, 64), 1, 2).reshape(64, 64)

    @plgpu.inline_mgpu(arg_types=(RAW,), return_type=words(8))
    def fetch(_, page):
        warp, lane = warp_and_lane()
        chunk = arith.xori(warp, arith.andi(lane, constant(7)))
        address = plus(shared_address(page), times(lane, 128), times(chunk, 16))
        address = arith.xori(address, constant(64 * odd))
        lines = [
            f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {names(4 * i, 4)}, "
            f"[$8+{GROUP_BYTES * group + 32 * 128 * i}];"
            for i in range(2)
        ]
        return array(assemble("r" * 8, [address], "r", lines), words(8))

    return fetch(page)


def values(fetched: Any, factors: Any) -> Any:
    """Fragments [64 columns, 64 tokens] of values, each over its token's unit."""
    if interpreted():
        return fetched.astype(jnp.float16) * lax.broadcast_in_dim(factors, (64, 64), [1])

    @plgpu.inline_mgpu(arg_types=(words(8).layout,) * 2, return_type=FRAGMENT)
    def convert(_, fetched, factors):
        lines = ["{ .reg .b16 a, b; .reg .b32 t;"]
        for i in range(8):
            # Bytes of two tokens' two columns become two columns of two tokens.
            lines.append(f"prmt.b32 t, ${16 + i}, 0, 0x3120;")
            lines += _converted("t", 2 * i, 2 * i + 1, f"${24 + i}")
        operands = [*held(fetched), *held(factors)]
        return array(assemble("r" * 16, operands, "r" * 16, [*lines, "}"]), FRAGMENT)

    return convert(fetched, factors)


def _converted(word: str, low: int, high: int, ratio: str) -> list[str]:
    """Both halves of four E4M3 numbers, as float16 times a ratio, to two results."""
    return [
        f"mov.b32 {{a, b}}, {word};",
        f"cvt.rn.f16x2.e4m3x2 ${low}, a; mul.f16x2 ${low}, ${low}, {ratio};",
        f"cvt.rn.f16x2.e4m3x2 ${high}, b; mul.f16x2 ${high}, ${high}, {ratio};",
    ]


def _in_steps(numbers: Any) -> Any:
    """Columns of numbers [64, 64] in the order in which a fragment of keys has them."""
    parts = numbers.reshape(64, 4, 4, 2, 2)  # step, lane, half, number
    return jnp.swapaxes(parts, 2, 3).reshape(64, 64)
