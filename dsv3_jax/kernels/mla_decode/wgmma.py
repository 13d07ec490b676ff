"""Hopper's asynchronous matrix products (wgmma) of 16-bit numbers, issued without waiting.

Pallas's own `wgmma` ties an accumulator to a scope at whose end it waits, and hoists descriptors
out of loops until registers spill. Attention wants two accumulators in flight while the softmax
runs, and operands that lie in separate 64 x 64 tiles, so these functions issue the instructions by
hand. All tiles are 64 x 64 in shared memory, swizzled over 128 bytes, 8 KB each and contiguous;
accumulators are tuples of (64, 64) float32 arrays in registers, side by side.

An accumulator that has been passed to `multiply` may be read, or changed, only after `wait`.
"""

import functools
import itertools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from dsv3_jax.kernels.hopper import WGMMA, interpreted, plgpu, swizzled
from dsv3_jax.kernels.mla_decode.registers import assemble

TILE_BYTES = 64 * 64 * 2
REF = plgpu.RefType(swizzled(jnp.bfloat16))
ACCUMULATOR = fragmented_array.WGMMA_LAYOUT_ACC_32BIT


def multiply(accumulator, a, b, *, b_rows_first: bool, clear: bool = False, registers=False):
    """accumulator + a @ b for one tile of 64 along the contracted dim; not complete on return.

    a: a tile in shared memory of bfloat16, or, with `registers`, a (64, 64) array, whose dtype b's
    bits are taken for. b: `count` tiles side by side, [count, 64, 64]; rows of a tile run along the
    contracted dim (`b_rows_first`), or along the result's columns, as keys do. `clear` starts from
    zero, not from the accumulator.
    """
    count = len(accumulator)
    if interpreted():
        if isinstance(a, jax.Array) and isinstance(jax.typeof(a), ShapedArray):
            return _interpreted_array(accumulator, a, b, b_rows_first, clear)
        return _interpreted(accumulator, a, b, b_rows_first, clear)

    @plgpu.inline_mgpu(
        arg_types=((WGMMA,) * count, WGMMA if registers else REF, REF),
        return_type=(plgpu.ShapeDtypeStruct((64, 64), jnp.float32, layout=WGMMA),) * count,
    )
    def issue(_, accumulator, a, b):
        return _issue(accumulator, a, b, b_rows_first, clear)

    return issue(tuple(accumulator), a, b)


def wait(pending: int, *accumulators):
    """The accumulators, when all but the last `pending` calls of `multiply` are complete."""
    if interpreted():
        return accumulators
    counts = [len(accumulator) for accumulator in accumulators]
    flat = tuple(itertools.chain(*accumulators))

    @plgpu.inline_mgpu(
        arg_types=((WGMMA,) * len(flat),),
        return_type=(plgpu.ShapeDtypeStruct((64, 64), jnp.float32, layout=WGMMA),) * len(flat),
    )
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
        return_type=(plgpu.ShapeDtypeStruct((64, 64), jnp.float32, layout=WGMMA),) * count,
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


def synchronize():
    """Waits for the four warps of this warpgroup."""
    if not interpreted():
        plgpu.inline_mgpu()(lambda _: utils.warpgroup_barrier())()


def _interpreted(accumulator, a, b, b_rows_first: bool, clear: bool):
    def product(tile):
        def compute(result):
            plgpu.wgmma(result, a, b.at[tile] if b_rows_first else b.at[tile].T)
            return result[...]

        return pl.run_scoped(compute, plgpu.ACC((64, 64), jnp.float32))

    products = [product(tile) for tile in range(len(accumulator))]
    if clear:
        return tuple(products)
    return tuple(old + new for old, new in zip(accumulator, products))


def _interpreted_array(accumulator, a, b, b_rows_first: bool, clear: bool):
    out = []
    for tile, old in enumerate(accumulator):
        numbers = lax.bitcast_convert_type(b[tile], a.dtype).astype(jnp.float32)
        product = jnp.dot(a.astype(jnp.float32), numbers if b_rows_first else numbers.T)
        out.append(product if clear else old + product)
    return tuple(out)


def _issue(accumulator, a, b, b_rows_first: bool, clear: bool):
    count = len(accumulator)
    total = 32 * count  # registers of all accumulators, a thread
    in_registers = isinstance(a, fragmented_array.FragmentedArray)
    operands, constraints, kind = [], [], "bf16"
    if in_registers:
        kind = str(a.mlir_dtype)
        i32 = ir.IntegerType.get_signless(32)
        for step in range(4):
            for register in a[:, step * 16 : (step + 1) * 16].registers.flat:
                operands.append(llvm.bitcast(i32, register))
                constraints.append("r")
    else:
        operands.append(_descriptor(a, rows_first=False))
        constraints.append("l")
    operands.append(_descriptor(b, rows_first=b_rows_first))
    constraints.append("l")
    first = 2 * total
    names = "{" + ", ".join(f"${i}" for i in range(total)) + "}"
    b_name = f"${first + len(operands) - 1}"
    b_step = 2 * 1024 if b_rows_first else 32  # bytes from 16 of the contracted dim to the next
    lines = ["{ .reg .pred keep; .reg .b64 a, b;", "wgmma.fence.sync.aligned;"]
    for step in range(4):
        lines.append(f"setp.ne.b32 keep, {int(not clear or step > 0)}, 0;")
        lines.append(f"add.s64 b, {b_name}, {step * b_step >> 4};")
        if in_registers:
            four = ", ".join(f"${first + 4 * step + i}" for i in range(4))
            a_name, a_flags = "{" + four + "}", ""
        else:
            lines.append(f"add.s64 a, ${first}, {step * 32 >> 4};")
            a_name, a_flags = "a", "0, "
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{64 * count}k16.f32.{kind}.{kind} {names}, "
            f"{a_name}, b, keep, 1, 1, {a_flags}{int(b_rows_first)};"
        )
    lines.append("wgmma.commit_group.sync.aligned; }")
    return _assembly(accumulator, operands, constraints, "\n".join(lines))


def _assembly(arrays, operands, constraints, text: str):
    """The arrays after a piece of assembly that changes their registers in place."""
    held = [array.to_layout(ACCUMULATOR) for array in arrays]
    registers = [register for array in held for register in array.registers.flat]
    total = len(registers)
    one = ir.VectorType.get((1,), ir.F32Type.get())
    result: Any = llvm.inline_asm(
        llvm.StructType.get_literal([one] * total),
        [*registers, *operands],
        text,
        ",".join(["=f"] * total + [str(i) for i in range(total)] + constraints),
        asm_dialect=0,
        has_side_effects=True,
    )
    values = iter([llvm.extractvalue(one, result, [i]) for i in range(total)])
    return tuple(
        fragmented_array.FragmentedArray(
            _registers=np.array(
                list(itertools.islice(values, array.registers.size)), dtype=object
            ).reshape(array.registers.shape),
            _layout=array.layout,
            _is_signed=None,
        ).to_layout(WGMMA.to_mgpu())
        for array in held
    )


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
