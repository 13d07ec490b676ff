"""Weights held as FP8: the same numbers as a checkpoint's, half of BF16's bytes, near tokens."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.weights import WEIGHTS
from dsv3_jax.inference.generate import generate
from dsv3_jax.model.fp8 import fp8_linear
from dsv3_jax.model.fp8_weights import (
    FP8Weight,
    describe_weights,
    to_fp8_weights,
)
from dsv3_jax.model.linear import grouped_linear, linear
from dsv3_jax.model.transformer import abstract_variables, forward
from dsv3_jax.quantization.block_scaled import PER_BLOCK, BlockScaled, dequantize, quantize
from dsv3_jax.quantization.recipe import LinearRecipe
from tests.helpers import random_tokens, random_variables, tiny_model

# An activation of random numbers in E4M3: 2.6 %, and BF16's rounding of the result.
E4M3_ONCE = 0.03


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def hold(weight, rows=1, columns=1):
    """The weight [*lead, *rows, *columns] quantised as a published matrix."""
    shape = weight.shape
    lead = shape[: len(shape) - rows - columns]
    size = math.prod(shape[len(lead) : len(lead) + rows])
    return FP8Weight(quantize(weight.reshape(*lead, size, -1), PER_BLOCK), shape)


def relative(got, expected):
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def dequantized(variables, abstract):
    """The variables with BlockScaled leaves dequantised, in the shapes of parameters."""
    return jax.tree.map(
        lambda leaf, wanted: (
            dequantize(leaf, jnp.float32).reshape(wanted.shape)
            if isinstance(leaf, BlockScaled)
            else leaf
        ),
        variables,
        abstract,
        is_leaf=lambda node: isinstance(node, BlockScaled),
    )


@pytest.fixture(scope="module")
def model():
    """A tiny model whose matrices span several blocks, some of them partial.

    Every token takes all experts: a choice that tips would be no error of the format.
    """
    return tiny_model(
        hidden_size=200,
        moe_intermediate_size=140,
        intermediate_size=160,
        n_routed_experts=4,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
    )


@pytest.fixture(scope="module")
def variables(model):
    return random_variables(dataclasses.replace(model, initializer_range=0.08))


@pytest.fixture(scope="module")
def held(model, variables):
    return to_fp8_weights(variables, model)


@pytest.mark.parametrize("shape", [(70, 200), (3, 50, 200)])
def test_a_held_weight_multiplies_as_the_training_recipe_does(shape):
    """Bit for bit: the same tiles, the same scales, the same product."""
    x, weight = normal((2, 5, 200), 0), normal(shape, 1)
    held = hold(weight, rows=len(shape) - 1)
    assert linear(x, held).shape == (2, 5, *shape[:-1])
    np.testing.assert_array_equal(linear(x, held), fp8_linear(x, weight, LinearRecipe()))


def test_gate_and_up_do_not_share_blocks():
    x, weight = normal((7, 96), 2), normal((2, 140, 96), 3)
    weight = weight.at[1, 0].multiply(1e4)  # would drown gate's last rows in a shared block
    held = hold(weight)
    y = linear(x, held)
    assert y.shape == (7, 2, 140)
    exact = jnp.einsum("tk,pnk->tpn", x, held.astype(jnp.float32))
    assert relative(y[:, 0], exact[:, 0]) < E4M3_ONCE
    assert relative(held.astype(jnp.float32)[0], weight[0]) < E4M3_ONCE


@pytest.mark.parametrize("alignment", [4, 64])
def test_each_group_of_rows_meets_its_own_held_weights(alignment):
    sizes = jnp.asarray([64, 0, 128], jnp.int32)
    rows, weights = normal((256, 96), 4), normal((3, 2, 20, 96), 5)
    held = hold(weights)
    y = jax.jit(partial(grouped_linear, alignment=alignment))(rows, held, sizes)
    expert = np.repeat([0, 2], [64, 128])
    exact = jnp.einsum("tk,tpnk->tpn", rows[:192], held.astype(jnp.float32)[expert])
    assert y.shape == (256, 2, 20)
    assert relative(y[:192], exact) < E4M3_ONCE
    np.testing.assert_array_equal(y[192:], 0)


def test_what_is_held_is_what_v3_published_in_fp8(held):
    def names(tree, keep):
        is_leaf = lambda node: isinstance(node, BlockScaled)  # noqa: E731
        found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
        return {path[-1].key for path, leaf in found if keep(leaf)}

    fp8 = names(held, lambda leaf: isinstance(leaf, BlockScaled))
    published = {row.name for row in WEIGHTS if row.fp8}
    assert fp8 == published - {"q_proj"}  # this model compresses queries
    assert not fp8 & names(held, lambda leaf: not isinstance(leaf, BlockScaled))


@pytest.fixture(scope="module")
def run(model):
    return jax.jit(lambda variables, tokens: forward(variables, tokens, model))


@pytest.fixture(scope="module")
def plain(variables, held):
    """The same numbers in BF16's place: dequantised, so that products are not in FP8."""
    return dequantized(held, variables)


@pytest.mark.slow
def test_logits_are_near_those_of_the_dequantised_weights(model, held, plain, run):
    """The only difference is the activations' quantisation, some 2.6 % a product."""
    tokens = random_tokens(model, 4, 12)
    got, wanted = run(held, tokens), run(plain, tokens)
    for logits, exact in zip((got.logits, *got.mtp_logits), (wanted.logits, *wanted.mtp_logits)):
        assert 0.005 < relative(logits, exact) < 0.15, relative(logits, exact)


@pytest.mark.slow
def test_tokens_are_those_of_the_dequantised_weights_but_for_near_ties(model, held, plain, run):
    """Where greedy choices part, the other token's logit lies within the format's error."""
    prompts = random_tokens(model, 4, 6)
    ours, theirs = (
        np.stack(list(generate(v, prompts.tolist(), model, max_new_tokens=6)), 1)
        for v in (held, plain)
    )
    logits = np.asarray(run(plain, np.concatenate([prompts, theirs], 1)).logits)
    same = 0
    for row, our, their in zip(logits, ours, theirs):
        parted = np.flatnonzero(our != their)
        first = parted[0] if len(parted) else len(our)
        same += first
        if len(parted):
            row = row[prompts.shape[1] - 1 + first]
            assert row[their[first]] - row[our[first]] < 0.3 * row.std()
    assert same >= 12, (ours, theirs)  # half of them and more, or something is wrong


def test_they_take_half_of_bf16s_bytes_at_v3s_shapes():
    """A MoE layer of V3 with 4 experts, by shapes alone."""
    config = dataclasses.replace(
        ModelConfig(), num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=16,
        num_nextn_predict_layers=0, vocab_size=1024,
    )  # fmt: skip
    variables = abstract_variables(config)
    held = jax.eval_shape(partial(to_fp8_weights, config=config), variables)
    layer = jax.tree.leaves(held["params"]["moe_layers"])
    held_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in layer)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]["moe_layers"]))
    assert 1 < held_bytes / numbers < 1.003  # a scale for 16,384 numbers, and the gate in f32


def test_the_line_about_memory_counts_bytes(held):
    nodes = jax.tree.leaves(held)
    assert f"{sum(node.nbytes for node in nodes) / 1e6:,.1f} MB" in describe_weights(held)
    fp8 = sum(
        node.nbytes
        for node in jax.tree.leaves(held, is_leaf=lambda node: isinstance(node, BlockScaled))
        if isinstance(node, BlockScaled)
    )
    assert f"{fp8 / 1e6:,.1f} MB of them FP8" in describe_weights(held)
