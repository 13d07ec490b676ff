"""Extension points are arguments: the examples of docs/extending.md run, and do what they say."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsv3_jax as ds
from dsv3_jax.data.mixture import batch_part
from dsv3_jax.model.router import best_of_groups
from dsv3_jax.training.feed import SourceRows
from dsv3_jax.training.state import abstract_state
from tests.cases import in_every_run
from tests.helpers import (
    TOLERANCE,
    random_tokens,
    random_variables,
    relative_error,
    tiny_config,
    tiny_model,
)

PAGE = (Path(__file__).parent.parent / "docs/extending.md").read_text()
FIRST, *EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
MODEL = tiny_model(num_hidden_layers=2)
WITHOUT_MTP = dataclasses.replace(MODEL, num_nextn_predict_layers=0)
SETTINGS = ds.StepSettings(*map(np.float32, (1e-2, 1e-3, 0.3)), num_micro_batches=np.int32(1))


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
def test_an_example_of_the_page_runs(number, tmp_path, capsys):
    assert len(EXAMPLES) == 5
    assert len(EXAMPLES[number].splitlines()) < 20
    with jax.numpy_dtype_promotion("standard"):  # JAX's default, which optax relies on
        exec(FIRST + EXAMPLES[number], {"run_dir": str(tmp_path / "run")})
    assert capsys.readouterr().out


def test_the_defaults_given_as_functions_are_the_defaults(variables):
    """The own router's path against the fused one; with the same functions, the same numbers."""
    tokens = random_tokens(MODEL, 2, 12)
    how = ds.Pass(MODEL, score=jax.nn.sigmoid, select=best_of_groups)
    forward = jax.jit(ds.forward, static_argnums=2)
    own, plain = (forward(variables, tokens, each) for each in (how, ds.Pass(MODEL)))
    np.testing.assert_array_equal(own.stats.experts, plain.stats.experts)
    assert relative_error(own.logits, plain.logits) <= TOLERANCE["f32_model"]


def test_own_scores_and_choices_reach_every_router(variables):
    def last(scores, bias, config):
        first = config.n_routed_experts - config.num_experts_per_tok
        chosen = jnp.arange(first, config.n_routed_experts)
        return jnp.broadcast_to(chosen, (len(scores), len(chosen)))

    how = ds.Pass(MODEL, select=last)
    out = jax.jit(ds.forward, static_argnums=2)(variables, random_tokens(MODEL, 2, 12), how)
    for stats in (out.stats, *out.mtp_stats):
        assert set(np.unique(stats.experts)) == {5, 6, 7}


def test_router_functions_of_other_shapes_are_refused(variables):
    how = ds.Pass(MODEL, select=lambda scores, bias, config: jnp.zeros((len(scores), 1), jnp.int32))
    with pytest.raises(ValueError, match=r"experts \(24, 1\): they must be .* \(24, 3\)"):
        jax.eval_shape(lambda v: ds.forward(v, random_tokens(MODEL, 2, 12), how), variables)


@pytest.mark.parametrize("mesh", in_every_run([None, {"context": 2}], None))
def test_a_bias_of_no_effect_changes_nothing_and_a_window_hides_the_past(variables, mesh):
    tokens = random_tokens(MODEL, 2, 12)
    layout = ds.ONE_DEVICE
    if mesh is not None:
        config = ds.ParallelConfig(**mesh)
        grid = ds.make_mesh(config, jax.devices()[: config.num_devices])
        layout = ds.make_layout(grid, ds.ShardingConfig(), ds.ExpertParallelConfig())

    forward = jax.jit(ds.forward, static_argnums=2)

    def hidden(bias, ids=tokens):
        how = ds.Pass(WITHOUT_MTP, layout=layout, attention_bias=bias)
        return np.asarray(forward(variables, ids, how).hidden)

    plain = hidden(None)

    def nothing(query, key):
        return jnp.zeros((len(query), key.shape[1]))

    assert relative_error(hidden(nothing), plain) <= TOLERANCE["f32_model"]

    def window(query, key):  # two layers see 2 tokens back
        return query - key < 2

    changed = tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % 30
    before, after = hidden(window), hidden(window, changed)
    np.testing.assert_allclose(after[:, 3:], before[:, 3:], atol=1e-6)
    assert np.abs(after[:, :3] - before[:, :3]).max() > 1e-3
    assert np.abs(hidden(None, changed)[:, 3:] - plain[:, 3:]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("per_head", [False, True])
def test_a_bias_holds_when_decoding_too(variables, per_head):
    tokens = random_tokens(MODEL, 2, 12)

    def decay(query, key):
        bias = -0.3 * (query - key).astype(jnp.float32)
        return bias * jnp.arange(3.0)[:, None, None] if per_head else bias

    how = ds.Pass(WITHOUT_MTP, attention_bias=decay)
    forward = jax.jit(ds.forward, static_argnums=2)
    whole = forward(variables, tokens, how).hidden
    cache = ds.init_model_cache(WITHOUT_MTP, 2, 16)
    start = jax.jit(ds.prefill, static_argnums=3)(variables, tokens[:, :7], cache, how)
    decode = jax.jit(ds.decode_step, static_argnums=4)
    steps = decode(variables, tokens[:, 7:], np.full(2, 7, np.int32), start.cache, how)
    got = jnp.concatenate([start.hidden, steps.hidden], axis=1)
    assert relative_error(got, whole) <= TOLERANCE["f32_model"]
    plain = forward(variables, tokens, ds.Pass(WITHOUT_MTP)).hidden
    assert relative_error(plain, whole) > 0.01


def test_what_cannot_take_a_bias_says_so(variables):
    mesh = ds.make_mesh(ds.ParallelConfig(context=2), jax.devices()[:2])
    ring = ds.make_layout(mesh, ds.ShardingConfig(context="ring"), ds.ExpertParallelConfig())

    def bias(query, key):
        return query >= key

    with pytest.raises(ValueError, match=r"use sharding.context='allgather'"):
        how = ds.Pass(MODEL, layout=ring, attention_bias=bias)
        jax.eval_shape(lambda v: ds.forward(v, random_tokens(MODEL, 2, 12), how), variables)
    with pytest.raises(ValueError, match=r"gave \(3,\): it must be \[T, S\] \(12, 12\)"):
        how = ds.Pass(MODEL, attention_bias=lambda q, k: jnp.zeros(3))
        jax.eval_shape(lambda v: ds.forward(v, random_tokens(MODEL, 2, 12), how), variables)


def test_the_default_path_is_one_program_with_and_without_the_argument():
    config = tiny_config(tiny_model(num_hidden_layers=1, first_k_dense_replace=0))
    state = abstract_state(config, ds.ONE_DEVICE)
    rows = jax.ShapeDtypeStruct((1, 4, 10), jnp.int32)
    arguments = (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state), rows)
    step = jax.jit(ds.train_step, static_argnames=("config", "extensions"))
    lowered = [
        step.lower(*arguments, SETTINGS, config=config, **more).as_text()
        for more in ({}, {"extensions": ds.Extensions()})
    ]
    assert lowered[0] == lowered[1]


@pytest.mark.slow
def test_an_own_loss_is_the_loss_and_moves_the_weights():
    config = tiny_config(WITHOUT_MTP)
    rows = random_tokens(MODEL, 1, 4, 10)

    def small_hidden(outputs, rows):
        assert rows.shape == (4, 10)
        return jnp.square(outputs.hidden).mean()

    own = ds.Extensions(loss=small_hidden, optimizer=optax.sgd(0.1))
    state = ds.init_state(jax.random.key(0), config, own)
    step = jax.jit(ds.train_step, static_argnames=("config", "extensions"))
    losses = []
    for _ in range(3):
        state, metrics = step(state, rows, SETTINGS, config=config, extensions=own)
        losses.append(float(metrics.loss))
    assert losses[0] > losses[1] > losses[2]
    np.testing.assert_array_equal(metrics.loss, metrics.terms.ce)
    # The head has no part in it, and stays.
    first = ds.init_state(jax.random.key(0), config, own)
    np.testing.assert_array_equal(state.params["lm_head"], first.params["lm_head"])


def test_a_pipeline_refuses_an_own_loss():
    config = dataclasses.replace(tiny_config(MODEL), mesh=ds.ParallelConfig(pipe=2))
    mesh = ds.make_mesh(config.mesh, jax.devices()[:2])
    layout = ds.make_layout(mesh, config.sharding, config.expert_parallel)
    own = ds.Extensions(loss=lambda outputs, rows: outputs.logits.mean())
    state = abstract_state(config, layout, own)
    rows = jax.ShapeDtypeStruct((2, 4, 10), jnp.int32)
    step = partial(ds.train_step, settings=SETTINGS, config=config, layout=layout, extensions=own)
    with pytest.raises(ds.UserError, match=r"mesh.pipe=2.: use mesh.pipe=1"):
        jax.eval_shape(step, state, rows)


def test_rows_of_a_data_source_are_checked():
    rows = SourceRows(lambda row: [row, row + 1], 2, 8)
    part = (slice(None),) * 3
    np.testing.assert_array_equal(
        batch_part(rows, 3, 2, (1, 3, 2), part), [[[3, 4], [4, 5], [0, 0]]]
    )
    with pytest.raises(ds.UserError, match=r"row 7 .* ids from 7 to 8; the vocabulary is 0 to 7"):
        batch_part(rows, 6, 2, (1, 2, 2), part)
    with pytest.raises(ds.UserError, match=r"shape \(2,\) .* must be train.seq_len \+ 1 = 3"):
        batch_part(SourceRows(lambda row: [1, 2], 3, 8), 0, 1, (1, 1, 3), part)


def test_a_corpus_with_more_ids_than_the_model_is_refused(tmp_path):
    """Its rows would have a loss of NaN, and their steps would be skipped."""
    text = tmp_path / "text.txt"
    text.write_text("some words " * 200)
    data = ds.DataConfig(path=str(text), tokenizer="byte", val_fraction=0.5)
    corpus = ds.open_corpus(data, seed=0, cache_dir=tmp_path)
    assert corpus.train.index.vocab_size == 261
    config = tiny_config(dataclasses.replace(MODEL, vocab_size=259, bos_token_id=0, eos_token_id=1))
    mesh = ds.make_mesh(ds.ParallelConfig(), jax.devices()[:1])
    with pytest.raises(ds.UserError, match=r"261 ids, but model.vocab_size=259"):
        next(ds.batches(config, corpus, ds.Schedule(config), mesh, start=0))
