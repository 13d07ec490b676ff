"""The batches of a run, on its devices."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.mixture import arrays_of, batch_part, open_rows
from dsv3_jax.parallel.mesh import batch_sharding
from dsv3_jax.training.loss import Supervised
from dsv3_jax.training.schedule import Schedule


def batches(
    config: Config, corpus: Corpus, schedule: Schedule, mesh: Mesh, start: int
) -> Iterator[jax.Array | Supervised]:
    """The rows of each step from `start` on, [A, B, T + 1] over the mesh's data axes.

    A micro-batches of B rows; those past the step's own, during the batch-size ramp, are zeros.
    """
    row_len = config.train.seq_len + 1
    rows = open_rows(corpus, row_len, config.seed, config.data)
    place = batch_sharding(mesh, batch_dim=1)
    shape = (schedule.max_micro_batches, schedule.micro_batch_size, row_len)
    for step in range(start, config.train.steps):
        # Rows after them, micro-batches past the ramp's, are never read.
        read = _ReadOnce(
            partial(batch_part, rows, schedule.first_row(step), schedule.rows(step), shape)
        )
        if not corpus.is_supervised:
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
