"""E4M3 pages on their way from memory, through registers, to the bfloat16 tiles that wgmma reads.

Shared memory is full of bfloat16, so that FP8 waits in registers. A warpgroup of its own loads a
page by halves, 256 columns of the latent and their scales: while it converts one half, and stores
it where TMA would have put bfloat16, the next half is on its way. A thread that waits for one of
its loads waits for all that it has begun (ptxas counts them on one scoreboard), those begun last
included; so the loads of a half begin when those of the half before are done, and none begins
between. Pages are fetched into the L2 cache two pages earlier, which makes that time short enough.

E4M3 becomes float16, then float32, both exactly; the product with the scale is rounded once to
bfloat16, as `dequantize` does.

A half has two units of 128 columns, which fill two 64 x 64 tiles each. Eight lanes in a row, which
store 16 bytes each at a time, have half of row r and half of row r ^ 5 of a group of eight: the
swizzle then keeps them in different banks. What a thread has of a unit is nobody else's business:
the arrays between `fetch` and `store` have the size of the data, and no meaning as arrays.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from dsv3_jax.kernels.hopper import interpreted, plgpu
from dsv3_jax.kernels.hopper_integers import constant, plus, times
from dsv3_jax.kernels.mla_decode.wgmma import REF, TILE_BYTES

UNITS = 4  # of a page
THREADS = 128
PIECES = 4  # of 16 bytes, that a thread has of a unit: two rows, half a row apart
WORDS = 4 * PIECES


def prefetch(pool: Any, rope: Any, page: Any) -> None:
    """Begins to fetch a page of FP8 numbers, scales and rope into the L2 cache."""
    if interpreted():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def prefetch(_, *parts):
        i64 = ir.IntegerType.get_signless(64)
        addresses = [llvm.ptrtoint(i64, utils.memref_ptr(part)) for part in parts]
        sizes = (64 * 512, 64 * 4 * UNITS, 64 * 128)
        lines = ["{ .reg .pred p; setp.eq.u32 p, $3, 0;"]
        lines += [
            f"@p cp.async.bulk.prefetch.L2.global [${i}], {size};" for i, size in enumerate(sizes)
        ]
        _run("\n".join([*lines, "}"]), [*addresses, _thread()], "l,l,l,r")

    values, scales = pool
    prefetch(values.at[page], scales.at[page], rope.at[page])


def fetch(pool: Any, page: Any, half: int, after: Any = None) -> Any:
    """Half of a page's numbers, and their scales, on their way into registers; for `store`.

    pool: values [P, 64, 512] and scales [P, 64, 4] in memory. Loads begin when the half `after` is
    there, so that whoever needs that one does not wait for this one.
    """
    values, scales = pool
    if interpreted():
        columns, groups = pl.ds(256 * half, 256), pl.ds(2 * half, 2)
        return values[page, :, columns], scales[page, :, groups]
    types = (_bits(WORDS), _bits(WORDS), _bits(4))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), *[x.layout for x in types if after]),
        return_type=types,
    )
    def fetch(_, values, scales, *after):
        warp, row, chunk = _lane(fresh=True)
        row = plus(times(warp, 16), row)
        i32 = ir.IntegerType.get_signless(32)
        # Two registers of each of its loads will do.
        arrived = [llvm.bitcast(i32, x) for array in after for x in list(array.registers.flat)[::2]]
        zero = _zero_after(arrived) if arrived else constant(0)
        first = _address(values, plus(times(row, 512), times(chunk, 16), zero))
        out = []
        for unit in range(2):
            lines = []
            for piece in range(PIECES):
                j, side = divmod(piece, 2)
                place = 8 * 512 * j + 128 * (2 * half + unit) + 64 * side
                lines.append(_load(4 * piece, f"${WORDS}+{place}"))
            out.append(_registers(WORDS, lines, first))
        lines = [
            f"ld.global.v2.b32 {{${2 * j}, ${2 * j + 1}}}, [$4+{128 * j + 8 * half}];"
            for j in range(2)
        ]
        out.append(_registers(4, lines, _address(scales, plus(times(row, 4 * UNITS), zero))))
        return tuple(out)

    return fetch(values.at[page], scales.at[page], *(after or ()))


def _zero_after(words):
    """Zero, as soon as these registers are loaded; the compiler cannot know."""
    lines = ["{ .reg .b32 t; mov.u32 t, %lanemask_lt; shr.u32 t, t, 31;", "mov.b32 $0, $1;"]
    lines += [f"or.b32 $0, $0, ${i + 2};" for i in range(len(words) - 1)]
    lines += ["and.b32 $0, $0, t; }"]
    return llvm.inline_asm(
        ir.IntegerType.get_signless(32),
        words,
        "\n".join(lines),
        ",".join(["=r"] + ["r"] * len(words)),
        asm_dialect=0,
        has_side_effects=True,
    )


def store(tiles: Any, unit: int, fetched: Any) -> None:
    """Writes a unit, in bfloat16, to its two of a page's tiles [9, 64, 64].

    `fetched` is the half that it belongs to. wgmma does not see it before the next `commit_smem`.
    """
    first = 2 * unit
    if interpreted():
        values, scales = fetched
        side = unit % 2
        values = values[:, 128 * side : 128 * side + 128]
        factor = lax.broadcast_in_dim(scales[:, side], values.shape, [0])
        numbers = (values.astype(jnp.float32) * factor).astype(jnp.bfloat16)
        for half in range(2):
            tiles[first + half] = numbers[:, 64 * half : 64 * half + 64]
        return

    @plgpu.inline_mgpu(arg_types=(REF, _bits(WORDS).layout, _bits(4).layout))
    def put(_, tiles, numbers, scales):
        i32 = ir.IntegerType.get_signless(32)
        words, factors = (
            [llvm.bitcast(i32, x) for x in array.registers.flat] for array in (numbers, scales)
        )
        _, row, chunk = _lane()
        twice = times(chunk, 2)
        low = _in_tile(tiles, arith.xori(twice, row))
        for piece in range(PIECES):
            j, half = divmod(piece, 2)
            text = _convert_and_store((first + half) * TILE_BYTES + 1024 * j)
            four = words[4 * piece : 4 * piece + 4]
            _run(text, [*four, factors[2 * j + unit % 2], low], ",".join(["r"] * 6))

    put(tiles, fetched[unit % 2], fetched[-1])


def _convert_and_store(offset: int) -> str:
    """16 E4M3 numbers ($0 to $3) times a scale ($4), to 16 bytes at $5 and to those beside."""
    lines = ["{ .reg .b16 a, b, c, d; .reg .b32 x, y; .reg .f32 p, q, r, s, m;"]
    lines += [".reg .b32 o<8>, beside;", "mov.b32 m, $4; xor.b32 beside, $5, 16;"]
    for word in range(4):
        lines += [
            f"mov.b32 {{a, b}}, ${word};",
            "cvt.rn.f16x2.e4m3x2 x, a; cvt.rn.f16x2.e4m3x2 y, b;",
            "mov.b32 {a, b}, x; mov.b32 {c, d}, y;",
            "cvt.f32.f16 p, a; cvt.f32.f16 q, b; cvt.f32.f16 r, c; cvt.f32.f16 s, d;",
            "mul.rn.f32 p, p, m; mul.rn.f32 q, q, m; mul.rn.f32 r, r, m; mul.rn.f32 s, s, m;",
            f"cvt.rn.bf16x2.f32 o{2 * word}, q, p; cvt.rn.bf16x2.f32 o{2 * word + 1}, s, r;",
        ]
    for half, address in enumerate(("$5", "beside")):
        four = ", ".join(f"o{4 * half + i}" for i in range(4))
        lines.append(f"st.shared.v4.b32 [{address}+{offset}], {{{four}}};")
    return "\n".join([*lines, "}"])


def _lane(fresh: bool = False):
    """A thread's warp, its row of eight, and which 16 of 64 columns it has.

    `fresh`: worked out here, and not kept in registers from one time to the next.
    """
    thread: Any = _thread()
    if fresh:
        i32 = ir.IntegerType.get_signless(32)
        thread = llvm.inline_asm(
            i32, [], "mov.u32 $0, %tid.x;", "=r", asm_dialect=0, has_side_effects=True
        )
        thread = arith.andi(thread, constant(THREADS - 1))
    lane = arith.andi(thread, constant(31))
    odd = arith.andi(arith.shrui(lane, constant(2)), constant(1))
    row = arith.xori(arith.shrui(lane, constant(3)), times(odd, 5))
    return arith.shrui(thread, constant(5)), row, arith.andi(lane, constant(3))


def _in_tile(tiles, chunk):
    """The address of 16 bytes, by number as they lie, of a thread's row of the first tile."""
    warp, row, _ = _lane()
    base = llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(tiles))
    return plus(base, times(warp, 16 * 128), times(row, 128), times(chunk, 16))


def _bits(words: int) -> Any:
    layout = plgpu.Layout.WG_STRIDED((words * THREADS,), vec_size=1)
    return plgpu.ShapeDtypeStruct((words * THREADS,), jnp.int32, layout=layout)


def _load(register: int, address: str) -> str:
    four = ", ".join(f"${register + i}" for i in range(4))
    return f"ld.global.L1::no_allocate.v4.b32 {{{four}}}, [{address}];"


def _address(ref, offset) -> Any:
    """The 64-bit address of what lies `offset` bytes from the start of `ref`."""
    i64 = ir.IntegerType.get_signless(64)
    return arith.addi(llvm.ptrtoint(i64, utils.memref_ptr(ref)), arith.extui(i64, offset))


def _run(text: str, operands, constraints: str) -> None:
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        operands,
        text,
        constraints,
        asm_dialect=0,
        has_side_effects=True,
    )


def _thread():
    """This thread's number in its warpgroup."""
    return arith.andi(utils.thread_idx(), constant(THREADS - 1))


def _registers(words: int, lines, address) -> Any:
    """What so many outputs of a piece of assembly hold, as an array of `_bits`."""
    i32 = ir.IntegerType.get_signless(32)
    result: Any = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * words),
        [address],
        "\n".join(lines),
        ",".join(["=r"] * words + ["l"]),
        asm_dialect=0,
        has_side_effects=True,
    )
    one = ir.VectorType.get((1,), i32)
    registers = [llvm.bitcast(one, llvm.extractvalue(i32, result, [i])) for i in range(words)]
    return fragmented_array.FragmentedArray(
        _registers=np.array(registers, dtype=object),
        _layout=_bits(words).layout.to_mgpu(),
        _is_signed=True,
    )
