"""The program of a step, made of shapes alone: before weights are read, or for devices elsewhere.

XLA takes half a gigabyte or more while it compiles, and gives it back: a run that compiles first
never holds that beside its weights.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config import Config
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.parallel.mesh import batch_sharding
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.training.extensions import NONE, Extensions
from dsv3_jax.training.loss import Supervised
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.state import TrainState
from dsv3_jax.training.step import jit_train_step


def compiled_step(
    config: Config,
    layout: Layout,
    state: TrainState,
    base: Any,
    corpus: Corpus,
    extensions: Extensions = NONE,
) -> Any:
    """The step that a run on this corpus makes, compiled for its devices; state and base are
    abstract.

    Called as `train_step` with (state, rows, settings, base=base), which must lie as the abstract
    ones; it takes over the state's memory. Raises as `train_step` does.
    """
    supervised = extensions.data is None and corpus.is_supervised
    return lowered_step(config, layout, state, base, supervised, extensions).compile()


def lowered_step(
    config: Config,
    layout: Layout,
    state: TrainState,
    base: Any = None,
    supervised: bool = False,
    extensions: Extensions = NONE,
) -> Any:
    """The step of a full batch as `train.py` runs it, lowered for the layout's devices.

    They may be devices that programs are only compiled for. `supervised`: on rows that say what
    counts.
    """
    schedule, place = Schedule(config), batch_sharding(layout.mesh, 1)
    shape = (schedule.max_micro_batches, schedule.micro_batch_size, config.train.seq_len + 1)

    def rows_of(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    tokens = rows_of(jnp.int32)
    rows = Supervised(tokens, rows_of(jnp.bool_), rows_of(jnp.int32)) if supervised else tokens
    step = jit_train_step(config, layout, state, extensions=extensions)
    return step.lower(state, rows, schedule.settings(0), base=base)
