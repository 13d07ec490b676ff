"""The batches of a run, on its devices."""

from collections.abc import Iterator
from functools import partial

import jax
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.data.batches import Rows
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.parallel.mesh import batch_sharding
from dsv3_jax.training.schedule import Schedule


def batches(
    config: Config, corpus: Corpus, schedule: Schedule, mesh: Mesh, start: int
) -> Iterator[jax.Array]:
    """The rows of each step from `start` on, int32 [A, B, T + 1] over the mesh's data axes.

    A micro-batches of B rows; those past the step's own, during the batch-size ramp, are zeros.
    """
    row_len = config.train.seq_len + 1
    rows = Rows(corpus.train, row_len, config.seed)
    place = batch_sharding(mesh, batch_dim=1)
    shape = (schedule.max_micro_batches, schedule.micro_batch_size, row_len)
    for step in range(start, config.train.steps):
        # Rows after them, micro-batches past the ramp's, are never read.
        read = partial(rows.batch_part, schedule.first_row(step), schedule.rows(step), shape)
        yield jax.make_array_from_callback(shape, place, read)
