"""What the forward and the backward kernels of causal attention on Hopper share, but products."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.attention import tile_order
from dsv3_jax.kernels.hopper import WGMMA, plgpu, swizzled

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

    def steps(self, queries: int, keys: int, rows: int, step: int) -> list[int]:
        """For each tile of so many rows of queries the steps of keys that it sees, by the guess."""
        guess = self.guess(queries, keys)
        return [pl.cdiv(min(guess + row + rows, keys), step) for row in range(0, queries, rows)]


class Lists(NamedTuple):
    """In each chunk of heads each block's list of tiles, head x tiles + tile, and its length."""

    table: Array
    counts: Array

    @classmethod
    def of(cls, steps: Sequence[int], bounds: Sequence[int], bytes_per_head: int) -> "Lists":
        """For tiles whose work is `steps`, longest first, of chunk after chunk of heads.

        A chunk begins at each of `bounds` but the last, where they end.
        """
        tables = []
        for first, end in itertools.pairwise(bounds):
            heads = end - first
            blocks = min(hopper.multiprocessors(), heads * len(steps))
            section = tile_order.section_of(bytes_per_head, heads)
            table = tile_order.longest_first(tuple(steps), heads, section, blocks)
            tables.append(np.where(table < 0, -1, table + first * len(steps)))
        shape = np.max([table.shape for table in tables], axis=0)
        room = [[(0, n - m) for n, m in zip(shape, table.shape)] for table in tables]
        padded = np.stack([np.pad(*one, constant_values=-1) for one in zip(tables, room)])
        return cls(jnp.asarray(padded), jnp.asarray((padded >= 0).sum(-1), jnp.int32))


def over_tiles(table: Any, count: Any, chunk: Any, body: Callable[[Any, Any], Any]) -> None:
    """Calls body(entry, done) for each of a block's tiles; `done` adds up what it returned."""
    block = lax.axis_index("block")

    def one(i, carry):
        entry, done = carry
        following = table[chunk, block, i + 1]
        return following, done + body(entry, done)

    lax.fori_loop(0, count[chunk, block], one, (table[chunk, block, 0], jnp.int32(0)))


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
        grid=(lists.table.shape[1],),
        grid_names=("block",),
        num_threads=MATH_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )


def narrow_of(columns: Sequence[Columns], most: int = 64) -> int:
    """The widest rows, in bfloat16 numbers, that all of `columns` and what lies beside them divide
    into: in these TMA and wgmma read and write."""
    return math.gcd(most, *(one.width for one in columns))


def buffer(*shape: int, narrow: int) -> Any:
    """Shared memory for bfloat16 tiles in rows of `narrow`, which TMA writes and wgmma reads.

    Operands of one wgmma are laid out alike.
    """
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=swizzled(jnp.bfloat16, narrow))


def in_whole_tiles(numbers: Array | None, rows: int) -> Array | None:
    """The documents' numbers [B, rows] up to a multiple of a tile's rows, the last one repeated."""
    if numbers is None:
        return None
    return jnp.pad(numbers, ((0, 0), (0, -numbers.shape[1] % rows)), mode="edge")


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


def store(pieces: Sequence[tuple[Any, Callable[[int, int], Any]]], buffers: Any) -> None:
    """Sends a warpgroup's 64 rows by TMA in bfloat16, for each of `pieces` to out(left, width).

    The buffers are filled together, each with so many columns as it is wide.
    """
    slots, _, width = buffers.shape
    parts = [
        (values[:, left : left + width], out(left, width))
        for values, out in pieces
        for left in range(0, values.shape[1], width)
    ]
    for group in range(0, len(parts), slots):
        together = parts[group : group + slots]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for slot, (values, _) in enumerate(together):
            buffers.at[slot][...] = values.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for slot, (_, target) in enumerate(together):
            plgpu.copy_smem_to_gmem(buffers.at[slot], target)
