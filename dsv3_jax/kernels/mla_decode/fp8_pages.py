"""What the products of FP8 pages read: queries as pairs of E4M3 numbers, and values as fragments.

A page stays as TMA leaves it in shared memory: four groups of 128 columns, [4, 64 tokens, 128]
bytes, swizzled over 128, and a scale for each token, which whoever adds products up applies in
float32.

Keys are multiplied as they lie, by queries that are FP8, too. A bfloat16 query has eight
significant bits, and is the exact sum of two E4M3 numbers of four, over a power of two that a
block's queries share (`query_unit`): down to 2^-10 of the largest query; below, it is off by at
most 2^-18 of that one. Rotated queries are divided by it, and their keys lie there over the token's
scale: their products are added to the same sums.

Values are the output's first operand, transposed, [64 columns, 64 tokens] from registers, as
float16, which E4M3 becomes exactly. `ldmatrix` transposes pairs of bytes, so that rows j and j + 8
of a warp's 16 are columns 2 j and 2 j + 1: `in_order` undoes that.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array
from jaxlib.mlir.dialects import arith

from dsv3_jax.kernels.hopper import WGMMA, interpreted, plgpu
from dsv3_jax.kernels.hopper_integers import constant, plus, times
from dsv3_jax.kernels.mla_decode import wgmma
from dsv3_jax.kernels.mla_decode.registers import (
    THREADS,
    array,
    assemble,
    held,
    names,
    shared_address,
    warp_and_lane,
)

GROUPS = 4  # of 128 columns
PLAIN = plgpu.RefType()
FRAGMENT = plgpu.ShapeDtypeStruct((64, 32), jnp.float16, layout=WGMMA)
FETCHED = plgpu.ShapeDtypeStruct(
    (4 * THREADS,), jnp.int32, layout=plgpu.Layout.WG_STRIDED((4 * THREADS,), 4)
)
SCALAR = plgpu.ShapeDtypeStruct((), jnp.float32, layout=plgpu.Layout.WG_SPLAT)
SMALLEST_EXPONENT = 20  # of the largest query, biased: a unit and one over it are normal numbers
# The power of two by which rotated queries may exceed the others: products by keys over a token's
# scale are far from float32's end.
ROPE_BEYOND = 64

SCORE_STEPS = [  # a page by all queries: by what is left of them, then by the larger numbers
    wgmma.Step(a=group * wgmma.TILE_BYTES + start, b=(2 * group + odd) * wgmma.TILE_BYTES + start)
    for odd in (1, 0)
    for group in range(GROUPS)
    for start in range(0, wgmma.ROW_BYTES, 32)
]


def leave_largest(tiles: Any, rope: Any, largest: Any) -> None:
    """Writes the largest magnitudes that each warp has of queries, tiles [8, 64, 64].

    Rotated ones, a tile [64, 64], count 2^-`ROPE_BEYOND` of themselves.
    """
    if interpreted():
        latent, rope = (jnp.max(jnp.abs(x[...].astype(jnp.float32))) for x in (tiles, rope))
        largest[0] = jnp.maximum(latent, rope * 2.0**-ROPE_BEYOND)
        return

    @plgpu.inline_mgpu(arg_types=(wgmma.REF, wgmma.REF, PLAIN))
    def write(_, tiles, rope, largest):
        warp, lane = warp_and_lane()

        def compare(address):
            # Magnitudes of bfloat16 are ordered as their bits are; infinities and NaN come last.
            for chunk in range(4):
                yield f"xor.b32 b, {address}, {16 * chunk};"
                yield "ld.shared.v4.b32 {w0, w1, w2, w3}, [b];"
                yield from (
                    f"and.b32 w{i}, w{i}, 0x7FFF7FFF; max.u16x2 m, m, w{i};" for i in range(4)
                )

        lines = ["{ .reg .b32 a, b, w<4>, m, x, i; .reg .pred p; mov.u32 m, 0; mov.u32 i, 0;"]
        lines += compare("$3")
        less = (ROPE_BEYOND << 7) * 0x10001  # of both exponents
        lines.append(f"mov.b32 x, {less}; max.u16x2 m, m, x; sub.u32 m, m, x;")
        # A loop, because code that runs once is waited for.
        lines.append("AGAIN: and.b32 x, i, 1; shl.b32 x, x, 6; xor.b32 a, $0, x;")
        lines.append(f"shr.u32 x, i, 1; mad.lo.u32 a, x, {wgmma.TILE_BYTES}, a;")
        lines += compare("a")
        lines += [
            "add.u32 i, i, 1; setp.lt.u32 p, i, 8;",
            "@p bra AGAIN;",
            "shl.b32 x, m, 16; and.b32 m, m, 0xFFFF0000; max.u32 m, m, x;",
            "redux.sync.max.u32 m, m, 0xffffffff;",
            "setp.eq.u32 p, $2, 0; @p st.shared.b32 [$1], m; }",
        ]
        place = plus(shared_address(largest), times(warp, 4))
        places = [_row_address(tiles), place, lane, _half_row_address(rope)]
        assemble("", places, "rrrr", lines)

    write(tiles, rope, largest)


def query_unit(largest: Any) -> Any:
    """The power of two that makes a block's largest query 128 or more and less than 256.

    NaN where one is not finite, so that no result of the block is.
    """
    if interpreted():
        bits = lax.bitcast_convert_type(jnp.max(largest[...]), jnp.int32) >> 23
        unit = (jnp.maximum(bits, SMALLEST_EXPONENT) - 7) << 23
        unit = jnp.where(bits == 255, jnp.int32(0x7FC00000), unit)
        return lax.bitcast_convert_type(unit, jnp.float32)

    @plgpu.inline_mgpu(arg_types=(PLAIN,), return_type=SCALAR)
    def read(_, largest):
        lines = ["{ .reg .b32 w<4>, m; .reg .pred p; ld.shared.v4.b32 {w0, w1, w2, w3}, [$1];"]
        lines.append(f"mov.u32 m, {SMALLEST_EXPONENT << 23};")
        lines += [f"max.u32 m, m, w{i};" for i in range(4)]
        lines += [
            "setp.ge.u32 p, m, 0x7F800000; and.b32 m, m, 0xFF800000;",
            f"sub.u32 m, m, {7 << 23}; selp.b32 m, 0x7FC00000, m, p; mov.b32 $0, m; }}",
        ]
        (unit,) = assemble("f", [shared_address(largest)], "r", lines)
        return fragmented_array.FragmentedArray.splat(unit, ())

    return read(largest)


def split_queries(tiles: Any, unit: Any) -> None:
    """Makes two E4M3 numbers of each bfloat16 query over a unit, in place: tiles [8, 64, 64].

    Of two tiles, which are 128 columns, the first has the larger numbers, the other what is left.
    """
    if interpreted():
        for tile in range(0, 8, 2):
            numbers = jnp.concatenate([tiles[tile], tiles[tile + 1]], axis=1).astype(jnp.float32)
            numbers = (numbers / unit).astype(jnp.float16)
            high = numbers.astype(jnp.float8_e4m3fn)
            left = (numbers - high.astype(jnp.float16)).astype(jnp.float8_e4m3fn)
            for place, kind in enumerate((high, left)):
                pairs = lax.bitcast_convert_type(kind, jnp.uint8).reshape(64, 64, 2)
                tiles[tile + place] = lax.bitcast_convert_type(pairs, jnp.bfloat16)
        return

    @plgpu.inline_mgpu(arg_types=(wgmma.REF, plgpu.Layout.WG_SPLAT))
    def split(_, tiles, unit):
        lines = ["{ .reg .b32 a, b, w<64>, h<32>, l<32>, x, f, t, i; .reg .f32 low, high, over;"]
        lines += [".reg .b16 e<2>, r<2>; .reg .pred p;"]
        lines += ["mov.b32 x, $1; sub.u32 x, 0x7F000000, x; mov.b32 over, x; mov.u32 i, 0;"]
        # A loop, because code that runs once is waited for.
        lines.append(f"AGAIN: mad.lo.u32 a, i, {2 * wgmma.TILE_BYTES}, $0;")
        chunks = [(tile, chunk) for tile in range(2) for chunk in range(8)]
        for tile, chunk in chunks:
            four = ", ".join(f"w{32 * tile + 4 * chunk + n}" for n in range(4))
            lines.append(f"xor.b32 b, a, {16 * chunk};")
            lines.append(f"ld.shared.v4.b32 {{{four}}}, [b+{wgmma.TILE_BYTES * tile}];")
        for i in range(64):
            lines += [
                f"shl.b32 x, w{i}, 16; mov.b32 low, x; mul.f32 low, low, over;",
                f"and.b32 x, w{i}, 0xFFFF0000; mov.b32 high, x; mul.f32 high, high, over;",
                f"cvt.rn.f16x2.f32 f, high, low; cvt.rn.satfinite.e4m3x2.f16x2 e{i % 2}, f;",
                f"cvt.rn.f16x2.e4m3x2 t, e{i % 2}; sub.rn.f16x2 t, f, t;",
                f"cvt.rn.satfinite.e4m3x2.f16x2 r{i % 2}, t;",
            ]
            if i % 2:
                lines.append(f"mov.b32 h{i // 2}, {{e0, e1}}; mov.b32 l{i // 2}, {{r0, r1}};")
        for tile, chunk in chunks:
            four = ", ".join(f"{'hl'[tile]}{4 * chunk + n}" for n in range(4))
            lines.append(f"xor.b32 b, a, {16 * chunk};")
            lines.append(f"st.shared.v4.b32 [b+{wgmma.TILE_BYTES * tile}], {{{four}}};")
        lines += ["add.u32 i, i, 1; setp.lt.u32 p, i, 2;", "@p bra AGAIN; }"]
        assemble("", [_row_address(tiles), unit.registers.item()], "rf", lines)

    split(tiles, unit)


def scale_rope(tile: Any, unit: Any) -> None:
    """Divides rotated queries, a tile [64, 64], by their block's unit, in place and exactly."""
    numbers = plgpu.load(tile, layout=WGMMA).astype(jnp.float32)
    tile[...] = (numbers * (1 / unit)).astype(jnp.bfloat16)


def in_order(rows: Any) -> Any:
    """Rows [64, ...] of a product with `values`, in the order of the columns they stand for."""
    parts = rows.reshape(4, 2, 8, *rows.shape[1:])
    return jnp.swapaxes(parts, 1, 2).reshape(rows.shape)


def fetch(page: Any, tile: int, start: int) -> Any:
    """What `as_values` makes of a tile's columns and 32 tokens from `start` on, as they lie."""
    group, odd = divmod(tile, 2)
    if interpreted():
        rows = page[group][start : start + 32, 64 * odd : 64 * odd + 64].T
        return jnp.swapaxes(rows.reshape(4, 8, 2, 32), 1, 2).reshape(64, 32)

    @plgpu.inline_mgpu(arg_types=(wgmma.FP8_REF,), return_type=FETCHED)
    def load(_, page):
        warp, lane = warp_and_lane()
        chunk = arith.xori(warp, arith.andi(lane, constant(7)))
        address = plus(shared_address(page), times(lane, wgmma.ROW_BYTES), times(chunk, 16))
        address = arith.xori(address, constant(64 * odd))
        offset = wgmma.TILE_BYTES * group + wgmma.ROW_BYTES * start
        line = f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {names(0, 4)}, [$4+{offset}];"
        return array(assemble("r" * 4, [address], "r", [line]), FETCHED)

    return load(page)


def as_values(fetched: Any) -> Any:
    """Fragments [64 columns, 32 tokens] of values, in float16."""
    if interpreted():
        return fetched.astype(jnp.float16)

    @plgpu.inline_mgpu(arg_types=(FETCHED.layout,), return_type=FRAGMENT)
    def convert(_, fetched):
        lines = ["{ .reg .b16 a, b; .reg .b32 t;"]
        for i in range(4):
            # Bytes of two tokens' two columns become two columns of two tokens.
            lines.append(f"prmt.b32 t, ${8 + i}, 0, 0x3120; mov.b32 {{a, b}}, t;")
            lines.append(f"cvt.rn.f16x2.e4m3x2 ${2 * i}, a; cvt.rn.f16x2.e4m3x2 ${2 * i + 1}, b;")
        return array(assemble("r" * 8, held(fetched), "r" * 4, [*lines, "}"]), FRAGMENT)

    return convert(fetched)


def _row_address(tiles: Any) -> Any:
    """Where this thread's row of four of eight tiles begins, in the swizzle's order."""
    half, row, chunk = _half_and_row()
    first = times(half, 4 * wgmma.TILE_BYTES)
    return plus(shared_address(tiles), first, row, chunk)


def _half_row_address(tile: Any) -> Any:
    """Where this thread's half of a row of one tile begins, in the swizzle's order."""
    half, row, chunk = _half_and_row()
    return plus(shared_address(tile), row, arith.xori(chunk, times(half, 64)))


def _half_and_row() -> tuple[Any, Any, Any]:
    """Which half of the warpgroup a thread is in, and where its row of 64 and the chunk begin."""
    warp, lane = warp_and_lane()
    row = plus(times(arith.andi(warp, constant(1)), 32), lane)
    chunk = times(arith.andi(row, constant(7)), 16)
    return arith.shrui(warp, constant(1)), times(row, wgmma.ROW_BYTES), chunk
