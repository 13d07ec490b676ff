"""Hopper's asynchronous matrix products (wgmma), issued without waiting.

Pallas's own `wgmma` ties an accumulator to a scope at whose end it waits, and hoists descriptors
out of loops until registers spill. Attention wants two accumulators in flight while the softmax
runs, and operands that lie in separate 64 x 64 tiles, so these functions issue the instructions by
hand. All tiles are 64 rows of 128 bytes in shared memory, swizzled over them, 8 KB each and
contiguous: 64 x 64 numbers of 16 bits, or 64 x 128 FP8 numbers. Accumulators are tuples of (64, 64)
float32 arrays in registers, side by side; one that is alone may have fewer columns, a multiple of
16: those of its second operand's tile that come first.

An accumulator that has been passed to `multiply` may be read, or changed, only after `wait`.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from dsv3_jax.kernels.hopper import WGMMA, interpreted, plgpu, swizzled
from dsv3_jax.kernels.mla_decode.registers import assemble, held, names

TILE_BYTES = 64 * 64 * 2
ROW_BYTES = 128
REF = plgpu.RefType(swizzled(jnp.bfloat16))
FP8_REF = plgpu.RefType(swizzled(jnp.float8_e4m3fn))
ACCUMULATOR = fragmented_array.WGMMA_LAYOUT_ACC_32BIT


def multiply(
    accumulator, a, b, *, b_rows_first: bool, clear: bool = False, registers=False, start: int = 0
):
    """accumulator + a @ b for one tile of 64 along the contracted dim; not complete on return.

    a: a tile in shared memory of bfloat16, or, with `registers`, an array, whose dtype b's bits are
    taken for: (64, 64), or (64, 32) for what follows `start` along the contracted dim. b: `count`
    tiles side by side, [count, 64, 64]; rows of a tile run along the contracted dim
    (`b_rows_first`), or along the result's columns, as keys do. `clear` starts from zero, not from
    the accumulator.
    """
    count = len(accumulator)
    if interpreted():
        return _interpreted(accumulator, a, b, b_rows_first, clear, start)

    @plgpu.inline_mgpu(
        arg_types=((WGMMA,) * count, WGMMA if registers else REF, REF),
        return_type=tuple(map(like, accumulator)),
    )
    def issue(_, accumulator, a, b):
        return _issue(accumulator, a, b, b_rows_first, clear, start)

    return issue(tuple(accumulator), a, b)


class Step(NamedTuple):
    """32 numbers of the contracted dim: where they lie, in bytes from both operands' starts."""

    a: int
    b: int


def multiply_fp8(accumulator, a, b, steps: Sequence[Step]):
    """accumulator + a @ b.T: the sum of steps in their order; not complete on return.

    An int: a new accumulator of so many columns. a: E4M3 tiles [n, 64, 128] in shared memory; b:
    tiles [n, 64, 64], named as bfloat16, of which each has two E4M3 numbers. The tensor core's sums
    keep 13 bits behind the largest term's first (quantization/tensor_core.py).
    """
    new = isinstance(accumulator, int)
    columns = accumulator if new else accumulator[0].shape[1]
    if interpreted():
        return _interpreted_fp8(accumulator, a, b, steps)
    before = () if new else tuple(accumulator)

    @plgpu.inline_mgpu(
        arg_types=((WGMMA,) * len(before), FP8_REF, REF),
        return_type=(plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=WGMMA),),
    )
    def issue(_, before, a, b):
        return _issue_fp8(before, columns, a, b, steps)

    return issue(before, a, b)


def wait(pending: int, *accumulators):
    """The accumulators, when all but the last `pending` calls of `multiply` are complete."""
    if interpreted():
        return accumulators
    counts = [len(accumulator) for accumulator in accumulators]
    flat = tuple(itertools.chain(*accumulators))

    @plgpu.inline_mgpu(arg_types=((WGMMA,) * len(flat),), return_type=tuple(map(like, flat)))
    def finish(_, arrays):
        return _assembly(arrays, [], [], f"wgmma.wait_group.sync.aligned {pending};")

    done = iter(finish(flat))
    return tuple(tuple(itertools.islice(done, count)) for count in counts)


def allow(pending: int) -> None:
    """Waits until all but the last `pending` calls of `multiply` are complete.

    Their operands' registers may be written again; accumulators are still to be waited for.
    """
    if not interpreted():
        text = [f"wgmma.wait_group.sync.aligned {pending};"]
        plgpu.inline_mgpu()(lambda _: assemble("", [], "", text) and None)()


def scale_rows(accumulator, factor):
    """The accumulator times a number for each row, without the work where all are 1.

    Each warp looks at its own 16 rows. `factor` is a row vector, `WGMMA.reduce(1)`.
    """
    if interpreted():
        return tuple(tile * lax.broadcast_in_dim(factor, (64, 64), [0]) for tile in accumulator)
    count = len(accumulator)

    @plgpu.inline_mgpu(
        arg_types=((WGMMA,) * count, WGMMA.reduce(1)),
        return_type=tuple(map(like, accumulator)),
    )
    def scale(_, accumulator, factor):
        total = 32 * count
        names = [f"${2 * total}", f"${2 * total + 1}"]  # rows r and r + 8 of a thread
        lines = ["{ .reg .pred p, q;"]
        lines += [f"setp.neu.f32 {p}, {name}, 0f3F800000;" for p, name in zip("pq", names)]
        lines += ["or.pred p, p, q;", "vote.sync.any.pred p, p, 0xffffffff;", "@!p bra DONE;"]
        lines += [f"mul.f32 ${i}, ${i}, {names[i // 2 % 2]};" for i in range(total)]
        registers = list(factor.registers.flat)
        assert len(registers) == 2
        return _assembly(accumulator, registers, ["f", "f"], "\n".join([*lines, "DONE: }"]))

    return scale(tuple(accumulator), factor)


def like(accumulator) -> Any:
    """The type of an accumulator as inline assembly returns it."""
    return plgpu.ShapeDtypeStruct(accumulator.shape, jnp.float32, layout=WGMMA)


def numbers_of(accumulator) -> list[Any]:
    """The numbers that a thread holds of an accumulator, half its columns, in wgmma's order."""
    return held(accumulator.to_layout(ACCUMULATOR))


def as_accumulator(numbers):
    """The accumulator of which a thread holds these; as `numbers_of` has them."""
    one = ir.VectorType.get((1,), ir.F32Type.get())
    registers = np.array([llvm.bitcast(one, number) for number in numbers], dtype=object)
    return fragmented_array.FragmentedArray(
        _registers=registers.reshape(ACCUMULATOR.registers_shape((64, 2 * len(numbers)))),
        _layout=ACCUMULATOR,
        _is_signed=None,
    ).to_layout(WGMMA.to_mgpu())


def synchronize():
    """Waits for the four warps of this warpgroup."""
    if not interpreted():
        plgpu.inline_mgpu()(lambda _: utils.warpgroup_barrier())()


def _interpreted(accumulator, a, b, b_rows_first: bool, clear: bool, start: int):
    in_registers = isinstance(a, jax.Array) and isinstance(jax.typeof(a), ShapedArray)
    a, out = a if in_registers else a[...], []
    for tile, old in enumerate(accumulator):
        numbers = lax.bitcast_convert_type(b[tile], a.dtype).astype(jnp.float32)
        numbers = numbers if b_rows_first else numbers.T
        numbers = numbers[start : start + a.shape[1], : old.shape[1]]
        product = jnp.dot(a.astype(jnp.float32), numbers)
        out.append(product if clear else old + product)
    return tuple(out)


def _interpreted_fp8(accumulator, a, b, steps: Sequence[Step]):
    def numbers(tiles, start):
        tile, column = divmod(start, TILE_BYTES)
        bits = lax.bitcast_convert_type(tiles[tile], jnp.uint8).reshape(64, ROW_BYTES)
        e4m3 = lax.bitcast_convert_type(bits[:, column : column + 32], jnp.float8_e4m3fn)
        return e4m3.astype(jnp.float32)

    if isinstance(accumulator, int):
        accumulator = (jnp.zeros((64, accumulator), jnp.float32),)
    (total,) = accumulator
    for step in steps:
        total += jnp.dot(numbers(a, step.a), numbers(b, step.b)[: total.shape[1]].T)
    return (total,)


def _issue_fp8(before, columns: int, a, b, steps: Sequence[Step]):
    count = columns // 2  # of registers
    first = 2 * count if before else count  # of the operands: results are tied to as many
    lines = ["{ .reg .pred keep; .reg .b64 a, b;", "wgmma.fence.sync.aligned;"]
    for number, step in enumerate(steps):
        lines.append(f"setp.ne.b32 keep, {int(bool(before) or number > 0)}, 0;")
        lines.append(f"add.s64 a, ${first}, {step.a >> 4}; add.s64 b, ${first + 1}, {step.b >> 4};")
        kind = f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3"
        lines.append(f"{kind} {names(0, count)}, a, b, keep, 1, 1;")
    lines.append("wgmma.commit_group.sync.aligned; }")
    operands = [_descriptor(a, rows_first=False), _descriptor(b, rows_first=False)]
    if before:
        return _assembly(before, operands, ["l", "l"], "\n".join(lines))
    return (as_accumulator(assemble("f" * count, operands, "ll", lines)),)


def _issue(accumulator, a, b, b_rows_first: bool, clear: bool, start: int):
    columns = sum(tile.shape[1] for tile in accumulator)
    total = columns // 2  # registers of all accumulators, a thread
    in_registers = isinstance(a, fragmented_array.FragmentedArray)
    operands, constraints, kind, steps = [], [], "bf16", 4
    if in_registers:
        kind = str(a.mlir_dtype)
        i32 = ir.IntegerType.get_signless(32)
        steps = a.shape[1] // 16
        for step in range(steps):
            for register in a[:, step * 16 : (step + 1) * 16].registers.flat:
                operands.append(llvm.bitcast(i32, register))
                constraints.append("r")
    else:
        operands.append(_descriptor(a, rows_first=False))
        constraints.append("l")
    operands.append(_descriptor(b, rows_first=b_rows_first))
    constraints.append("l")
    first = 2 * total
    b_name = f"${first + len(operands) - 1}"
    b_step = 2 * 1024 if b_rows_first else 32  # bytes from 16 of the contracted dim to the next
    lines = ["{ .reg .pred keep; .reg .b64 a, b;", "wgmma.fence.sync.aligned;"]
    for step in range(steps):
        lines.append(f"setp.ne.b32 keep, {int(not clear or step > 0)}, 0;")
        lines.append(f"add.s64 b, {b_name}, {(start // 16 + step) * b_step >> 4};")
        if in_registers:
            a_name, a_flags = names(first + 4 * step, 4), ""
        else:
            lines.append(f"add.s64 a, ${first}, {step * 32 >> 4};")
            a_name, a_flags = "a", "0, "
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {names(0, total)}, "
            f"{a_name}, b, keep, 1, 1, {a_flags}{int(b_rows_first)};"
        )
    lines.append("wgmma.commit_group.sync.aligned; }")
    return _assembly(accumulator, operands, constraints, "\n".join(lines))


def _assembly(arrays, operands, constraints, text: str):
    """The arrays after a piece of assembly that changes their registers in place."""
    numbers = [number for array in arrays for number in numbers_of(array)]
    total = len(numbers)
    own = map(str, range(total))
    numbers = assemble("f" * total, [*numbers, *operands], [*own, *constraints], [text])
    each = total // len(arrays)
    return tuple(as_accumulator(numbers[i : i + each]) for i in range(0, total, each))


def _descriptor(ref, rows_first: bool):
    """The 64-bit word that tells wgmma where tiles lie: PTX ISA, "matrix descriptor format"."""
    i64 = ir.IntegerType.get_signless(64)
    constant = functools.partial(arith.constant, i64)
    address = llvm.ptrtoint(i64, utils.memref_ptr(ref))
    # From 8 rows of a tile to the next, and from a tile to the one beside it.
    stride, leading = 1024 >> 4, (TILE_BYTES >> 4 if rows_first else 1)
    high = (1 << 30) | stride  # the top bits say: swizzled over 128 bytes
    fixed = llvm.or_(
        constant(leading << 16),
        llvm.shl(constant(high), constant(32), overflow_flags=llvm.IntegerOverflowFlags.none),
    )
    return llvm.or_(llvm.lshr(llvm.and_(address, constant(0x3FFFF)), constant(4)), fixed)
