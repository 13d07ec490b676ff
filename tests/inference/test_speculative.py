"""Speculation: it changes no token, its drafts are the MTP modules' own, and draws stay exact."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import UserError
from dsv3_jax.inference import acts as acts_module
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.generate import complete, generate
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.speculative import agreeing
from dsv3_jax.model.transformer import forward
from dsv3_jax.parallel.compiler_options import ONE_CORE_OPTIONS
from tests.cases import in_every_run
from tests.helpers import random_tokens, random_variables, tiny_model

CONFIG = tiny_model(num_hidden_layers=2, num_nextn_predict_layers=1, eos_token_id=())
TWO = dataclasses.replace(CONFIG, num_nextn_predict_layers=2)
VARIABLES = {1: random_variables(CONFIG), 2: random_variables(TWO)}
PROMPTS = [row[:n].tolist() for row, n in zip(random_tokens(CONFIG, 3, 9), (9, 1, 4), strict=True)]
NEW = 8


def tokens_of(modules=1, prompts=PROMPTS, **options):
    config = CONFIG if modules == 1 else TWO
    options = {"max_new_tokens": NEW} | options
    return np.stack(list(generate(VARIABLES[modules], prompts, config, **options)), 1)


def forget_steps():
    """What a step calls is traced again."""
    acts_module._advance_told(tuple(ONE_CORE_OPTIONS.items())).clear_cache()


def agreeing_variables(modules=1):
    """Weights whose layers and MTP modules only copy: the next token is a function of the last one,
    for the model and for every module, so that all drafts agree."""
    config = CONFIG if modules == 1 else TWO
    params = jax.tree.map(jnp.zeros_like, VARIABLES[modules]["params"])
    rng = np.random.default_rng(0)
    table = rng.normal(size=(config.vocab_size, config.hidden_size))
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    params["embed_tokens"] = jnp.asarray(table, jnp.float32)
    params["lm_head"] = jnp.asarray(np.roll(table, 5, axis=0), jnp.float32)
    params["norm"] = jnp.ones_like(params["norm"])
    half = jnp.eye(config.hidden_size)
    for depth in range(modules):
        mtp = params[f"mtp_{depth}"]
        mtp["eh_proj"] = jnp.concatenate([half, 0 * half], axis=1)
        mtp["enorm"], mtp["norm"] = jnp.ones_like(mtp["enorm"]), jnp.ones_like(mtp["norm"])
    return {**VARIABLES[modules], "params": params}


@pytest.mark.parametrize(
    "modules, drafts, paged, temperature",
    in_every_run(
        [(1, 1, False, 0.0), (2, 3, True, 0.8), (2, 3, False, 0.8)],
        (1, 1, False, 0.0),
    ),
)
def test_speculation_changes_no_token(modules, drafts, paged, temperature):
    """Neither greedily nor drawn: the seed's text is the same with and without."""
    options = {"temperature": temperature, "top_p": 0.9, "seed": 5}
    want = tokens_of(modules, **options)
    got = tokens_of(modules, speculative=drafts, paged=paged, **options)
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("modules", [1, 2])
def test_drafts_that_agree_are_all_kept(modules):
    config = CONFIG if modules == 1 else TWO
    model = agreeing_variables(modules)
    (done,) = complete(model, PROMPTS[:1], config, max_new_tokens=13, speculative=3)
    want = [(PROMPTS[0][-1] + 5 * (n + 1)) % config.vocab_size for n in range(13)]
    assert done.ids == want
    assert done.steps == 3, "one token from the prompt, and then four a step"
    # The last step is not counted: it might have had no use for its drafts.
    assert done.drafted == done.accepted == [2, 2, 2]


@pytest.mark.slow
def test_the_first_draft_of_every_step_is_the_module_s_own():
    """Against `forward` of the whole text: its MTP logits at the row before the newest token."""
    checked, prompt = [], random_tokens(CONFIG, 1, 9, seed=3)[0].tolist()  # seven are accepted

    def spy(drafts, drawn):
        jax.debug.callback(lambda d: checked.append(np.array(d)), drafts, ordered=True)
        return agreeing(drafts, drawn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acts_module, "agreeing", spy)
        forget_steps()
        (done,) = complete(VARIABLES[2], [prompt], TWO, max_new_tokens=30, speculative=2)
        jax.effects_barrier()
    forget_steps()
    text = np.array([[*prompt, *done.ids]])
    outputs = jax.jit(forward, static_argnames="config")(VARIABLES[2], text, config=TWO)
    newest, length = len(prompt), len(prompt)
    firsts, seconds = (np.argmax(logits[0], -1) for logits in outputs.mtp_logits)
    right = 0
    for number, drafts in enumerate(checked[: done.steps]):
        newest = length if number == 0 else newest
        assert drafts[0, 0] == firsts[newest - 1], "h of the row before it, and the newest token"
        accepted = 0
        while accepted < 2 and newest + accepted + 1 < text.shape[1]:
            if drafts[0, accepted] != text[0, newest + accepted + 1]:
                break
            accepted += 1
        if accepted:  # the second module then read the very token that was written
            right += 1
            assert drafts[0, 1] == seconds[newest - 1]
        newest += accepted + 1
    assert done.steps > 2 and right


def chi_square(variables, prompt, patch=None):
    """The statistic of tokens 2 and 3 of 3,000 texts against the model's own, and its degrees."""
    count, temperature = 3000, 1.0
    options = EngineOptions(
        slots=500, max_length=8, chunks=(4,), chunk_rows=(500,), token_budget=4000, drafts=2,
        paged=False,
    )  # fmt: skip
    engine = Engine(variables, CONFIG, options)
    requests = [Request(tuple(prompt), 3, temperature=temperature, seed=n) for n in range(count)]
    texts = np.array([done.ids for done in engine.run(requests)])
    vocabulary = CONFIG.vocab_size
    logits = jax.jit(lambda v, ids: forward(v, ids, CONFIG).logits[:, -3:])
    contexts = np.array(
        [[*prompt, a, b] for a in range(vocabulary) for b in range(vocabulary)], np.int32
    )
    probs = np.asarray(jax.nn.softmax(logits(variables, contexts) / temperature, axis=-1))
    probs = probs.reshape(vocabulary, vocabulary, 3, vocabulary).astype(np.float64)
    first, second, third = probs[0, 0, 0], probs[:, 0, 1], probs[:, :, 2]
    joint = np.einsum("a,ab,abc->bc", first, second, third) * count
    got = np.zeros_like(joint)
    np.add.at(got, (texts[:, 1], texts[:, 2]), 1)
    often = joint >= 5
    want = np.append(joint[often], joint[~often].sum())
    seen = np.append(got[often], got[~often].sum())
    return ((seen - want) ** 2 / want).sum(), len(want) - 1


@pytest.mark.slow
def test_draws_with_speculation_have_the_model_s_own_distribution():
    """Fixed seeds; 4 standard deviations of chi-square. Keeping a draft that is merely likely, not
    the model's draw, fails it."""
    prompt = PROMPTS[2]
    statistic, degrees = chi_square(VARIABLES[1], prompt)
    assert degrees > 50
    limit = degrees + 4 * np.sqrt(2 * degrees)
    assert statistic < limit

    def biased(drafts, drawn):
        return jnp.minimum(agreeing(drafts, drawn) + 1, drafts.shape[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acts_module, "agreeing", biased)
        forget_steps()
        statistic, _ = chi_square(VARIABLES[1], prompt)
    forget_steps()
    assert statistic > 2 * limit


@pytest.mark.slow
def test_a_text_ends_within_a_step_that_wrote_more():
    """All drafts agree, and the second token of a step ends the text, or the number asked for."""
    model = agreeing_variables()
    every = partial(complete, model, PROMPTS[:1], max_new_tokens=11, speculative=3)
    whole = every(CONFIG)[0].ids
    ending = dataclasses.replace(CONFIG, eos_token_id=whole[6])
    (done,) = every(ending)
    assert (done.ids, done.finish_reason) == (whole[:7], "stop")
    (done,) = every(CONFIG, max_new_tokens=7)
    assert (done.ids, done.finish_reason) == (whole[:7], "length")


def test_a_model_without_mtp_modules_cannot_draft():
    without = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match="2 drafts a step need an MTP module, and the model has 0"):
        complete(VARIABLES[1], PROMPTS, without, max_new_tokens=2, speculative=2)
