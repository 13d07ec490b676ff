"""A thread's registers as inline assembly sees them, and as arrays between two pieces of it."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from dsv3_jax.kernels.hopper_integers import constant, plus, times

THREADS = 128  # of a warpgroup


def assemble(
    results: str, operands: Sequence[Any], constraints: Sequence[str], lines: Iterable[str]
) -> list[Any]:
    """What a piece of assembly leaves in its registers: `results` has an "r" or "f" for each.

    In `lines` they are $0, $1, ...; then come the operands, of `constraints` "r", "f" or "l", or a
    result's number, whose register it is then. Any other result has a register of its own, and may
    be written before operands are read.
    """
    kinds = {"r": ir.IntegerType.get_signless(32), "f": ir.F32Type.get()}
    types = [kinds[kind] for kind in results]
    whole = ir.Type.parse("!llvm.void")
    if types:
        whole = types[0] if len(types) == 1 else llvm.StructType.get_literal(types)
    result: Any = llvm.inline_asm(
        whole,
        list(operands),
        "\n".join(lines),
        ",".join([*(f"=&{kind}" for kind in results), *constraints]),
        asm_dialect=0,
        has_side_effects=True,
    )
    if len(types) < 2:
        return [result][: len(types)]
    return [llvm.extractvalue(kind, result, [i]) for i, kind in enumerate(types)]


def array(values: Sequence[Any], like: Any) -> Any:
    """The array of a type whose registers hold these 32-bit values, in order."""
    layout = like.layout.to_mgpu()
    element = utils.dtype_to_ir_type(like.dtype)
    register = layout.registers_element_type(element)
    each = ir.VectorType(register).shape[0] * utils.bitwidth(element) // 32
    if each == 1:
        registers = [llvm.bitcast(register, value) for value in values]
    else:
        registers = []
        for i in range(0, len(values), each):
            vector = llvm.mlir_undef(register)
            for lane, value in enumerate(values[i : i + each]):
                vector = llvm.insertelement(vector, value, constant(lane))
            registers.append(vector)
    return fragmented_array.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(layout.registers_shape(like.shape)),
        _layout=layout,
        _is_signed=True if isinstance(element, ir.IntegerType) else None,
    )


def held(array: Any) -> list[Any]:
    """The 32-bit values in an array's registers, in order; pairs of 16 bits as one integer."""
    out = []
    for register in array.registers.flat:
        vector = ir.VectorType(register.type)
        if utils.bitwidth(vector.element_type) == 32:
            lanes = range(vector.shape[0])
            out += [llvm.extractelement(register, constant(lane)) for lane in lanes]
        else:
            out.append(llvm.bitcast(ir.IntegerType.get_signless(32), register))
    return out


def names(first: int, count: int) -> str:
    """Operands in a row, as vector loads and products write them."""
    return "{" + ", ".join(f"${first + i}" for i in range(count)) + "}"


def warp_and_lane() -> tuple[Any, Any]:
    """This thread's warp in its warpgroup, and its place in the warp."""
    thread: Any = arith.andi(utils.thread_idx(), constant(THREADS - 1))
    return arith.shrui(thread, constant(5)), arith.andi(thread, constant(31))


def row_and_column() -> tuple[Any, Any, Any]:
    """Warp, row of eight and place in it, of a thread's numbers in fragments and accumulators."""
    warp, lane = warp_and_lane()
    return warp, arith.shrui(lane, constant(2)), arith.andi(lane, constant(3))


def tile_address(ref: Any) -> Any:
    """Where this thread's 16 bytes begin for `ldmatrix` and `stmatrix` of four 8 x 16-byte blocks.

    Of a tile of 128-byte rows, swizzled: a warp's 16 rows, by the first two 16-byte columns. An
    exclusive or with 32 n goes n such pairs of columns on.
    """
    warp, lane = warp_and_lane()
    row = arith.andi(lane, constant(7))
    lower = arith.andi(arith.shrui(lane, constant(3)), constant(1))
    chunk = arith.xori(arith.shrui(lane, constant(4)), row)
    rows = plus(times(warp, 16 * 128), times(lower, 8 * 128), times(row, 128))
    return plus(shared_address(ref), rows, times(chunk, 16))


def shared_address(ref: Any) -> Any:
    """Where an array in shared memory begins."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def global_address(ref: Any, offset: Any) -> Any:
    """The address of what lies `offset` bytes from the start of an array in memory."""
    i64 = ir.IntegerType.get_signless(64)
    return arith.addi(llvm.ptrtoint(i64, utils.memref_ptr(ref)), arith.extui(i64, offset))
