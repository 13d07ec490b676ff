"""Validation: loss and bits per byte of the main model on fixed rows."""

import math
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.mixture import val_rows
from dsv3_jax.data.packed_rows import SupervisedRows
from dsv3_jax.parallel.mesh import batch_sharding
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.training.extensions import NONE, Extensions
from dsv3_jax.training.loss import Supervised
from dsv3_jax.training.state import TrainState
from dsv3_jax.training.step import eval_step
from dsv3_jax.training.stopping import StopRequest


class Evaluation:
    """The same rows at every call, spread evenly over the validation split of each corpus."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        layout: Layout,
        corpus: Corpus,
        base: Any = None,
        extensions: Extensions = NONE,
    ):
        plan = config.train
        batch = plan.micro_batch_size or plan.batch_size
        self._batches = val_rows(corpus, plan.seq_len + 1, batch, plan.eval_batches, config.data)
        self._place = batch_sharding(mesh, batch_dim=0)
        step = partial(eval_step, config=config, layout=layout, extensions=extensions)
        self._eval = jax.jit(step)
        self._base = base

    def __call__(self, state: TrainState, stop: StopRequest) -> dict[str, float]:
        """val_loss, nats a token, and val_bits_per_byte; nothing when the run is asked to stop.

        Of conversations, the targets alone count.
        """
        losses = []
        for batch in self._batches:
            if stop.requested:
                return {}
            supervised = isinstance(batch.rows, SupervisedRows)
            rows = Supervised(*batch.rows) if supervised else batch.rows
            rows = jax.device_put(rows, self._place)
            losses.append(float(self._eval(state.params, state.router, rows, base=self._base)))
        nats = sum(loss * batch.tokens for loss, batch in zip(losses, self._batches, strict=True))
        tokens = sum(batch.tokens for batch in self._batches)
        text_bytes = sum(batch.text_bytes for batch in self._batches)
        return {
            "val_loss": nats / tokens,
            "val_bits_per_byte": nats / math.log(2) / max(text_bytes, 1),
        }
