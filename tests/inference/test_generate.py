"""Generation: prompts of different lengths at once, ends, limits, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax.config import UserError
from dsv3_jax.inference import generate as generate_module
from dsv3_jax.inference.acts import _advance_told, feed
from dsv3_jax.inference.generate import generate
from dsv3_jax.model.transformer import forward
from dsv3_jax.parallel.compiler_options import ONE_CORE_OPTIONS
from tests.helpers import random_tokens, random_variables, tiny_model

CONFIG = tiny_model(num_hidden_layers=2, num_nextn_predict_layers=0)
VARIABLES = random_variables(CONFIG)
# Biased logits would end a sequence by chance: this head never says eos.
VARIABLES["params"]["lm_head"] = VARIABLES["params"]["lm_head"].at[CONFIG.eos_token_id].set(0.0)
PROMPTS = [row[:n].tolist() for row, n in zip(random_tokens(CONFIG, 3, 9), (9, 1, 4), strict=True)]
NEW = 5
ALL = {"max_new_tokens": NEW, "cache_length": 16}


def tokens_of(prompts, variables=VARIABLES, **options):
    """[B, n]: what each prompt was continued with."""
    return np.stack(list(generate(variables, prompts, CONFIG, **(ALL | options))), axis=1)


@pytest.fixture(scope="module")
def greedy():
    return tokens_of(PROMPTS)


def test_greedy_is_the_argmax_of_forward(greedy):
    """Each token from scratch, without a cache. One length, so one compilation."""
    run = jax.jit(forward, static_argnames="config")
    for prompt, continued in zip(PROMPTS, greedy, strict=True):
        text = list(prompt)
        for token in continued:
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(text)] = text
            logits = run(VARIABLES, padded, config=CONFIG).logits[0, len(text) - 1]
            assert int(np.argmax(logits)) == token
            text.append(int(token))


def test_a_batch_of_different_lengths_equals_one_by_one(greedy):
    assert greedy.shape == (3, NEW) and greedy.dtype == np.int32
    for prompt, together in zip(PROMPTS, greedy, strict=True):
        np.testing.assert_array_equal(tokens_of([prompt])[0], together)


def test_pages_hold_what_a_contiguous_cache_does(greedy, monkeypatch):
    """Pages of 4 tokens: the sequences hold 4, 2 and 2 of them, in no order."""
    monkeypatch.setattr(generate_module, "PAGE", 4)
    np.testing.assert_array_equal(tokens_of(PROMPTS, paged=True), greedy)


def test_an_fp8_cache_writes_nearly_the_same(greedy):
    """Its first token has not read the cache; later ones have read 4 bits of each number."""
    tokens = tokens_of(PROMPTS, fp8_cache=True)
    np.testing.assert_array_equal(tokens[:, 0], greedy[:, 0])
    assert (tokens == greedy).mean() > 0.6


def test_a_seed_repeats_its_text():
    drawn = [tokens_of(PROMPTS, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def test_a_tiny_nucleus_is_greedy(greedy):
    np.testing.assert_array_equal(tokens_of(PROMPTS, temperature=1.0, top_p=1e-6), greedy)


def test_an_ended_sequence_goes_on_with_eos_while_others_run(greedy):
    """The eos of the first prompt is what greedy says at step 2; the others do not end there."""
    ends_with = int(greedy[0, 2])
    first = [int(np.argmax(row == ends_with)) if ends_with in row else NEW for row in greedy]
    config = dataclasses.replace(CONFIG, eos_token_id=ends_with)
    steps = np.stack(list(generate(VARIABLES, PROMPTS, config, **ALL)), axis=1)
    for row, want, end in zip(steps, greedy, first, strict=True):
        np.testing.assert_array_equal(row[: end + 1], want[: end + 1])
        assert (row[end + 1 :] == ends_with).all()


def test_any_of_several_ids_ends_a_sequence_and_the_first_fills_it_up(greedy):
    ends = (int(greedy[1, 3]), int(greedy[0, 1]))
    config = dataclasses.replace(CONFIG, eos_token_id=ends)
    steps = np.stack(list(generate(VARIABLES, PROMPTS, config, **ALL)), axis=1)
    for row, want in zip(steps, greedy, strict=True):
        hits = np.isin(want, ends)
        end = int(hits.argmax()) if hits.any() else NEW
        np.testing.assert_array_equal(row[: end + 1], want[: len(row)][: end + 1])
        assert (row[end + 1 :] == ends[0]).all()
    assert np.isin(steps[0, :2], ends).any()  # it ended with the second of them


def test_other_ids_that_end_a_text_compile_nothing(greedy):
    del greedy  # has compiled what is wanted
    advance = _advance_told(tuple(ONE_CORE_OPTIONS.items()))
    compiled = advance._cache_size(), feed._cache_size()
    assert min(compiled) > 0
    config = dataclasses.replace(CONFIG, eos_token_id=(3, 4, 5))
    next(generate(VARIABLES, PROMPTS, config, **ALL))
    assert (advance._cache_size(), feed._cache_size()) == compiled


def test_without_any_id_that_ends_a_text_nothing_ends(greedy):
    config = dataclasses.replace(CONFIG, eos_token_id=())
    steps = np.stack(list(generate(VARIABLES, PROMPTS, config, **ALL)), axis=1)
    np.testing.assert_array_equal(steps, greedy)


def test_generation_stops_when_all_have_ended():
    """Logits of zero everywhere: the likeliest token is 0, and 0 is eos."""
    params = {**VARIABLES["params"], "lm_head": 0 * VARIABLES["params"]["lm_head"]}
    config = dataclasses.replace(CONFIG, eos_token_id=0)
    got = list(generate({**VARIABLES, "params": params}, PROMPTS, config, **ALL))
    np.testing.assert_array_equal(got, [[0, 0, 0]])


def test_the_cache_may_be_exactly_full():
    """9 prompt tokens and 4 of the 5 new ones are fed: 13 rows."""
    np.testing.assert_array_equal(tokens_of(PROMPTS[:1], cache_length=13), tokens_of(PROMPTS[:1]))


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 37]], {}, "token ids from 1 to 37; the model's vocabulary is 0 to 36"),
        ([[-1, 3]], {}, "token ids from -1 to 3"),
        (
            PROMPTS,
            {"cache_length": 12},
            "9 tokens and 5 more are asked for, but the cache holds 12",
        ),
        (PROMPTS, {"cache_length": 99}, "cache length 99 exceeds max_position_embeddings=64"),
        (PROMPTS, {"cache_length": None, "max_new_tokens": 60}, "but the cache holds 64"),
    ],
)
def test_what_cannot_be_generated_is_refused_with_the_numbers(prompts, options, message):
    with pytest.raises(UserError, match=message):
        tokens_of(prompts, **options)


@pytest.mark.misuse
@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "there is no prompt"),
        ([1, 2], r"prompt 0 must be a sequence of token ids, as \[1, 2, 3\], not 1"),
        ([[1], [[1, 2]]], r"prompt 1 must be .* not list of int64\[1, 2\]"),
        ([[1.5, 2.0]], "prompt 0 must be .* not list of float64"),
        (["hi"], "prompt 0 must be .* not 'hi'"),
        ([[1, [2, 3]]], "prompt 0 must be .* not list"),
    ],
)
def test_what_is_no_prompt_is_refused_with_the_rule(prompts, message):
    """Of fractions the whole parts were taken, without a word."""
    with pytest.raises(UserError, match=message):
        tokens_of(prompts)
