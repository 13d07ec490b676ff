"""What callers of the library get wrong: a ValueError with the rule, and the same program."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Config, ModelConfig, QuantConfig, TrainConfig, UserError
from dsv3_jax.model import checks, moe, router, transformer
from dsv3_jax.model.cache import init_model_cache
from dsv3_jax.model.decode import decode_step, prefill
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.transformer import forward
from dsv3_jax.quantization.block_scaled import quantize
from dsv3_jax.quantization.recipe import recipe_named
from tests.cases import matrix
from tests.helpers import random_variables

MODEL = ModelConfig(
    **{"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    **{"intermediate_size": 32, "moe_intermediate_size": 16, "max_position_embeddings": 16},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4},
    **{
        "v_head_dim": 8,
        "num_nextn_predict_layers": 0,
        "first_k_dense_replace": 1,
        "dtype": "float32",
    },
)
VARIABLES = random_variables(MODEL)
IDS = np.arange(8, dtype=np.int32)[None]

pytestmark = pytest.mark.misuse


def traced():
    """A pass that computes nothing."""
    return jax.eval_shape(partial(forward, config=MODEL), VARIABLES, IDS)


@pytest.mark.parametrize(
    "tokens, message",
    [
        (IDS[0], r"\[B, T\], not \[8\]: one row is tokens\[None\]"),
        (IDS.tolist(), r"\[B, T\], not list"),
        (IDS.astype(np.float32), "must be integers, not float32"),
        (IDS + 89, r"ids from 89 to 96: they must lie in \[0, config.vocab_size=96\)"),
        (jnp.asarray(IDS) - 1, "ids from -1 to 6"),
        (np.zeros((1, 17), np.int32), "17 tokens exceed config.max_position_embeddings=16"),
    ],
)
def test_wrong_tokens_are_refused_with_the_rule(tokens, message):
    with pytest.raises(ValueError, match=message):
        forward(VARIABLES, tokens, MODEL)
    cache = init_model_cache(MODEL, 1, 16)
    with pytest.raises(ValueError, match=message):
        prefill(VARIABLES, tokens, cache, MODEL)
    if "exceed" not in message:
        with pytest.raises(ValueError, match=message):
            decode_step(VARIABLES, tokens, jnp.zeros(1, jnp.int32), cache, MODEL)


def test_segments_have_the_shape_of_tokens():
    with pytest.raises(ValueError, match=r"segments \(1, 7\) must have the shape of tokens \(1, 8"):
        forward(VARIABLES, IDS, MODEL, segments=np.zeros((1, 7), np.int32))


def test_shapes_are_looked_at_while_tracing_and_values_are_not():
    """The traced program is the one that there would be without any check."""

    def run(ids):
        return forward(VARIABLES, ids, MODEL).logits

    with pytest.raises(ValueError, match=r"\[B, T\]"):
        jax.jit(run)(IDS[0])
    with pytest.MonkeyPatch.context() as patched:
        checked = str(jax.make_jaxpr(run)(IDS))
        for module in (transformer, checks):
            patched.setattr(module, "check_tokens", lambda *_, **__: None)
        checks._imported_by_name.cache_clear()
        assert str(jax.make_jaxpr(run)(IDS)) == checked
    checks._imported_by_name.cache_clear()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Pass(MODEL, remat="some"), "remat='some' must be one of none, dots, v3, full"),
        (lambda: Pass(MODEL, recipe="fp8_paper"), "recipe must be a Recipe, not str.*recipe_named"),
        (lambda: Pass(Config()), "config must be a ModelConfig, not Config"),
        (lambda: recipe_named("fp9"), "recipe 'fp9' must be one of bf16, fp8_paper"),
        (lambda: quantize(np.ones((8, 8), np.float32), 128), "tile=128 must be two positive sizes"),
        (lambda: quantize(np.ones((8, 8), np.float32), (0, 8)), "tile=.0, 8. must be two positive"),
        (lambda: quantize(np.ones(8, np.float32), (1, 8)), "last two dims"),
    ],
)
def test_wrong_arguments_are_refused_with_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_choices_of_a_config_made_in_python_are_listed():
    config = Config(quant=QuantConfig(preset="fp9"), train=TrainConfig(remat="some"))
    with pytest.raises(UserError) as error:
        config.validate()
    assert "quant.preset='fp9' must be one of bf16, fp8_paper" in str(error.value)
    assert "train.remat='some' must be one of none, dots, v3, full" in str(error.value)
    assert dataclasses.replace(config, quant=QuantConfig(), train=TrainConfig()).validate()


WHERE = {"router": (router,), "moe": (moe,), "both": (router, moe)}


@pytest.mark.parametrize(
    "modules, name",
    matrix([pytest.param(WHERE[one], id=one) for one in WHERE], ["route", "balance_loss"]),
)
def test_a_function_that_was_replaced_is_never_passed_over(modules, name, monkeypatch):
    traced()
    for module in modules:
        monkeypatch.setattr(module, name, lambda *_: None)
    with pytest.raises(ValueError, match=rf"dsv3_jax.model.\w+.{name} was replaced, but"):
        traced()
    monkeypatch.undo()
    traced()


def test_a_function_replaced_before_the_first_pass_is_used(monkeypatch):
    asked = []

    def mine(*args):
        asked.append(args)
        return original(*args)

    original = router.route
    monkeypatch.setattr(router, "route", mine)
    monkeypatch.setattr(moe, "route", mine)
    checks._imported_by_name.cache_clear()
    never_traced = dataclasses.replace(MODEL, num_experts_per_tok=1)
    jax.eval_shape(partial(forward, config=never_traced), VARIABLES, IDS)
    checks._imported_by_name.cache_clear()
    assert asked


def test_the_functions_that_are_watched_are_many():
    watched = [names for *names, _ in checks._imported_by_name()]
    assert ["dsv3_jax.model.router", "route", "dsv3_jax.model.moe"] in watched
    assert len(watched) > 100
