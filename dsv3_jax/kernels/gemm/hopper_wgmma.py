"""E4M3 products of two blocks in shared memory, in registers that stay where they are.

Pallas's own wgmma hands out a new accumulator, and ptxas may start the next product in registers
of its own while the last is being promoted; two totals and two products do not fit, and it spills
200 bytes a thread inside the loop. Here a product begins (`start`) and ends (`finish`) in the
registers of the accumulator that it is given, as assembly that ptxas takes as it is. What stands
between the two runs while the tensor core works.
"""

from collections.abc import Sequence
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, mma_utils, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from dsv3_jax.kernels.hopper import WGMMA, plgpu, swizzled

SLAB_BYTES = 128  # of K in a slot: one swizzle row, and the span of one FP8 scale


def zeros(columns: int) -> Any:
    """(64, columns) of zeros as wgmma leaves its results."""
    return plgpu.layout_cast(jnp.zeros((64, columns), jnp.float32), WGMMA)


def multiply(a: Any, b: Any) -> Any:
    """a @ b.T by Pallas's wgmma, complete when it returns; the interpreter can run this one."""

    def product(accumulator):
        plgpu.wgmma(accumulator, a, b.T)
        return accumulator[...]

    return pl.run_scoped(product, plgpu.ACC((64, b.shape[0]), jnp.float32))


def start(accumulator: Any, a: Any, b: Any) -> Any:
    """Begins a @ b.T in `accumulator`, whatever it holds. E4M3, [64, 128] by [N, 128]."""
    columns = b.shape[0]
    block = plgpu.RefType(swizzled(jnp.float8_e4m3fn))

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, block, block),
        return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=WGMMA),
    )
    def begin(_, accumulator, a, b):
        b = utils.memref_transpose(b, (1, 0, 3, 2))
        (a_base, a_strides), _, _ = mma_utils.create_descriptor(
            a,
            swizzle=SLAB_BYTES,
            large_tile=(64, SLAB_BYTES),
            group_size=(64, SLAB_BYTES),
            logical_k_major=False,
        )
        (b_base, b_strides), _, _ = mma_utils.create_descriptor(
            b,
            swizzle=SLAB_BYTES,
            large_tile=(SLAB_BYTES, SLAB_BYTES),
            group_size=(SLAB_BYTES, columns),
            logical_k_major=True,
        )
        count = columns // 2  # registers of a thread
        names = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
        lines = ["{ .reg .pred keep; .reg .b64 a, b;", "wgmma.fence.sync.aligned;"]
        for quarter in range(4):  # an instruction takes 32 of K
            a_offset, b_offset = (quarter * x[1][0] >> 4 for x in (a_strides, b_strides))
            lines += [
                f"setp.ne.b32 keep, {quarter}, 0;",
                f"add.s64 a, ${2 * count}, {a_offset}; add.s64 b, ${2 * count + 1}, {b_offset};",
                f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3 {names}, a, b, "
                "keep, 1, 1;",
            ]
        lines += ["wgmma.commit_group.sync.aligned; }"]
        return _in_place([accumulator], lines, [a_base, b_base])[0]

    return begin(accumulator, a, b)


def finish(accumulators: Sequence[Any]) -> tuple[Any, ...]:
    """Waits until all products that were begun are complete, in these accumulators."""
    shapes = [
        plgpu.ShapeDtypeStruct(each.shape, jnp.float32, layout=WGMMA) for each in accumulators
    ]

    @plgpu.inline_mgpu(arg_types=(WGMMA,) * len(shapes), return_type=tuple(shapes))
    def wait(_, *accumulators):
        return _in_place(accumulators, ["wgmma.wait_group.sync.aligned 0;"], [])

    return wait(*accumulators)


def _in_place(arrays, lines: Sequence[str], operands: Sequence[Any]) -> tuple[Any, ...]:
    """Assembly that reads and writes the registers of `arrays`, which come first in it.

    Each register is an output and, tied to it, an input: those count twice. 64-bit operands follow.
    """
    held = [
        fragmented_array.optimization_barrier(
            array.to_layout(fragmented_array.WGMMA_LAYOUT_ACC_32BIT)
        )
        for array in arrays
    ]
    registers = [register for array in held for register in array.registers.flat]
    one = ir.VectorType.get((1,), ir.F32Type.get())
    ties = [str(i) for i in range(len(registers))]
    result: Any = llvm.inline_asm(
        llvm.StructType.get_literal([one] * len(registers)),
        [*registers, *operands],
        "\n".join(lines),
        ",".join(["=f"] * len(registers) + ties + ["l"] * len(operands)),
        asm_dialect=0,
        has_side_effects=True,
    )
    values = iter([llvm.extractvalue(one, result, [i]) for i in range(len(registers))])
    return tuple(
        fragmented_array.FragmentedArray(
            _registers=np.array([next(values) for _ in array.registers.flat], dtype=object).reshape(
                array.registers.shape
            ),
            _layout=array.layout,
            _is_signed=None,
        ).to_layout(fragmented_array.WGMMA_LAYOUT)
        for array in held
    )
