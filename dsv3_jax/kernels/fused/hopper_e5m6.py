"""E5M6 in a warpgroup's registers: made of the numbers that a quantiser reads, and read by one.

Eight numbers of a thread are one packet of three words (quantization/e5m6.py). A bfloat16 number
over a power of two has no more bits than float16 keeps, so that it is rounded once, from float16 to
its code; only where float16 is subnormal it is rounded before, in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from dsv3_jax.kernels import hopper, manual
from dsv3_jax.kernels.fused.hopper_quantize import COMPILER_PARAMS, Source, scaled
from dsv3_jax.kernels.fused.hopper_registers import (
    array,
    elements,
    measured,
    numbers_of,
    tokens_layout,
    vector_of,
    words_of,
)
from dsv3_jax.kernels.hopper import plgpu
from dsv3_jax.kernels.hopper_integers import constant, index
from dsv3_jax.quantization import e5m6
from dsv3_jax.quantization.block_scaled import PER_TOKEN, BlockScaled, ScaleFormat
from dsv3_jax.quantization.e5m6 import E5M6, PACKET

PACKETS = 128 // PACKET  # of a tile's row


def quantize_and_keep(x: Any, scale_format: ScaleFormat, rows: int) -> tuple[BlockScaled, E5M6]:
    """x [T, D] quantised per token, and as E5M6, from one read; `rows` tokens a block."""
    tokens, dim = x.shape
    column_tiles, rows = dim // 128, min(rows, tokens // 8 * 8)

    def kernel(x_ref, values, scales, words, kept_scales):
        block = lax.axis_index("block")
        start = lax.div(block, jnp.int32(column_tiles)) * rows
        # The last rows may be quantised by two, to the same values.
        of_rows = pl.ds(lax.min(start, jnp.int32(tokens - rows)), rows)
        tile = lax.rem(block, jnp.int32(column_tiles))
        columns, packets = pl.ds(tile * 128, 128), pl.ds(tile * PACKETS, PACKETS)
        numbers = plgpu.load(x_ref.at[of_rows, columns], layout=tokens_layout(), optimized=False)
        finite, largest = measured(numbers)
        values[of_rows, columns], scales[tile, of_rows] = scaled(finite, largest, scale_format)
        scale = e5m6.scale_of_amax(largest)
        kept_scales[tile, of_rows] = scale
        for i, of_packets in enumerate(packed(numbers, 1 / scale)):
            words[of_rows, i, packets] = of_packets

    shapes = [
        ((tokens, dim), jnp.float8_e4m3fn),
        ((column_tiles, tokens), jnp.float32),
        ((tokens, 3, dim // PACKET), jnp.uint32),
        ((column_tiles, tokens), jnp.float32),
    ]
    out = hopper.kernel(
        kernel,
        out_type=[manual.result(shape, dtype, x) for shape, dtype in shapes],
        grid=(pl.cdiv(tokens, rows) * column_tiles,),
        grid_names=("block",),
        compiler_params=COMPILER_PARAMS,
    )(*manual.vary((x,)))
    values, scales, words, kept_scales = manual.vary(out, x)
    return BlockScaled(values, scales.mT, PER_TOKEN), E5M6(words, kept_scales.mT)


@dataclass(frozen=True)
class PackedRows(Source):
    """Numbers that were kept as E5M6, in bfloat16.

    The first operands are words [T, 3, D / 8] and scales [D / 128, T]; the only piece is of those.
    """

    def load(
        self, refs: Sequence[Any], rows: Any, columns: Any, layout: Any, of_scales: Any = None
    ) -> list[Any]:
        """As `Source.load`, of 128 columns; each vector of the layout has eight of them."""
        words = refs[0]
        (scale,) = super().load(refs, rows, columns, layout, of_scales)
        if hopper.interpreted():
            first = lax.div(columns.start, jnp.int32(PACKET))
            part = words[rows, :, pl.ds(first, PACKETS)]
            numbers = e5m6.from_codes(e5m6.unpack(part)) * scale[:, None]
            return [numbers.astype(jnp.bfloat16)]
        return [_unpacked(words, scale, rows, columns, layout, of_scales)]


def packed(x: Any, inverse_scale: Any) -> Sequence[Any]:
    """The first, second and third words [rows, 16] of bfloat16 numbers in `tokens_layout`.

    Numbers are multiplied by their rows' inverse scales before they are rounded.
    """
    if hopper.interpreted():
        words = e5m6.pack(e5m6.to_codes(x.astype(jnp.float32) * inverse_scale[:, None]))
        return [words[:, i] for i in range(3)]
    layout, shape = tokens_layout(), (x.shape[0], PACKETS)
    of_packets = plgpu.Layout.TILED(
        plgpu.Tiling(((8, PACKETS), (2, PACKETS), (1,))), (-5,), (-3, -2), -1
    )
    result = plgpu.ShapeDtypeStruct(shape, jnp.uint32, layout=of_packets)

    @plgpu.inline_mgpu(arg_types=(layout, layout.reduce(1)), return_type=(result,) * 3)
    def pack(_, x, inverse_scale):
        inverses = numbers_of(inverse_scale)
        rows = [
            _words_of_packet([_halves(word, inverse) for word in words_of(register)])
            for register, inverse in zip(x.registers.flat, inverses, strict=True)
        ]
        tiled = of_packets.to_mgpu()
        return tuple(
            array([vector_of([word]) for word in words], shape, tiled, is_signed=False)
            for words in zip(*rows)
        )

    return pack(x, inverse_scale)


def _unpacked(words: Any, scale: Any, rows: Any, columns: Any, layout: Any, of_scales: Any) -> Any:
    """Numbers [rows, columns] in a layout whose vectors are packets."""
    shape = rows.size, columns.size
    result = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=layout)
    splat = plgpu.Layout.WG_SPLAT
    types = (plgpu.RefType(), of_scales or layout.reduce(1), splat, splat)

    @plgpu.inline_mgpu(arg_types=types, return_type=result)
    def unpack(_, words, scale, row, column):
        tiled = layout.to_mgpu()
        assert tiled.vector_length == PACKET
        first_row, first_column = (index(x.registers[()]) for x in (row, column))
        one, registers = ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), []
        for place, of_row in zip(tiled.thread_idxs(shape), numbers_of(scale), strict=True):
            at = arith.addi(first_row, place[0])
            column = arith.addi(first_column, place[1])
            packet = arith.divui(column, utils.c(PACKET, ir.IndexType.get()))
            three = [
                elements(vector.load(one, words, [at, utils.c(i, ir.IndexType.get()), packet]))[0]
                for i in range(3)
            ]
            pairs = [_bfloat16(halves, of_row) for halves in _halves_of_packet(*three)]
            numbers = ir.VectorType.get((PACKET,), ir.BF16Type.get())
            registers.append(utils.bitcast(vector_of(pairs), numbers))
        return array(registers, shape, tiled)

    return unpack(words, scale, rows.start, columns.start)


def _halves(word: Any, inverse_scale: Any) -> Any:
    """Codes of a word of two bfloat16 numbers, in the lower 12 bits of its halves."""
    # 12 has no bits below 2^-20, the step of the smallest numbers. NaN is 7FFF, and 7E0 as a code.
    one = (
        "mul.rn.f32 {x}, {x}, $2; add.rn.f32 s, {x}, 0f41400000; sub.rn.f32 s, s, 0f41400000; "
        "copysign.f32 s, {x}, s; abs.f32 a, {x}; setp.lt.f32 p, a, 0f38800000; "
        "selp.f32 {x}, s, {x}, p; "
    )
    text = (
        "{ .reg .f32 x, y, s, a; .reg .pred p; .reg .b32 h, t, u; "
        "shl.b32 t, $1, 16; mov.b32 x, t; and.b32 t, $1, 0xFFFF0000; mov.b32 y, t; "
        + one.format(x="x")
        + one.format(x="y")
        + "cvt.rn.f16x2.f32 h, y, x; and.b32 t, h, 0x7FFF7FFF; mov.b32 u, 0x7E007E00; "
        "min.u16x2 t, t, u; shr.u32 u, t, 4; and.b32 u, u, 0x00010001; add.u32 t, t, u; "
        "add.u32 t, t, 0x00070007; shr.u32 t, t, 4; and.b32 t, t, 0x07FF07FF; "
        "shr.u32 u, h, 4; and.b32 u, u, 0x08000800; or.b32 $0, t, u; }"
    )
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [word, inverse_scale], text, "=r,r,f")


def _words_of_packet(halves: Sequence[Any]) -> list[Any]:
    """The three words of eight codes, which come by two."""
    a, b, c, d = halves
    return [
        _any_of(_up(a, 20), _masked(_down(a, 8), 0xFFF00), _masked(_down(b, 4), 0xFF)),
        _any_of(_up(b, 28), _masked(b, 0xFFF0000), _masked(_up(c, 4), 0xFFF0), _down(c, 24)),
        _any_of(_masked(_up(c, 8), 0xFF000000), _masked(_up(d, 12), 0xFFF000), _down(d, 16)),
    ]


def _halves_of_packet(a: Any, b: Any, c: Any) -> list[Any]:
    """Eight float16 numbers by two, of three words."""
    upper = 0xFFF00000
    return [
        _any_of(_masked(_down(a, 16), 0xFFF0), _masked(_up(a, 12), upper)),
        _any_of(_masked(_up(a, 8), 0xFF00), _masked(_down(b, 24), 0xF0), _masked(_up(b, 4), upper)),
        _any_of(_masked(b, 0xFFF0), _up(b, 28), _masked(_down(c, 4), 0x0FF00000)),
        _any_of(_masked(_down(c, 8), 0xFFF0), _up(c, 20)),
    ]


def _bfloat16(halves: Any, scale: Any) -> Any:
    """Two float16 numbers times a scale, as a word of two bfloat16 ones, which hold them."""
    text = (
        "{ .reg .b16 p, q; .reg .f32 x, y; mov.b32 {p, q}, $1; cvt.f32.f16 x, p; "
        "cvt.f32.f16 y, q; mul.rn.f32 x, x, $2; mul.rn.f32 y, y, $2; cvt.rn.bf16x2.f32 $0, y, x; }"
    )
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [halves, scale], text, "=r,r,f")


def _up(x: Any, bits: int) -> Any:
    return arith.shli(x, constant(bits))


def _down(x: Any, bits: int) -> Any:
    return arith.shrui(x, constant(bits))


def _masked(x: Any, mask: int) -> Any:
    return arith.andi(x, constant(mask - (mask >> 31 << 32)))


def _any_of(first: Any, *others: Any) -> Any:
    for other in others:
        first = arith.ori(first, other)
    return first
