"""Rows of whole documents, for supervised data: as many as fit into a row, then padding.

Where `Rows` cuts one long stream anywhere, no conversation is cut here unless it is longer than a
row. Which documents share a row depends on their lengths alone; every epoch visits the rows in
another order. Row i of the stream stays a pure function of (corpus, seed, i).
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from dsv3_jax.config import UserError
from dsv3_jax.data.batches import shuffled
from dsv3_jax.data.shards import TokenShards

PADDING = 0  # the segment of what is no document's

log = logging.getLogger(__name__)


class SupervisedRows(NamedTuple):
    """Rows of T + 1 tokens, of which the first T are read and the last T predicted."""

    tokens: Int32[np.ndarray, "B T1"]
    targets: Bool[np.ndarray, "B T1"]  # whether a token counts where it is predicted
    segments: Int32[np.ndarray, "B T1"]  # documents of a row are 1, 2, ...; padding is 0


class PackedRows:
    """The endless stream of rows of row_len = seq_len + 1 tokens, each of whole documents.

    Documents longer than a row are cut to it or dropped, as `long` says, and counted on the log.
    UserError when none is left.
    """

    def __init__(
        self,
        shards: TokenShards,
        row_len: int,
        seed: int,
        *,
        pad_id: int,
        long: Literal["cut", "drop"] = "drop",
    ):
        if row_len < 2:
            raise ValueError(f"{row_len=} leaves nothing to predict: at least 2")
        self.row_len = row_len
        self._shards, self._seed, self._pad_id = shards, seed, pad_id
        starts = shards.document_starts
        lengths = np.diff(starts)
        kept = np.arange(len(lengths)) if long == "cut" else np.flatnonzero(lengths <= row_len)
        num_long = int((lengths > row_len).sum())
        if not len(kept):
            shortest = min(lengths.tolist(), default=0)
            raise UserError(
                f"{shards.folder}: no document fits into a row of {row_len - 1:,} tokens (the "
                f"shortest has {shortest:,}): use a larger train.seq_len, or "
                "data.long_documents=cut"
            )
        self._starts, self._lengths = starts[kept], np.minimum(lengths[kept], row_len)
        self._rows = pack(self._lengths.tolist(), row_len)
        share = self._lengths.sum() / (len(self._rows) * row_len)
        log.info(
            "%s: %d documents in %d rows of %d tokens, %.1f %% of them filled; %d longer ones %s",
            *(shards.folder.name, len(kept), len(self._rows), row_len - 1, 100 * share, num_long),
            "cut" if long == "cut" else "dropped",
        )

    @property
    def num_windows(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    def host_rows(self, first_row: int, which: Iterable[int]) -> SupervisedRows:
        """The rows first_row + w of the stream, for each w of `which`."""
        numbers = np.array([first_row + w for w in which], np.int64)
        epochs, places = np.divmod(numbers, self.num_windows)
        return self.windows(shuffled(places, self.num_windows, self._seed, epochs).tolist())

    def windows(self, chosen: Sequence[int]) -> SupervisedRows:
        """These rows of an epoch, in the order in which they were packed."""
        shape = (len(chosen), self.row_len)
        rows = SupervisedRows(
            np.full(shape, self._pad_id, np.int32),
            np.zeros(shape, bool),
            np.full(shape, PADDING, np.int32),
        )
        for number, row in enumerate(chosen):
            at = 0
            for segment, document in enumerate(self._rows[row], start=1):
                start, length = int(self._starts[document]), int(self._lengths[document])
                place = slice(at, at + length)
                rows.tokens[number, place] = self._shards.slice(start, start + length)
                rows.targets[number, place] = self._shards.targets(start, start + length)
                # Nothing predicts a document's first token.
                rows.targets[number, at] = False
                rows.segments[number, place] = segment
                at += length
        return rows


def pack(lengths: Sequence[int], row_len: int) -> list[list[int]]:
    """The documents of each row: the longest first, each into the fullest row that has room.

    Best-fit decreasing (Johnson 1973), at most 11/9 of the fewest rows plus one. ValueError for a
    length outside 1 to row_len.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by the tokens they have room for
    rooms: list[int] = []  # the keys, in order
    for document in sorted(range(len(lengths)), key=lambda d: (-lengths[d], d)):
        length = lengths[document]
        if not 0 < length <= row_len:
            raise ValueError(f"a document of {length} tokens does not fit into {row_len=}")
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), row_len
            rows.append([])
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[row].append(document)
        if left := room - length:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(row)
    return rows
