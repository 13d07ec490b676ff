"""Recipes inside the model: which operations they reach, what that costs and what it saves."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, QuantConfig
from dsv3_jax.model.forward_pass import Pass
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.transformer import abstract_variables, forward, init_variables
from dsv3_jax.quantization.recipe import BF16, RECIPES, LinearRecipe, Recipe

MODEL = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    num_attention_heads=2,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    rope_scaling=None,
    intermediate_size=96,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    initializer_range=0.1,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 9)), jnp.int32)


def test_every_preset_of_the_config_is_a_recipe():
    presets = typing.get_args(typing.get_type_hints(QuantConfig)["preset"])
    assert set(presets) == set(RECIPES)


def casts_to_fp8(recipe) -> int:
    """How many there are in a forward pass."""
    variables = abstract_variables(MODEL)
    jaxpr = jax.make_jaxpr(lambda v: forward(v, TOKENS, Pass(MODEL, recipe)))(variables)
    return str(jaxpr).count("new_dtype=float8_e4m3fn")


def test_a_recipe_of_nothing_makes_no_fp8():
    assert casts_to_fp8(BF16) == 0


@pytest.mark.parametrize("operation", [field.name for field in dataclasses.fields(Recipe)])
def test_every_operation_of_a_recipe_reaches_the_model(operation):
    assert casts_to_fp8(dataclasses.replace(BF16, **{operation: LinearRecipe()})) > 0


@pytest.mark.slow
def test_fp8_logits_are_near_those_of_bf16_and_not_the_same():
    variables = jax.jit(lambda key: init_variables(key, MODEL))(jax.random.key(1))
    run = jax.jit(
        lambda v, recipe: forward(v, TOKENS, Pass(MODEL, recipe)).logits, static_argnums=1
    )
    plain, fp8 = (np.asarray(run(variables, RECIPES[name])) for name in ("bf16", "fp8_paper"))
    error = np.linalg.norm(fp8 - plain) / np.linalg.norm(plain)
    # Two layers of 3.6 % products into a residual stream; a token that changes its experts adds.
    assert 0.005 < error < 0.2


def test_a_moe_layer_saves_at_most_60_percent_of_bf16s_bytes():
    """What the forward pass hands to the backward pass, weights apart, as compiled; V3's widths."""
    config = dataclasses.replace(
        MODEL,
        hidden_size=7168,
        moe_intermediate_size=2048,
        n_routed_experts=32,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        dtype="bfloat16",
    )
    x = jax.ShapeDtypeStruct((1, 4096, config.hidden_size), jnp.bfloat16)

    def saved_bytes(recipe):
        layer = MoE(Pass(config, recipe))
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)

        def residuals(params, router, x):
            def run(params, x):
                return layer.apply({"params": params, "router": router}, x)[0]

            return jax.vjp(run, params, x)[1]

        args = (variables["params"], variables["router"], x)
        compiled = jax.jit(residuals).lower(*args).compile()
        weights = {np.prod(leaf.shape) for leaf in jax.tree.leaves(args[0])}
        of_weights = sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(jax.eval_shape(residuals, *args))
            if leaf.size in weights
        )
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.output_size_in_bytes - of_weights

    fp8, bf16 = saved_bytes(RECIPES["fp8_paper"]), saved_bytes(BF16)
    # The least that bf16 can keep: the input and what each of 8 choices of a token goes through.
    assert bf16 > 2 * 4096 * (7168 + 8 * (7168 + 2 * 2048))
    assert fp8 <= 0.6 * bf16, fp8 / bf16
