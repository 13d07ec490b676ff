"""Rows of tokens: row i of an endless stream is a pure function of (corpus, seed, i).

The corpus is cut into windows of row_len tokens that overlap by one, so that each window predicts
row_len - 1 tokens and no token is predicted twice. Every epoch visits the windows in another order,
a keyed bijection that is computed, not stored. Nothing has a state to save or restore.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int32, UInt64

from dsv3_jax.config import UserError
from dsv3_jax.data.shards import TokenShards
from dsv3_jax.data.tokens import Tokenizer

log = logging.getLogger(__name__)
Item = TypeVar("Item")

# With a strong round function 4 rounds pass for random (Luby and Rackoff 1988); 8, as halves of a
# small corpus' window number have few bits.
_ROUNDS = 8


class Rows:
    """The endless stream of training rows, each of row_len = seq_len + 1 tokens.

    Every epoch of `num_windows` rows holds every window once. The last tokens, fewer than a window
    predicts, are left out. UserError when the corpus has fewer tokens than one row.
    """

    def __init__(self, shards: TokenShards, row_len: int, seed: int):
        self.num_windows = _num_windows(shards, row_len)
        self.row_len = row_len
        self._shards = shards
        self._seed = seed

    def rows(self, first_row: int, count: int) -> Int32[np.ndarray, "B T"]:
        """Rows first_row to first_row + count - 1 of the stream; step s starts at s * batch."""
        return self.host_rows(first_row, range(count))

    def host_rows(self, first_row: int, which: Iterable[int]) -> Int32[np.ndarray, "B T"]:
        """The rows first_row + w for each w of `which`: a host reads only what it feeds."""
        starts = self.windows([first_row + w for w in which]) * (self.row_len - 1)
        out = np.empty((len(starts), self.row_len), np.int32)
        for row, start in zip(out, starts.tolist()):
            row[:] = self._shards.slice(start, start + self.row_len)
        return out

    def windows(self, row_numbers: Iterable[int]) -> np.ndarray:
        """The window that each row of the stream shows, int64."""
        numbers = np.array(list(row_numbers), np.int64)
        epochs, places = np.divmod(numbers, self.num_windows)
        return shuffled(places, self.num_windows, self._seed, epochs)


def shuffled(places: np.ndarray, size: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """The image of each place under a random-looking bijection of range(size), one per epoch.

    A Feistel network over the smallest even number of bits, with cycle walking: an image outside
    the range is sent through again, under four times on average (Black and Rogaway 2002, "Ciphers
    with Arbitrary Finite Domains"). Memory does not grow with `size`. int64 in, int64 out.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    key = _mix(_mix(np.array([seed % 2**64], np.uint64)) + epochs.astype(np.uint64))
    values = places.astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for i in range(_ROUNDS):
            left, right = right, left ^ (_mix(_mix(key[outside] + np.uint64(i)) + right) & mask)
        values[outside] = left << half | right
        outside &= values >= size
    return values.astype(np.int64)


class ValBatch(NamedTuple):
    """A validation batch; bits per byte = total nats / ln 2 / total text_bytes."""

    rows: Any  # int32 [B, T], or rows with targets
    text_bytes: int  # that the predicted tokens (all but each row's first) stand for
    tokens: int  # predicted ones


def val_batches(
    shards: TokenShards, row_len: int, batch: int, count: int, tokenizer: Tokenizer
) -> list[ValBatch]:
    """At most `count` fixed batches of distinct rows, in order, spread evenly over the split.

    There are fewer when the split is smaller; below one whole batch, rows repeat to fill it, with a
    warning. UserError when the split has fewer tokens than one row.
    """
    windows = _num_windows(shards, row_len)
    total = batch * min(count, max(windows // batch, 1))
    if windows < batch:
        log.warning("validation has %d rows: they repeat to fill a batch of %d", windows, batch)
        chosen = [i % windows for i in range(total)]
    else:
        chosen = [i * windows // total for i in range(total)]
    starts = [window * (row_len - 1) for window in chosen]
    made = []
    for i in range(0, total, batch):
        rows = [shards.slice(start, start + row_len) for start in starts[i : i + batch]]
        tokens = np.stack(rows)
        text_bytes = tokenizer.count_bytes(tokens[:, 1:])
        made.append(ValBatch(tokens, text_bytes, tokens[:, 1:].size))
    return made


class Prefetcher(Generic[Item]):
    """Iterates over what a thread makes ahead of time; use `with`, or call `close`."""

    def __init__(self, iterator_fn: Callable[[], Iterable[Item]], depth: int):
        self._iterator_fn = iterator_fn
        self._depth = depth
        self._ready: deque[Item] = deque()
        self._changed = threading.Condition()
        self._done = False  # the worker has stopped, or must
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for item in self._iterator_fn():
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._depth or self._done)
                    if self._done:
                        return
                    self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as error:  # everything is handed to the consumer
            self._error = error
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._done)
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """Stops the thread and waits for it; items made ahead are dropped."""
        with self._changed:
            self._done = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def prefetch(iterator_fn: Callable[[], Iterable[Item]], depth: int = 2) -> Prefetcher[Item]:
    """The items of `iterator_fn()`, made by a thread that keeps up to `depth` of them ready.

    An exception in the worker is raised again in the consumer, after the items made before it.
    """
    return Prefetcher(iterator_fn, depth)


def _num_windows(shards: TokenShards, row_len: int) -> int:
    if row_len < 2:
        raise ValueError(f"{row_len=} leaves nothing to predict: at least 2")
    if len(shards) < row_len:
        raise UserError(
            f"{shards.folder.name}: {len(shards):,} tokens are too few for one row of {row_len:,}: "
            "use more text, a smaller train.seq_len, or (for val) a larger data.val_fraction"
        )
    return (len(shards) - 1) // (row_len - 1)


def _mix(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """SplitMix64's finaliser: every input bit changes every output bit (Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
