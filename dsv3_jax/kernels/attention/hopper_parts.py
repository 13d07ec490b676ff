"""What the forward and the backward kernels of causal attention on Hopper share."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array

from dsv3_jax.kernels.attention import schedule
from dsv3_jax.kernels.gemm import hopper
from dsv3_jax.kernels.gemm.hopper import WGMMA, plgpu, swizzled

LOG2_E = math.log2(math.e)
ROWS = WGMMA.reduce(1)  # the layout of one number a row
COLUMNS = WGMMA.reduce(0)  # and of one number a column
MATH_WARPGROUPS = 2


class Columns(NamedTuple):
    """`width` columns of an array [B, S, N, D], or of [B, S, D] that all heads share."""

    array: Any
    first: int
    width: int

    def at(self, ref: Any, batch: Any, rows: Any, head: Any) -> Any:
        """The slice of `rows`."""
        index = (batch, rows, head) if len(ref.shape) == 4 else (batch, rows)
        return ref.at[*index, pl.ds(self.first, self.width)]


class Refs:
    """What a kernel is handed, taken in order: operands, then results, then its own memory."""

    def __init__(self, refs: Sequence[Any]) -> None:
        self._left = list(refs)

    def one(self, there: bool = True) -> Any:
        """The next; None, and nothing is taken, for an operand that is not `there`."""
        return self._left.pop(0) if there else None

    def some(self, count: int) -> list[Any]:
        """The next so many."""
        return [self._left.pop(0) for _ in range(count)]

    def rest(self) -> list[Any]:
        """All that are left."""
        return self._left


class Offset(NamedTuple):
    """The place of the first query among the keys: a number, or an operand of the kernel."""

    static: int | None
    operands: list[Array]

    @classmethod
    def of(cls, offset: int | Array) -> "Offset":
        """The offset, in either form."""
        if isinstance(offset, int):
            return cls(offset, [])
        return cls(None, [jnp.asarray(offset, jnp.int32).reshape(1)])

    def read(self, ref: Any) -> Any:
        """The number, inside a kernel; `ref` is None for one that was known before."""
        return jnp.int32(self.static) if self.static is not None else ref[0]

    def guess(self, queries: int, keys: int) -> int:
        """What work is shared out by: the number, or that of queries that are the last tokens."""
        return keys - queries if self.static is None else self.static


class Lists(NamedTuple):
    """Each block's list of tiles, and its length."""

    table: Array
    counts: Array

    @classmethod
    def of(cls, steps: Sequence[int], heads: int, bytes_per_head: int) -> "Lists":
        """For `heads` times the tiles whose work is `steps`, longest first."""
        blocks = min(hopper.multiprocessors(), heads * len(steps))
        section = schedule.section_of(bytes_per_head, heads)
        table = schedule.longest_first(tuple(steps), heads, section, blocks)
        return cls(jnp.asarray(table), jnp.asarray((table >= 0).sum(axis=1), jnp.int32))


def over_tiles(table: Any, count: Any, body: Callable[[Any, Any], Any]) -> None:
    """Calls body(entry, done) for each of a block's tiles; `done` adds up what it returned."""
    block = lax.axis_index("block")

    def one(i, carry):
        entry, done = carry
        following = table[block, i + 1]
        return following, done + body(entry, done)

    lax.fori_loop(0, count[block], one, (table[block, 0], jnp.int32(0)))


def arrive_at(barriers: Sequence[Any], count: int) -> None:
    """Hands back every slot of rings of `count`, as their owner does before it begins."""

    @pl.loop(0, count)
    def _(slot):
        for barrier in barriers:
            plgpu.barrier_arrive(barrier.at[slot])


def wait_for(barriers: Sequence[Any], count: int) -> None:
    """Waits for every slot of rings of `count` to be handed back, as must be in the end."""

    @pl.loop(0, count)
    def _(slot):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[slot])


def launch(lists: Lists) -> dict[str, Any]:
    """How every kernel here is launched: a block for each list, one warpgroup more for memory."""
    return dict(
        grid=(lists.table.shape[0],),
        grid_names=("block",),
        num_threads=MATH_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )


def swizzle_of(width: int) -> tuple[Any, ...]:
    """The widest layout that both TMA and wgmma have for rows of `width` bfloat16 numbers."""
    return swizzled(jnp.bfloat16, math.gcd(width, 64))


def buffer(*shape: int) -> Any:
    """Shared memory for bfloat16 tiles that TMA writes and wgmma reads."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=swizzle_of(shape[-1]))


def unique(columns: Sequence[Columns]) -> tuple[list[Any], list[int]]:
    """The arrays that `columns` are of, each once, and for each of `columns` its array's number."""
    arrays: list[Any] = []
    for one in columns:
        if not any(one.array is array for array in arrays):
            arrays.append(one.array)
    numbers = [next(i for i, array in enumerate(arrays) if one.array is array) for one in columns]
    return arrays, numbers


def beside(array: Any, columns: Sequence[Columns]) -> list[Columns]:
    """The columns of `array` that face `columns`, which lie beside each other."""
    widths = [one.width for one in columns]
    return [Columns(array, sum(widths[:i]), width) for i, width in enumerate(widths)]


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


class Sum:
    """A warpgroup's running sum of products: an accumulator, or a value for the interpreter.

    Pallas's interpreter has neither a store to an accumulator nor a product whose left operand is
    in registers; there the sum is a value that loops carry, `held`.
    """

    def __init__(self, ref: Any, held: Any) -> None:
        self.ref, self.held = ref, held

    @staticmethod
    def nothing(like: Any, width: int) -> Any:
        """What is carried before the first product; `like` holds one number a row."""
        if not hopper.interpreted():
            return ()
        return lax.broadcast_in_dim(0.0 * like, (*like.shape, width), [0])

    def add(self, a: Any, b: Any) -> int:
        """Starts adding a @ b; returns how many products that puts in flight."""
        if hopper.interpreted():
            self.held = self.held + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
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


def store(values: Any, out: Any, buffers: Any) -> None:
    """Sends a warpgroup's 64 rows to `out` by TMA, a buffer's width at a time, in bfloat16."""
    slots, _, width = buffers.shape
    for number, left in enumerate(range(0, values.shape[1], width)):
        buffer = buffers.at[number % slots]
        # The last call's pieces need not end at the last buffer.
        plgpu.wait_smem_to_gmem(slots - 1 if number else 0, wait_read_only=True)
        buffer[...] = values[:, left : left + width].astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, out(left, width))
