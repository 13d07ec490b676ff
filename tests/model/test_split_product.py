"""float32 products by BF16 pieces are as near the exact product as float32's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import backend
from dsv3_jax.model.split_product import MANY_ROWS, by_pieces, f32_product, pieces

ROWS, INNER, EXPERTS = 40, 1000, 24


def operands():
    random = np.random.default_rng(5)
    x = jnp.asarray(random.standard_normal((ROWS, INNER)), jnp.bfloat16)
    weight = jnp.asarray(random.standard_normal((EXPERTS, INNER)), jnp.float32)
    d_y = jnp.asarray(1e-6 * random.standard_normal((ROWS, EXPERTS)), jnp.float32)
    return x, weight, d_y


def error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def exactly(x, weight, d_y):
    x, weight, d_y = (np.asarray(a, np.float64) for a in (x, weight, d_y))
    return x @ weight.T, d_y @ weight, d_y.T @ x


def test_pieces_are_the_number():
    x = jnp.asarray(np.random.default_rng(1).standard_normal(10_000) * 1e3, jnp.float32)
    found = jax.jit(pieces)(x)
    assert all(piece.dtype == jnp.bfloat16 for piece in found)
    wide = [np.asarray(piece, np.float64) for piece in found]
    np.testing.assert_array_equal(sum(wide), np.asarray(x, np.float64))
    assert error(wide[0], x) > 1e-3, "one piece would not do"


def test_as_near_as_float32():
    x, weight, d_y = operands()
    y, pull_back = jax.vjp(by_pieces, x, weight)
    d_x, d_weight = jax.jit(pull_back)(d_y)
    assert y.dtype == d_weight.dtype == jnp.float32 and d_x.dtype == jnp.bfloat16
    want, want_x, want_weight = exactly(x, weight, d_y)
    assert error(y, want) < 3e-7 and error(d_weight, want_weight) < 3e-7
    # Rounded once to BF16, from numbers of 16 bits.
    rounded = np.asarray(jnp.asarray(want_x, jnp.bfloat16), np.float64)
    assert error(d_x, rounded) < 3e-4
    assert error(d_x, want_x) < 1.01 * error(rounded, want_x)
    # Two pieces of the weight are not enough for its product.
    two = sum(np.asarray(piece, np.float64) for piece in pieces(weight)[:2])
    assert error(np.asarray(x, np.float64) @ two.T, want) > 1e-6


@pytest.mark.parametrize(
    "platform, rows, dtype, split",
    [
        ("gpu", MANY_ROWS, jnp.bfloat16, True),
        ("gpu", MANY_ROWS - 1, jnp.bfloat16, False),
        ("gpu", MANY_ROWS, jnp.float32, False),
        ("cpu", MANY_ROWS, jnp.bfloat16, False),
    ],
)
def test_where_it_pays(monkeypatch, platform, rows, dtype, split):
    monkeypatch.setattr(backend, "platform", lambda: platform)
    shapes = jax.ShapeDtypeStruct((rows, 256), dtype), jax.ShapeDtypeStruct((8, 256), jnp.float32)
    program = str(jax.make_jaxpr(lambda *operands: f32_product(*operands))(*shapes))
    assert ("reduce_precision" in program) == split
