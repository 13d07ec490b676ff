"""Pieces of a tile in the registers of a warpgroup: how they lie, are turned and are measured.

What is measured is the largest finite magnitude of every row, in as few instructions a number as
there are. Two bfloat16 numbers share a 32-bit word, and are measured as such: adding a word to zero
times itself makes infinities NaN, which the maximum of two words passes over. That is one
instruction a number, the conversion to float32 is one more, and no test for what is finite is left
to be done on float32 numbers. Those that come as float32 are assumed to be finite; a warp that
finds an infinity goes over its numbers again.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.hopper import plgpu

TOKENS_EACH = 16  # consecutive tokens of a channel in one thread
CHANNELS = 16  # of 128 tokens, that a warpgroup's threads have one each of
RECIPROCAL = "rcp.approx.ftz.f32 $0, $1;"
ALONG_ROW = (1, 2, 4, 8)  # distances between lanes that share a row of 128 channels
ALONG_CHANNEL = (4, 8, 16)  # and between those that share a channel's 128 tokens


def tokens_layout() -> Any:
    """8 rows of 128 channels: a warp has two rows, a lane 8 channels of one."""
    return plgpu.Layout.TILED(plgpu.Tiling(((8, 128), (2, 128), (8,))), (-5,), (-3, -2), -1)


def channels_layout(width: int) -> Any:
    """128 tokens of `width` channels: a thread has 16 tokens of width / 16 channels."""
    each = width // CHANNELS
    tiles = ((128, width), (128, width // 4), (TOKENS_EACH, each))  # four warps of four lanes
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), (-5,), (-4, -3), -1)


def turned_layout(width: int) -> Any:
    """The layout of [width, 128] whose threads hold the numbers of `channels_layout`."""
    layout = _turned(width)
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def _turned(width: int) -> Any:
    tiles = ((width, 128), (width // 4, 128), (width // CHANNELS, TOKENS_EACH))
    return fragmented_array.TiledLayout(
        plgpu.Tiling(tiles), (-6,), (-3, -4), -1, _check_canonical=False
    ).canonicalize()


def turned(x: Any) -> Any:
    """The transpose of [128, width] numbers, each of which stays in the thread that has it."""
    if hopper.interpreted():
        return x.T
    width = x.shape[1]
    result = plgpu.ShapeDtypeStruct((width, 128), x.dtype, layout=turned_layout(width))

    @plgpu.inline_mgpu(arg_types=(channels_layout(width),), return_type=result)
    def turn(_, x):
        return turned_array(list(x.registers.flat), width)

    return turn(x)


def turned_array(by_token: Sequence[Any], width: int) -> Any:
    """The turned array of a thread's vectors along channels, one for each of its tokens."""
    by_channel = zip(*map(elements, by_token))
    return array(map(vector_of, by_channel), (width, 128), _turned(width))


def reciprocal(x: Any) -> Any:
    """1 / x in `tokens_layout`, to a unit of the last place: one instruction, not ten."""
    if hopper.interpreted():
        return 1 / x
    layout = tokens_layout()
    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def invert(_, x):
        rows = [map(partial(_f32_op, RECIPROCAL), elements(r)) for r in x.registers.flat]
        return array((vector_of(list(row)) for row in rows), x.shape, x.layout)

    return invert(x)


def measured(x: Any) -> tuple[Any, Any]:
    """Numbers in `tokens_layout` in float32, with NaN for infinities; and each row's largest.

    That is the largest finite magnitude.
    """
    if hopper.interpreted():
        return _measured_in_plain(x.astype(jnp.float32))
    layout = tokens_layout()
    numbers = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout)
    largest = plgpu.ShapeDtypeStruct(x.shape[:1], jnp.float32, layout=layout.reduce(1))

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=(numbers, largest))
    def measure(_, x):
        registers = list(x.registers.flat)
        if x.mlir_dtype == ir.BF16Type.get():
            rows, largest = _measured_words([words_of(r) for r in registers])
        else:
            rows, largest = _measured_numbers([elements(r) for r in registers], ALONG_ROW)
        return (
            array(map(vector_of, rows), x.shape, x.layout),
            array([vector_of([m]) for m in largest], x.shape[:1], x.layout.reduce((1,))),
        )

    return measure(x)


def next_channels(ring: Any, scale: Any = None) -> tuple[Any, Any, Any]:
    """Of turned numbers [width, 128], the first channel of each thread, measured; and the rest.

    Results: these 16 channels in float32 [16, 128], times their tokens' scales if there are any,
    with NaN for infinities; the largest finite magnitude of each; and the numbers with these
    channels put last. Channel i of the 16 is number i * width / 16 of the ring.
    """
    width, scales = ring.shape[0], () if scale is None else (scale,)
    if hopper.interpreted():
        grouped = ring.reshape(CHANNELS, -1, 128)
        numbers = grouped[:, 0].astype(jnp.float32)
        for scale in scales:
            numbers *= scale
        return *_measured_in_plain(numbers), jnp.roll(grouped, -1, axis=1).reshape(width, 128)
    one, all_of_them = turned_layout(CHANNELS), turned_layout(width)
    results = (
        plgpu.ShapeDtypeStruct((CHANNELS, 128), jnp.float32, layout=one),
        plgpu.ShapeDtypeStruct((CHANNELS,), jnp.float32, layout=one.reduce(1)),
        plgpu.ShapeDtypeStruct(ring.shape, ring.dtype, layout=all_of_them),
    )
    of_tokens = [one.reduce(0)] * len(scales)

    @plgpu.inline_mgpu(arg_types=(all_of_them, *of_tokens), return_type=results)
    def measure(_, ring, *scales):
        first, *rest = ring.registers.flat
        if scales:
            (scale,) = map(elements, scales[0].registers.flat)
            numbers = [y for word in words_of(first) for y in _float32_of_e4m3(word)]
            numbers = [arith.mulf(x, y) for x, y in zip(numbers, scale, strict=True)]
            (numbers,), (largest,) = _measured_numbers([numbers], ALONG_CHANNEL)
        else:
            words = [_with_nan_for_infinities(word) for word in words_of(first)]
            numbers = [y for word in words for y in _float32(word)]
            largest = _larger(*_magnitudes(_over_lanes(_larger_words, words, ALONG_CHANNEL)))
        layout = _turned(CHANNELS)
        return (
            array([vector_of(numbers)], (CHANNELS, 128), layout),
            array([vector_of([largest])], (CHANNELS,), layout.reduce((1,))),
            array([*rest, first], ring.shape, ring.layout),
        )

    return measure(ring, *scales)


def _measured_in_plain(x: Any) -> tuple[Any, Any]:
    x = jnp.where(jnp.isfinite(x), x, jnp.nan)
    return x, jnp.max(jnp.where(jnp.isnan(x), 0.0, jnp.abs(x)), axis=1)


def _measured_words(rows: list[list[Any]]) -> tuple[list[list[Any]], list[Any]]:
    """Float32 numbers of rows of words of two bfloat16 numbers, and the largest of each row."""
    rows = [[_with_nan_for_infinities(word) for word in row] for row in rows]
    of_lane, largest = [tree(_larger_words, row) for row in rows], []
    for first in range(0, len(rows), 2):  # two rows share the words that lanes exchange
        a, b = of_lane[first], of_lane[min(first + 1, len(rows) - 1)]
        halves = [_word_op(f"prmt.b32 $0, $1, $2, {picks};", a, b) for picks in (0x5410, 0x7632)]
        largest += _magnitudes(_over_lanes(_larger_words, halves, ALONG_ROW))
    numbers = [[y for word in row for y in _float32(word)] for row in rows]
    return numbers, largest[: len(rows)]


def _measured_numbers(
    rows: list[list[Any]], distances: Sequence[int]
) -> tuple[list[list[Any]], list[Any]]:
    """Rows of float32 numbers with NaN for infinities, and the largest finite one of each row."""

    def measure(rows):
        # Against zero, because of two NaN the larger one is NaN.
        return [_over_lanes(_larger, [*row, _constant(0.0)], distances) for row in rows]

    largest, size = measure(rows), len(rows[0])
    numbers = [x for row in rows for x in row]
    infinite = _any_lane_has_infinity(tree(_larger, largest))
    branch = scf.IfOp(infinite, [ir.F32Type.get()] * (len(numbers) + len(rows)), has_else=True)
    then_block: Any = branch.then_block
    with ir.InsertionPoint(then_block):
        finite = [_f32_op("fma.rn.f32 $0, $1, 0f00000000, $1;", x) for x in numbers]
        rows = [finite[i : i + size] for i in range(0, len(finite), size)]
        scf.yield_([*finite, *measure(rows)])
    else_block: Any = branch.else_block
    with ir.InsertionPoint(else_block):
        scf.yield_([*numbers, *largest])
    results: list[Any] = list(branch.results)
    rows = [results[i : i + size] for i in range(0, len(numbers), size)]
    return rows, results[len(numbers) :]


def _over_lanes(op: Callable[[Any, Any], Any], numbers: Iterable[Any], distances) -> Any:
    number = tree(op, numbers)
    for distance in distances:
        number = op(number, utils.shfl_bfly(number, distance))
    return number


def tree(op: Callable[[Any, Any], Any], numbers: Iterable[Any]) -> Any:
    """All numbers by an operation of two, neighbours first."""
    numbers = list(numbers)
    while len(numbers) > 1:
        pairs = [numbers[i : i + 2] for i in range(0, len(numbers), 2)]
        numbers = [op(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return numbers[0]


def _with_nan_for_infinities(word: Any) -> Any:
    return _word_op("{ .reg .b32 z; mov.b32 z, 0; fma.rn.bf16x2 $0, $1, z, $1; }", word)


def _larger_words(a: Any, b: Any) -> Any:
    """The larger magnitudes of two words of two bfloat16 numbers, signed anyhow, never a NaN's."""
    return _word_op("max.xorsign.abs.bf16x2 $0, $1, $2;", a, b)


def _larger(a: Any, b: Any) -> Any:
    """The larger magnitude of two float32 numbers, NaN only of two NaN."""
    return _f32_op("{ .reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.f32 $0, a, b; }", a, b)


def _magnitudes(word: Any) -> list[Any]:
    """Float32 magnitudes of a word of two bfloat16 numbers, zero for NaN."""
    return [_larger(x, _constant(0.0)) for x in _float32(word)]


def _float32(word: Any) -> tuple[Any, Any]:
    """The two float32 numbers of a word of two bfloat16 ones."""
    f32 = ir.F32Type.get()
    low, high = arith.shli(word, _constant(16)), arith.andi(word, _constant(-1 << 16))
    return llvm.bitcast(f32, low), llvm.bitcast(f32, high)


def _float32_of_e4m3(word: Any) -> list[Any]:
    """The four float32 numbers of a word of four E4M3 ones."""
    f32 = ir.F32Type.get()
    text = (
        "{ .reg .b16 l, h, p, q; .reg .b32 a, b; mov.b32 {l, h}, $4; "
        "cvt.rn.f16x2.e4m3x2 a, l; cvt.rn.f16x2.e4m3x2 b, h; "
        "mov.b32 {p, q}, a; cvt.f32.f16 $0, p; cvt.f32.f16 $1, q; "
        "mov.b32 {p, q}, b; cvt.f32.f16 $2, p; cvt.f32.f16 $3, q; }"
    )
    kind = ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>")
    numbers: Any = llvm.inline_asm(kind, [word], text, "=f,=f,=f,=f,r")
    return [llvm.extractvalue(f32, numbers, [i]) for i in range(4)]


def _any_lane_has_infinity(x: Any) -> Any:
    text = (
        "{ .reg .pred p, q; setp.eq.f32 p, $1, 0f7F800000; "
        "vote.sync.any.pred q, p, 0xffffffff; selp.b32 $0, 1, 0, q; }"
    )
    i32 = ir.IntegerType.get_signless(32)
    any_lane: Any = llvm.inline_asm(i32, [x], text, "=r,f", has_side_effects=True)
    return arith.cmpi(arith.CmpIPredicate.ne, any_lane, _constant(0))


def _word_op(text: str, *words: Any) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, words, text, ",".join(["=r", *"r" * len(words)]))


def _f32_op(text: str, *numbers: Any) -> Any:
    return llvm.inline_asm(ir.F32Type.get(), numbers, text, ",".join(["=f", *"f" * len(numbers)]))


def _constant(x: int | float) -> Any:
    kind = ir.F32Type.get() if isinstance(x, float) else ir.IntegerType.get_signless(32)
    return utils.c(x, kind)


def elements(register: Any) -> list[Any]:
    """The numbers of a vector."""
    return [vector.extract(register, [], [i]) for i in range(ir.VectorType(register.type).shape[0])]


def numbers_of(x: Any) -> list[Any]:
    """All numbers of a thread of an array, in the order of its registers."""
    return [number for register in x.registers.flat for number in elements(register)]


def vector_of(numbers: Sequence[Any]) -> Any:
    """The vector of some numbers of one type."""
    out: Any = llvm.mlir_undef(ir.VectorType.get((len(numbers),), numbers[0].type))
    for i, number in enumerate(numbers):
        out = vector.insert(number, out, [], [i])
    return out


def words_of(register: Any) -> list[Any]:
    """The 32-bit words of a vector of shorter numbers."""
    kind = ir.VectorType(register.type)
    words = kind.shape[0] * utils.bitwidth(kind.element_type) // 32
    i32 = ir.IntegerType.get_signless(32)
    return elements(utils.bitcast(register, ir.VectorType.get((words,), i32)))


def array(
    registers: Iterable[Any], shape: tuple[int, ...], layout: Any, is_signed: bool | None = None
) -> Any:
    """The array that a thread has these registers of; `is_signed` only says of what integers."""
    registers = list(registers)
    objects = np.empty(len(registers), dtype=object)
    objects[:] = registers
    return fragmented_array.FragmentedArray(
        _registers=objects.reshape(layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=is_signed,
    )
