"""The rows that a run reads of its corpus: plain text, conversations, or several corpora by weight.

A mixture deals its rows in blocks of 4,096: each corpus has a fixed number of places in a block,
its weight rounded to 1/4096, in an order that differs from block to block. So row i of the stream
is a pure function of (corpora, weights, seed, i), and nothing has a state to save.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32

from dsv3_jax.config import DataConfig
from dsv3_jax.data.batches import Rows, ValBatch, shuffled, val_batches
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.mixture_weights import BLOCK
from dsv3_jax.data.packed_rows import PackedRows, SupervisedRows

HostRows = Int32[np.ndarray, "B T1"] | SupervisedRows


class RowStream(Protocol):
    """An endless stream of rows of row_len tokens."""

    @property
    def row_len(self) -> int:
        """Tokens of a row."""
        ...

    def host_rows(self, first_row: int, which: Iterable[int]) -> Any:
        """The rows first_row + w of the stream, for each w of `which`, as HostRows."""
        ...


def open_rows(corpus: Corpus, row_len: int, seed: int, data: DataConfig) -> RowStream:
    """The training rows of a corpus; SupervisedRows where a part of it holds conversations."""
    streams: list[RowStream] = []
    supervised = corpus.is_supervised
    for number, part in enumerate(corpus.parts):
        own_seed = seed + (number << 32)
        if part.train.is_supervised:
            pad_id, long = corpus.tokenizer.eos_token_id, data.long_documents
            packed = PackedRows(part.train, row_len, own_seed, pad_id=pad_id, long=long)
            streams.append(packed)
            continue
        rows = Rows(part.train, row_len, own_seed)
        bos = corpus.tokenizer.bos_token_id if data.mask_documents else None
        streams.append(_AllTargets(rows, bos) if supervised else rows)
    if len(streams) == 1:
        return streams[0]
    return MixedRows(streams, [part.weight for part in corpus.parts], seed)


@dataclasses.dataclass(frozen=True)
class _AllTargets:
    """Rows of plain text among conversations: every token but a row's first is a target."""

    rows: Rows
    bos_token_id: int | None  # documents begin there; None: a row is one

    @property
    def row_len(self) -> int:
        return self.rows.row_len

    def host_rows(self, first_row: int, which: Iterable[int]) -> SupervisedRows:
        tokens = self.rows.host_rows(first_row, which)
        targets = np.ones(tokens.shape, bool)
        targets[:, 0] = False
        segments = np.ones(tokens.shape, np.int32)
        if self.bos_token_id is not None:
            segments += np.cumsum(tokens == self.bos_token_id, axis=1, dtype=np.int32)
        return SupervisedRows(tokens, targets, segments)


class MixedRows:
    """Rows of several streams, each as often as its weight says."""

    def __init__(self, streams: Sequence[RowStream], weights: Sequence[float], seed: int):
        self.row_len = streams[0].row_len
        self._streams, self._seed = streams, seed
        # Largest remainders, so that the places of a block are exactly BLOCK.
        exact = np.array(weights) / sum(weights) * BLOCK
        places = np.floor(exact).astype(np.int64)
        most = np.argsort(places - exact, kind="stable")[: BLOCK - int(places.sum())]
        places[most] += 1
        self._ends = np.cumsum(places)

    def which_stream(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(stream, its own row) of each row number."""
        blocks, offsets = np.divmod(rows, BLOCK)
        slots = shuffled(offsets, BLOCK, self._seed, blocks)
        streams = np.searchsorted(self._ends, slots, side="right")
        begins = np.concatenate([[0], self._ends[:-1]])
        sizes = self._ends - begins
        return streams, blocks * sizes[streams] + slots - begins[streams]

    def host_rows(self, first_row: int, which: Iterable[int]) -> Any:
        """The rows first_row + w of the mixture, for each w of `which`."""
        numbers = np.array([first_row + w for w in which], np.int64)
        streams, own = self.which_stream(numbers)
        made: Any = None
        for number, stream in enumerate(self._streams):
            (places,) = np.nonzero(streams == number)
            if not len(places) and made is not None:
                continue
            rows = stream.host_rows(0, own[places].tolist())
            if made is None:
                made = map_rows(lambda x: np.zeros((len(numbers), *x.shape[1:]), x.dtype), rows)
            for whole, part in zip(arrays_of(made), arrays_of(rows)):
                whole[places] = part
        return made


def val_rows(
    corpus: Corpus, row_len: int, batch: int, count: int, data: DataConfig
) -> list[ValBatch]:
    """At most `count` fixed validation batches of each part of a corpus, as `val_batches` of text.

    Those of conversations are SupervisedRows; rows without a target fill the last batch up.
    """
    made = []
    for part in corpus.parts:
        if not part.val.is_supervised:
            made += val_batches(part.val, row_len, batch, count, corpus.tokenizer)
            continue
        pad_id = corpus.tokenizer.eos_token_id
        packed = PackedRows(part.val, row_len, 0, pad_id=pad_id, long=data.long_documents)
        total = min(batch * count, packed.num_windows)
        chosen = [i * packed.num_windows // total for i in range(total)]
        for first in range(0, total, batch):
            rows = packed.windows(chosen[first : first + batch])
            missing = batch - len(rows.tokens)
            rows = map_rows(lambda x, n=missing: np.pad(x, [(0, n), (0, 0)]), rows)
            counted = rows.targets[:, 1:]
            text_bytes = corpus.tokenizer.count_bytes(rows.tokens[:, 1:][counted])
            made.append(ValBatch(rows, text_bytes, int(counted.sum())))
    return made


def batch_part(
    rows: RowStream, first_row: int, count: int, shape: tuple[int, int, int], part: Any
) -> Any:
    """The part (three slices) of a batch of A micro-batches of B rows; reads only that.

    The batch has `count` rows from first_row on, micro-batch by micro-batch, then zeros, of which
    none is a target.
    """
    numbers = np.arange(shape[0] * shape[1]).reshape(shape[:2])[part[:2]]
    wanted = numbers[numbers < count]

    def placed(read):
        batch = np.zeros((*numbers.shape, rows.row_len), read.dtype)
        batch[numbers < count] = read
        return batch[..., part[2]]

    return map_rows(placed, rows.host_rows(first_row, wanted.tolist()))


def arrays_of(rows: Any) -> tuple[np.ndarray, ...]:
    """The arrays of HostRows."""
    return tuple(rows) if isinstance(rows, SupervisedRows) else (rows,)


def map_rows(function: Any, rows: Any) -> Any:
    """HostRows of what the function makes of each array."""
    if isinstance(rows, SupervisedRows):
        return SupervisedRows(*map(function, rows))
    return function(rows)
