"""What generation returns for training: log-probabilities, experts, and routing by them again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ExpertParallelConfig, ParallelConfig
from dsv3_jax.inference.generate import complete
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.transformer import forward
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import Layout
from tests.helpers import random_tokens, random_variables, tiny_model

CONFIG = tiny_model(eos_token_id=())
VARIABLES = random_variables(CONFIG)
PROMPTS = [row[:n].tolist() for row, n in zip(random_tokens(CONFIG, 2, 9), (9, 4), strict=True)]
LENGTH = 16
MESH = {"node": 2, "context": 2}


@pytest.fixture(scope="module")
def completions():
    """With drafts, whose rejected tokens must leave no experts behind."""
    options = dict(max_new_tokens=7, temperature=0.8, seed=3, speculative=2)
    return complete(VARIABLES, PROMPTS, CONFIG, experts=True, **options)


def batch_of(completions):
    """(ids [B, T], experts [L, B, T, K]) of prompts and new tokens, padded."""
    layers, per_token = CONFIG.num_moe_layers, CONFIG.num_experts_per_tok
    ids = np.zeros((len(completions), LENGTH), np.int32)
    experts = np.zeros((layers, len(completions), LENGTH, per_token), np.int32)
    experts += np.arange(per_token)
    for row, done in enumerate(completions):
        text, told = [*done.request.prompt, *done.ids], np.concatenate(done.experts)
        assert told.shape == (len(text) - 1, layers, per_token)
        ids[row, : len(text)] = text
        experts[:, row, : len(told)] = told.swapaxes(0, 1)
    return ids, experts


run = jax.jit(
    lambda variables, ids, experts, how: forward(variables, ids, how, experts=experts),
    static_argnums=3,
)


def logprobs_of(variables, ids, experts, how):
    outputs = run(variables, ids, experts, how)
    logits = jax.nn.log_softmax(outputs.logits[:, :-1])
    picked = np.take_along_axis(np.asarray(logits), ids[:, 1:, None], axis=-1)[..., 0]
    return picked, outputs.stats.experts


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, MESH], ids=["one device", "mesh"])
def test_replayed_log_probabilities_are_generation_s(sizes, completions):
    ids, experts = batch_of(completions)
    layout = Layout(make_mesh(ParallelConfig(**sizes)), expert=ExpertParallelConfig())
    got, chosen = logprobs_of(VARIABLES, ids, experts, Pass(CONFIG, layout=layout))
    np.testing.assert_array_equal(chosen, experts)
    for row, done in enumerate(completions):
        first = len(done.request.prompt) - 1
        want = [token.logprob for token in done.tokens]
        np.testing.assert_allclose(got[row, first : first + len(want)], want, atol=1e-5)


@pytest.mark.slow
def test_the_experts_are_the_router_s_own_choice_when_nothing_has_changed(completions):
    ids, experts = batch_of(completions)
    _, chosen = logprobs_of(VARIABLES, ids, None, Pass(CONFIG))
    for row, done in enumerate(completions):
        fed = len(done.request.prompt) + len(done.ids) - 1
        assert (np.asarray(chosen)[:, row, :fed] == experts[:, row, :fed]).all()


def test_other_experts_than_the_router_s_are_used_as_told(completions):
    """A router whose bias has moved would choose others; told, it does not."""
    ids, experts = batch_of(completions)
    moved = jax.tree.map(
        lambda bias: bias + jnp.linspace(0, 3, bias.shape[-1]), VARIABLES["router"]
    )
    variables = {**VARIABLES, "router": moved}
    free, chosen = logprobs_of(variables, ids, None, Pass(CONFIG))
    assert (np.asarray(chosen) != experts).any()
    got, chosen = logprobs_of(variables, ids, experts, Pass(CONFIG))
    np.testing.assert_array_equal(chosen, experts)
    want, _ = logprobs_of(VARIABLES, ids, experts, Pass(CONFIG))
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert np.abs(free - want).max() > 1e-2


@pytest.mark.slow
def test_experts_of_more_groups_than_the_router_takes_are_replayed_on_a_mesh(completions):
    """Four nodes hold a group each; a token told three groups is sent to all three."""
    ids, experts = (np.concatenate([x, x], axis) for x, axis in zip(batch_of(completions), (0, 1)))
    assert CONFIG.topk_group < CONFIG.num_experts_per_tok <= CONFIG.n_group
    token = np.arange(LENGTH)[:, None]
    experts[:] = (token + 2 * np.arange(CONFIG.num_experts_per_tok)) % CONFIG.n_routed_experts
    layout = Layout(make_mesh(ParallelConfig(node=4)), expert=ExpertParallelConfig())
    want, _ = logprobs_of(VARIABLES, ids, experts, Pass(CONFIG))
    got, chosen = logprobs_of(VARIABLES, ids, experts, Pass(CONFIG, layout=layout))
    np.testing.assert_array_equal(chosen, experts)
    np.testing.assert_allclose(got, want, atol=1e-5)
