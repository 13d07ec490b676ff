"""How a warpgroup multiplies on Hopper: sums, products, and what the compiler may not know of them.

Pallas's interpreter has neither a store to an accumulator nor a product whose left operand is in
registers; everything here runs in it, too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.hopper import WGMMA, plgpu


def opaque(number: Any) -> Any:
    """The int32 `number`, of which the compiler may not assume that it is always the same.

    What does not change in a loop is computed before it, and the addresses of a tile that stays in
    shared memory, 64 bits for each wgmma, then crowd the accumulators out of the registers.
    """
    if hopper.interpreted():
        return number
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(
        arg_types=(splat,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=splat)
    )
    def move(_, number):
        value: Any = llvm.inline_asm(
            ir.IntegerType.get_signless(32),
            [number.registers[()]],
            "mov.b32 $0, $1;",
            "=r,r",
            has_side_effects=True,
        )
        return fragmented_array.FragmentedArray.splat(value, (), is_signed=True)

    return move(number)


def in_pairs(numbers: Any) -> Any:
    """The bfloat16 `numbers`, in the layout of a product, which the compiler may not take apart.

    Numbers that are read one by one are also rounded one by one, on the unit that exponentials
    take, and as long as they (F2F instead of F2FP); and are kept in one register each. So pairs are
    read by `widened`.
    """
    if hopper.interpreted():
        return numbers
    shape = plgpu.ShapeDtypeStruct(numbers.shape, jnp.bfloat16, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=shape)
    def barrier(_, numbers):
        return fragmented_array.optimization_barrier(numbers)

    return barrier(numbers)


def widened(numbers: Any) -> Any:
    """bfloat16 `numbers` in the layout of a product in float32, by integer arithmetic on pairs."""
    if hopper.interpreted():
        return numbers.astype(jnp.float32)
    shape = plgpu.ShapeDtypeStruct(numbers.shape, jnp.float32, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=shape)
    def widen(_, numbers):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        pair_type = ir.VectorType.get((2,), f32)
        registers = np.empty_like(numbers.registers)
        for place, register in np.ndenumerate(numbers.registers):
            pair = utils.bitcast(register, i32)
            low = arith.shli(pair, utils.c(16, i32))
            high = arith.andi(pair, utils.c(-65536, i32))
            wide = llvm.mlir_undef(pair_type)
            for i, half in enumerate((low, high)):
                number = utils.bitcast(half, f32)
                wide = llvm.insertelement(wide, number, utils.c(i, i32))
            registers[place] = wide
        return fragmented_array.FragmentedArray(
            _registers=registers, _layout=numbers.layout, _is_signed=None
        )

    return widen(numbers)


class Sum:
    """A warpgroup's running sum of products: an accumulator, or, in the interpreter, a value that
    loops carry, `held`."""

    def __init__(self, ref: Any, held: Any) -> None:
        self.ref, self.held = ref, held

    @staticmethod
    def nothing(like: Any, width: int) -> Any:
        """What is carried before the first product; `like` holds one number a row."""
        if not hopper.interpreted():
            return ()
        return lax.broadcast_in_dim(0.0 * like, (*like.shape, width), [0])

    def add(self, a: Any, b: Any) -> int:
        """Starts adding a @ b; returns how many products that puts in flight.

        b is in shared memory, a there or in registers.
        """
        if hopper.interpreted():
            self.held = self.held + jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
        else:
            plgpu.wgmma(self.ref, a, b)
        return 1

    def value(self) -> Any:
        """The sum, once every product is complete."""
        return self.held if hopper.interpreted() else self.ref[...]

    def set(self, value: Any) -> None:
        """Replaces the sum."""
        if hopper.interpreted():
            self.held = value
        else:
            self.ref[...] = value


class Product(NamedTuple):
    """`start` (or zero) plus the sum of a @ b.T over `pairs` of blocks in shared memory."""

    pairs: Sequence[tuple[Any, Any]]
    start: Any = None


def multiply(products: Sequence[Product], then: Callable[[], int] = lambda: 0) -> list[Any]:
    """The products, complete; what `then` starts (so many more) is still in flight."""
    if hopper.interpreted():
        values = []
        for product in products:
            value = product.start
            for a, b in product.pairs:
                part = jnp.dot(a[...], b[...].T, preferred_element_type=jnp.float32)
                value = part if value is None else value + part
            values.append(value)
        then()
        return values

    def run(*refs):
        for ref, product in zip(refs, products):
            if product.start is not None:
                ref[...] = product.start
        for ref, product in zip(refs, products):
            for a, b in product.pairs:
                plgpu.wgmma(ref, a, b.T)
        in_flight = then()
        return [plgpu.wgmma_accumulator_load(ref, wait_n=in_flight) for ref in refs]

    shapes = [(product.pairs[0][0].shape[0], product.pairs[0][1].shape[0]) for product in products]
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def settle() -> None:
    """Waits for every product in flight."""
    if not hopper.interpreted():
        plgpu.wgmma_wait(0)
