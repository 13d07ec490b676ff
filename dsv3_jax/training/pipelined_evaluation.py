"""Validation by the ranks of `pipe`: each runs its own layers, so that none holds all of them.

The executor's loops, with forwards alone: a batch passes the stages one after the other, and
nothing is kept. It takes as long as if every rank ran every layer, with a rank's share of memory.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from dsv3_jax.config import Config
from dsv3_jax.model.ends import final_norm, gathered_ends
from dsv3_jax.parallel.pipeline import Work, run_ticks
from dsv3_jax.parallel.sharding import Layout
from dsv3_jax.parallel.ticks import FORWARD, forward_tables
from dsv3_jax.training.extensions import NONE, Extensions
from dsv3_jax.training.loss import Rows, nats_of_hidden, tokens_of_rows, training_pass
from dsv3_jax.training.pipelined import PIPE, Rank, held_by_ranks
from dsv3_jax.training.stages import LOSS, StagePlan, plan_stages


def pipelined_nats(
    variables: dict[str, Any],
    rows: Rows,
    config: Config,
    layout: Layout,
    base: dict[str, Any] | None = None,
    extensions: Extensions = NONE,
) -> Float[Array, ""]:
    """The main model's cross-entropy, nats a token, of rows of T + 1 tokens; MTP is not run.

    Weights come as for `pipelined_gradients`. Equals `mean_nats` of one device but for rounding.
    """
    plan = plan_stages(config)
    inside = dataclasses.replace(layout, outer=("pipe",))
    how = dataclasses.replace(training_pass(config, inside, extensions), remat="none")
    how = dataclasses.replace(
        how, config=dataclasses.replace(how.config, num_nextn_predict_layers=0)
    )
    stacks, ends = held_by_ranks(variables, base, plan, inside)
    return jax.shard_map(
        partial(_nats_of_rank, plan=plan, config=config, how=how),
        mesh=layout.mesh,
        in_specs=(PIPE, PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names={"pipe"},
        check_vma=False,
    )(stacks, ends, jax.tree.map(lambda x: x[None], rows))


def _nats_of_rank(stacks, ends, rows, *, plan: StagePlan, config: Config, how):
    stacks = jax.tree.map(lambda leaf: leaf[0], stacks)
    rank = Rank(stacks, ends, rows, None, plan, config, how, 1.0)

    def of_layers(kind, nats, kept, place, i, x):
        _, of_tokens = rank.tokens(place.microbatch)
        y, _ = rank.layers[kind].output(rank.weights(kind, place.chunk, i), x, of_tokens)
        return nats, kept, y

    def of_output(nats, kept, place, i, x):
        params = gathered_ends(rank.all_ends(), how)
        hidden = final_norm(params, x, how)
        return (
            nats + nats_of_hidden(params, hidden, rank.micro_batch(place.microbatch), how),
            kept,
            x,
        )

    works = []
    for op, what, counts in plan.works:
        if op == FORWARD:
            run = partial(of_layers, what) if what in plan.layers else rank.embedding
            works.append(Work(op, counts, False, run))
        elif what == LOSS:
            works.append(Work(FORWARD, counts, False, of_output))
    _, batch, row_len = tokens_of_rows(rows).shape
    shape = (batch, row_len - 1, config.model.hidden_size)
    message = jax.ShapeDtypeStruct(shape, config.model.dtype)
    tables = forward_tables(plan.schedule, 1)
    nats = run_ticks(tables, works, jnp.zeros(()), (), message, jnp.int32(1))
    return lax.psum(nats, "pipe")
