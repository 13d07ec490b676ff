"""The batches of a run, on its devices."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.config import Config, UserError
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.mixture import arrays_of, batch_part, open_rows
from dsv3_jax.data.shards import check_vocab
from dsv3_jax.parallel.mesh import batch_sharding
from dsv3_jax.training.extensions import DataSource
from dsv3_jax.training.loss import Supervised
from dsv3_jax.training.schedule import Schedule


class SourceRows:
    """A RowStream of a function that gives row i."""

    def __init__(self, source: DataSource, row_len: int, vocab_size: int):
        self._source, self.row_len, self._vocab_size = source, row_len, vocab_size

    def host_rows(self, first_row: int, which: Iterable[int]) -> np.ndarray:
        """Rows first_row + w for each w of `which`, checked."""
        numbers = [first_row + w for w in which]
        out = np.empty((len(numbers), self.row_len), np.int32)
        for place, number in zip(out, numbers):
            row = np.asarray(self._source(number))
            if row.shape != (self.row_len,) or row.dtype.kind not in "iu":
                raise UserError(
                    f"row {number} of the data source has shape {row.shape} and dtype {row.dtype}: "
                    f"it must be train.seq_len + 1 = {self.row_len} token ids"
                )
            if not 0 <= row.min() <= row.max() < self._vocab_size:
                raise UserError(
                    f"row {number} of the data source has token ids from {row.min()} to "
                    f"{row.max()}; the vocabulary is 0 to {self._vocab_size - 1}"
                )
            place[:] = row
        return out


def batches(
    config: Config,
    corpus: Corpus | DataSource,
    schedule: Schedule,
    mesh: Mesh,
    start: int,
) -> Iterator[jax.Array | Supervised]:
    """The rows of each step from `start` on, [A, B, T + 1] over the mesh's data axes.

    A micro-batches of B rows; those past the step's own, during the batch-size ramp, are zeros. The
    rows are those of a corpus, or of a function that gives row i; UserError for a row of another
    length or with a token outside the vocabulary. int32, or Supervised of them. Source: V3 report,
    section 4.2 (the ramp of the batch size).

    >>> import dataclasses, dsv3_jax as ds
    >>> config = ds.load_config("tiny")
    >>> schedule, mesh = ds.Schedule(config), ds.make_mesh(ds.ParallelConfig())
    >>> rows = ds.batches(config, lambda row: [row] * 129, schedule, mesh, start=0)
    >>> next(rows)[0, :3, 0].tolist()
    [0, 1, 2]
    """
    row_len = config.train.seq_len + 1
    if isinstance(corpus, Corpus):
        for part in corpus.parts:
            index = part.train.index
            check_vocab(config.model.vocab_size, index.vocab_size, index.tokenizer)
        rows: Any = open_rows(corpus, row_len, config.seed, config.data)
    else:
        rows = SourceRows(corpus, row_len, config.model.vocab_size)
    place = batch_sharding(mesh, batch_dim=1)
    shape = (schedule.max_micro_batches, schedule.micro_batch_size, row_len)
    for step in range(start, config.train.steps):
        # Rows after them, micro-batches past the ramp's, are never read.
        read = _ReadOnce(
            partial(batch_part, rows, schedule.first_row(step), schedule.rows(step), shape)
        )
        if not (isinstance(corpus, Corpus) and corpus.is_supervised):
            yield jax.make_array_from_callback(shape, place, partial(read, 0))
            continue
        made = [jax.make_array_from_callback(shape, place, partial(read, i)) for i in range(3)]
        yield Supervised(*made)


class _ReadOnce:
    """The arrays of a batch's parts, each part read once for all of them."""

    def __init__(self, read: Any):
        self._read, self._parts = read, {}

    def __call__(self, number: int, part: Any) -> Any:
        key = tuple((s.start, s.stop) for s in part)
        if key not in self._parts:
            self._parts[key] = arrays_of(self._read(part))
        return self._parts[key][number]
