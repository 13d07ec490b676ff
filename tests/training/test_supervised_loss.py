"""The loss over targets alone: against the f64 oracle, over micro-batches, devices and stages."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import ONE_DEVICE, make_layout
from dsv3_jax.training.extensions import NONE, Extensions
from dsv3_jax.training.loss import Supervised, training_loss
from dsv3_jax.training.schedule import StepSettings
from dsv3_jax.training.state import TrainState
from dsv3_jax.training.step import eval_step, gradients
from tests import oracle
from tests.helpers import (
    TOLERANCE,
    random_tokens,
    random_variables,
    relative_error,
    tiny_config,
    tiny_model,
)

MODEL = tiny_model(num_hidden_layers=2, num_nextn_predict_layers=2)
BASE = tiny_config(MODEL)
CONFIG = dataclasses.replace(
    BASE, schedule=dataclasses.replace(BASE.schedule, balance_loss_weight=0.5)
)
WEIGHT = 0.3
VARIABLES = random_variables(MODEL)
# For gradients, which are means over targets whatever layers make them: one MTP module, no dense
# layer.
ONE_MTP = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(MODEL, first_k_dense_replace=0, num_nextn_predict_layers=1),
)
OF_ONE_MTP = random_variables(ONE_MTP.model)
LENGTH = 12


def make_rows(seed: int, batch: int = 4) -> Supervised:
    """Rows of documents of odd lengths, in which some tokens are targets, and of padding."""
    rng = np.random.default_rng(seed)
    tokens = random_tokens(MODEL, batch, LENGTH + 1, seed=seed)
    segments, targets = np.zeros(tokens.shape, np.int32), np.zeros(tokens.shape, bool)
    for row in range(batch):
        at, number = 0, 1
        while (length := int(rng.integers(3, 7))) + at <= LENGTH + 1:
            segments[row, at : at + length] = number
            targets[row, at + 1 : at + length] = rng.random(length - 1) < 0.6
            at, number = at + length, number + 1
    targets[0] = False  # a row may have none, another many
    return Supervised(tokens, targets, segments)


ROWS = make_rows(0)


def test_an_own_loss_counts_the_same_tokens():
    """Padding goes to no expert's load, whichever loss is taken."""
    own = Extensions(loss=lambda outputs, rows: outputs.logits.mean())
    loads = []
    for extensions in (NONE, own):
        loss = partial(training_loss, config=CONFIG, extensions=extensions)
        terms = jax.jit(lambda variables, rows, loss=loss: loss(variables, rows, WEIGHT)[1])
        loads.append(jax.device_get(terms(VARIABLES, ROWS).load))
    jax.tree.map(np.testing.assert_array_equal, *loads)
    real, chosen = int((ROWS.segments[:, :-1] != 0).sum()), MODEL.num_experts_per_tok
    assert real < ROWS.tokens[:, :-1].size
    assert max(load.sum(-1).max() for load in loads[0].values()) == real * chosen


def oracle_terms(rows, params):
    """(ce, mtp, balance): each document alone; means over counted targets, of all rows."""
    nats, counts = np.zeros(3), np.zeros(3, int)
    balances = []
    for tokens, targets, segments in zip(rows.tokens, rows.targets, rows.segments):
        read = segments[:-1]
        out = oracle.forward({**VARIABLES, "params": params}, tokens[:-1], MODEL, read)
        for depth, logits in enumerate((out.logits, *out.mtp_logits)):
            ahead = depth + 1
            valid = targets[ahead:] & (segments[ahead:] == segments[: len(tokens) - ahead])
            of_token = oracle.nats(logits, tokens[ahead:])
            nats[depth] += of_token[valid].sum()
            counts[depth] += valid.sum()
        balance = 0.0
        for depth, routed in [(0, r) for r in out.routed] + [
            (k + 1, r) for k, r in enumerate(out.mtp_routed)
        ]:
            real = read != 0
            if depth:
                ahead = np.concatenate([read[depth:], np.full(depth, -1)])
                real = real & (read == ahead)
            scores = np.asarray(routed.scores)[: len(read)]
            scores = np.pad(scores, [(0, len(read) - len(scores)), (0, 0)], constant_values=1)
            if real.any():
                balance += oracle.balance_loss(scores[real], MODEL.num_experts_per_tok)
        balances.append(balance)
    ce, *mtp = nats / np.maximum(counts, 1)
    return ce, np.mean(mtp), np.mean(balances)


def test_terms_agree_with_the_oracle():
    loss, terms = jax.jit(lambda v: training_loss(v, ROWS, jnp.float32(WEIGHT), CONFIG))(VARIABLES)
    ce, mtp, balance = oracle_terms(ROWS, VARIABLES["params"])
    limit = TOLERANCE["f32_model"]
    assert relative_error(np.array([terms.ce]), np.array([ce])) < limit
    assert relative_error(np.array([terms.mtp]), np.array([mtp])) < limit
    assert relative_error(np.array([terms.balance]), np.array([balance])) < limit
    assert float(loss) == pytest.approx(ce + WEIGHT * mtp + 0.5 * balance, rel=limit)
    real = int((ROWS.segments[:, :-1] != 0).sum()) * MODEL.num_experts_per_tok
    assert int(terms.load["moe_layers"].sum()) == real
    evaluated = jax.jit(eval_step, static_argnames=("config",))(
        VARIABLES["params"], VARIABLES["router"], ROWS, CONFIG
    )
    assert float(evaluated) == pytest.approx(ce, rel=limit)


def test_what_is_padding_changes_nothing():
    rng = np.random.default_rng(1)
    noise = rng.integers(0, MODEL.vocab_size - 2, ROWS.tokens.shape, np.int32)
    other = ROWS._replace(tokens=np.where(ROWS.segments == 0, noise, ROWS.tokens))
    assert (other.tokens != ROWS.tokens).any()
    (loss, terms, grads, *_), (loss_2, terms_2, grads_2, *_) = (
        step_gradients(micro_batches(rows, 1)) for rows in (ROWS, other)
    )
    assert float(loss) == float(loss_2)
    jax.tree.map(np.testing.assert_array_equal, terms.load, terms_2.load)
    assert relative_error(grads_2, grads) < TOLERANCE["f32_reordered"]


def micro_batches(rows: Supervised, number: int) -> Supervised:
    return jax.tree.map(lambda x: x.reshape(number, -1, x.shape[-1]), rows)


# What is asked for again is compiled once.
compiled = jax.jit(gradients, static_argnames=("config", "layout"))


def step_gradients(rows, config=ONE_MTP, layout=ONE_DEVICE):
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, OF_ONE_MTP["params"], OF_ONE_MTP["router"], None, zero, zero)
    count = np.int32(len(rows.tokens))
    settings = StepSettings(jnp.float32(1), jnp.float32(1), jnp.float32(WEIGHT), jnp.int32(count))
    return compiled(state, rows, settings, config=config, layout=layout)


@pytest.mark.slow
def test_micro_batches_give_the_whole_batch_s_mean():
    """Though they hold different numbers of targets, one of them none."""
    whole = step_gradients(micro_batches(ROWS, 1))
    parts = step_gradients(micro_batches(ROWS, 4))
    assert relative_error(parts[2], whole[2]) < TOLERANCE["f32_gradient"]
    for ours, theirs in zip(parts[1][:3], whole[1][:3]):
        assert float(ours) == pytest.approx(float(theirs), rel=TOLERANCE["f32_model"])


MESHES = [{"data": 2, "local": 2}, {"context": 2, "local": 2}, {"pipe": 2}]


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_meshes_give_the_same_mean(axes):
    rows = micro_batches(ROWS, 1 if "data" in axes else 2)
    plain = step_gradients(rows)
    mesh = dataclasses.replace(ONE_MTP.mesh, **axes)
    train = dataclasses.replace(
        ONE_MTP.train, seq_len=LENGTH, batch_size=4, micro_batch_size=rows.tokens.shape[1]
    )
    sharding = ONE_MTP.sharding
    if "context" in axes:
        sharding = dataclasses.replace(sharding, context="ring")
    config = dataclasses.replace(ONE_MTP, mesh=mesh, train=train, sharding=sharding)
    devices = int(np.prod(list(axes.values())))
    made = make_mesh(mesh, jax.devices()[:devices])
    layout = make_layout(made, sharding, config.expert_parallel)
    found = step_gradients(rows, config, layout)
    assert relative_error(found[2], plain[2]) < TOLERANCE["f32_gradient"]
    assert float(found[0]) == pytest.approx(float(plain[0]), rel=TOLERANCE["f32_model"])
    jax.tree.map(np.testing.assert_array_equal, found[1].load, plain[1].load)
