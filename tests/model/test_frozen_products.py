"""Products with FP8 held as bytes: those of the dequantised weight, without a copy of it."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import LoraConfig
from dsv3_jax.model import frozen_products, plain_products
from dsv3_jax.model.adapters import init_adapters
from dsv3_jax.model.fp8_weights import to_fp8_weights
from dsv3_jax.model.frozen_products import HeldAsBytes, InStack
from dsv3_jax.model.plain_products import times, times_back
from dsv3_jax.model.projection import WHOLE, Plain
from dsv3_jax.model.transformer import abstract_variables
from dsv3_jax.parallel.sharding import ONE_DEVICE
from dsv3_jax.quantization.block_scaled import (
    PER_BLOCK,
    BlockScaled,
    as_bytes,
    dequantize,
    quantize,
)
from dsv3_jax.training.loss import training_loss
from dsv3_jax.training.state import variables_of
from tests.helpers import (
    TOLERANCE,
    random_tokens,
    random_variables,
    relative_error,
    tiny_config,
    tiny_model,
)

DTYPES = [("float32", "f32_reordered"), ("bfloat16", "bf16_op")]


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def both_forms(dtype, shape, multiply):
    """Two functions of (x, dy, ...) to (product, gradient of x), of the second layer of three.

    One multiplies by it where it lies among the others, the other by it dequantised whole.
    """
    stack = quantize(normal(3, *shape), PER_BLOCK)
    held = HeldAsBytes(InStack(as_bytes(stack), jnp.int32(1)), shape)
    plain = Plain(dequantize(jax.tree.map(lambda leaf: leaf[1], stack), dtype))

    def multiplied(weight):
        def run(x, dy, *more):
            y, pull = jax.vjp(lambda x: multiply(weight, x, *more), x)
            return y, pull(dy)[0]

        return jax.jit(run)

    return multiplied(held), multiplied(plain)


@pytest.mark.parametrize("dtype, limit", DTYPES)
@pytest.mark.parametrize(
    "shape, pieces",
    [((2, 384, 256), 6), ((512, 200), 4), ((2, 40, 33), 1)],
    ids=["pair", "partial columns", "whole"],
)
def test_a_product_in_pieces(shape, pieces, dtype, limit, monkeypatch):
    monkeypatch.setattr(frozen_products, "PIECE", 128 * 256)
    x, dy = normal(2, 9, shape[-1], dtype=dtype), normal(2, 9, *shape[:-1], dtype=dtype, seed=1)

    def multiply(weight, x):
        return weight.multiply(x, None, None, WHOLE)

    held = InStack(as_bytes(quantize(normal(1, *shape), PER_BLOCK)), 0)
    assert frozen_products._Pieces(held, dtype).number == pieces
    got, want = (form(x, dy) for form in both_forms(dtype, shape, multiply))
    assert got[0].dtype == got[1].dtype == dtype
    assert relative_error(got, want) < TOLERANCE[limit]
    if pieces == 1:
        assert all(np.array_equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype, limit", DTYPES)
def test_a_grouped_product_an_expert_at_a_time(dtype, limit):
    shape, alignment = (4, 2, 24, 130), 4
    x = normal(8 * alignment, shape[-1], dtype=dtype)
    dy = normal(len(x), *shape[1:-1], dtype=dtype, seed=1)

    def multiply(weight, x, group_sizes):
        return weight.multiply_groups(x, group_sizes, alignment, None, None)

    forms = both_forms(dtype, shape, multiply)
    for sizes in ([2, 2, 2, 2], [0, 3, 0, 1], [0, 0, 0, 8], [0, 0, 0, 0]):
        group_sizes = alignment * jnp.asarray(sizes, jnp.int32)
        got, want = (form(x, dy, group_sizes) for form in forms)
        assert got[0].dtype == got[1].dtype == dtype
        assert relative_error(got, want) < TOLERANCE[limit], sizes
        used = int(group_sizes.sum())
        assert not any(np.asarray(each[used:], np.float32).any() for each in got), sizes


@pytest.mark.parametrize("columns", [1 << 15, (1 << 15) + 8], ids=["even", "left over"])
def test_a_wide_bf16_weight(columns, monkeypatch):
    """A head: more numbers than one piece has. Small integers, whose sums are exact."""
    monkeypatch.setattr(plain_products, "PIECE", 1 << 12)
    rng = np.random.default_rng(0)
    shapes = (3, 24), (columns, 24), (3, columns)
    x, weight, dy = (jnp.asarray(rng.integers(-2, 3, shape), jnp.bfloat16) for shape in shapes)
    y, pull = jax.vjp(times, x, weight)
    wide = [each.astype(jnp.float32) for each in (x, weight, dy)]
    want = wide[0] @ wide[1].T, wide[2] @ wide[1], wide[2].T @ wide[0]
    for got, exact in zip((y, *pull(dy)), want, strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.array_equal(got, exact.astype(jnp.bfloat16))
    assert np.array_equal(times_back(dy, weight), want[1].astype(jnp.bfloat16))


LORA = LoraConfig(rank=2, targets=("o_proj", "gate_proj", "up_proj", "down_proj"))


def gradient_of(model, remat):
    config = dataclasses.replace(tiny_config(model), lora=LORA)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, remat=remat))

    def loss(adapters, base, rows):
        variables = variables_of(adapters, {}, base, config)
        return training_loss(variables, rows, jnp.float32(0.3), config, ONE_DEVICE)[0]

    return jax.jit(jax.value_and_grad(loss))


def in_bytes(tree):
    return jax.tree.map(
        lambda leaf: as_bytes(leaf) if isinstance(leaf, BlockScaled) else leaf,
        tree,
        is_leaf=lambda node: isinstance(node, BlockScaled),
    )


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none", "v3"])
def test_a_model_is_the_same_with_its_base_in_bytes(remat):
    model = tiny_model(num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0)
    base = jax.jit(partial(to_fp8_weights, config=model))(random_variables(model))
    adapters = init_adapters(jax.random.key(0), model, LORA)
    adapters = jax.tree.map(lambda x: x + 0.1 * normal(*x.shape), adapters)
    run, rows = gradient_of(model, remat), random_tokens(model, 2, 10)
    (got, of_bytes), (want, of_fp8) = run(adapters, in_bytes(base), rows), run(adapters, base, rows)
    assert float(got) == pytest.approx(float(want), rel=TOLERANCE["f32_reordered"])
    assert relative_error(of_bytes, of_fp8) < TOLERANCE["f32_gradient"]


@pytest.mark.slow
def test_no_layer_is_dequantised_whole():
    """Nor cut from its stack, nor widened to float16, which XLA:CPU does with float8."""
    model = tiny_model(
        num_hidden_layers=2,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
        hidden_size=64,
        moe_intermediate_size=512,
        n_routed_experts=32,
        dtype="bfloat16",
    )
    base = jax.eval_shape(partial(to_fp8_weights, config=model), abstract_variables(model))
    base = jax.eval_shape(in_bytes, base)
    adapters = jax.eval_shape(lambda key: init_adapters(key, model, LORA), jax.random.key(0))
    rows = jax.ShapeDtypeStruct((1, 17), jnp.int32)
    compiled = gradient_of(model, "full").lower(adapters, base, rows).compile()
    of_layer = math.prod(base["params"]["moe_layers"]["mlp"]["experts"]["gate_up_proj"].shape[1:])
    widths = {"f32": 4, "bf16": 2, "f16": 2, "u8": 1, "f8e4m3fn": 1}
    made = [
        (math.prod(map(int, dims.split(","))), kind, operation)
        for kind, dims, operation in re.findall(
            r"= (\w+)\[([\d,]+)\]\S* ([\w-]+)\(", compiled.as_text()
        )
        if kind in widths
    ]
    large = [each for each in made if each[0] >= of_layer]
    assert {operation for *_, operation in large} <= {"parameter", "get-tuple-element", "bitcast"}
    in_f32 = 4 * of_layer
    assert compiled.memory_analysis().temp_size_in_bytes < in_f32 / 2
