"""Validation: loss and bits per byte of the main model on fixed rows."""

import math
from functools import partial

import jax
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.data.batches import val_batches
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.parallel.mesh import batch_sharding
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.training.state import TrainState
from dsv3_jax.training.step import eval_step
from dsv3_jax.training.stopping import StopRequest


class Evaluation:
    """The same rows at every call, spread evenly over the validation split."""

    def __init__(self, config: Config, mesh: Mesh, layout: Layout, corpus: Corpus):
        plan = config.train
        self._batches = val_batches(
            corpus.val,
            plan.seq_len + 1,
            plan.micro_batch_size or plan.batch_size,
            plan.eval_batches,
            corpus.tokenizer,
        )
        self._place = batch_sharding(mesh, batch_dim=0)
        self._eval = jax.jit(partial(eval_step, config=config, layout=layout))

    def __call__(self, state: TrainState, stop: StopRequest) -> dict[str, float]:
        """val_loss, nats a token, and val_bits_per_byte; nothing when the run is asked to stop."""
        losses = []
        for batch in self._batches:
            if stop.requested:
                return {}
            rows = jax.device_put(batch.tokens, self._place)
            losses.append(float(self._eval(state.params, state.router, rows)))
        tokens = [batch.tokens[:, 1:].size for batch in self._batches]
        nats = sum(loss * n for loss, n in zip(losses, tokens, strict=True))
        text_bytes = sum(batch.text_bytes for batch in self._batches)
        return {
            "val_loss": nats / sum(tokens),
            "val_bits_per_byte": nats / math.log(2) / text_bytes,
        }
