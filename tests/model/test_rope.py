"""Rotary positions, YaRN and the softmax scale, against published numbers and the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels import backend
from dsv3_jax.model.rope import (
    apply_rope,
    rope_frequencies,
    rope_tables,
    rotate_heads,
    softmax_scale,
)
from tests import oracle
from tests.helpers import TOLERANCE, relative_error, tiny_model

V3 = ModelConfig()


def test_softmax_scale_of_v3():
    """DeepSeek-V3:inference/model.py: 192**-0.5, times 1.3688879 squared with YaRN."""
    assert softmax_scale(ModelConfig(rope_scaling=None)) == pytest.approx(0.0721688, abs=5e-8)
    assert softmax_scale(V3) == pytest.approx(0.1352338, abs=5e-8)


def test_yarn_keeps_pairs_up_to_10_and_slows_pairs_from_23():
    plain = rope_frequencies(ModelConfig(rope_scaling=None))
    ratio = rope_frequencies(V3) / plain
    assert ratio[:11] == pytest.approx(1.0)
    assert ratio[23:] == pytest.approx(1 / 40)
    assert ratio[11] < 1 and ratio[22] > 1 / 40
    # Linear in between: pair j is interpolated by (j - 10) / 13.
    share = (np.arange(11, 23) - 10) / 13
    assert ratio[11:23] == pytest.approx(1 - share * (1 - 1 / 40), rel=1e-6)


@pytest.mark.parametrize("config", [V3, ModelConfig(rope_scaling=None), tiny_model()])
def test_frequencies_equal_the_oracle(config):
    want = oracle.rope_frequencies(config)
    assert rope_frequencies(config) == pytest.approx(want, rel=1e-6)


def test_pairs_are_interleaved():
    """Dims (2j, 2j + 1) turn together, the convention of the published weights."""
    config = tiny_model()
    x = np.random.default_rng(0).normal(size=(1, 5, 3, 4)).astype(np.float32)
    positions = jnp.array([[0, 1, 7, 300, 60000]])
    got = apply_rope(jnp.asarray(x), *rope_tables(positions, config))
    # f32 angles: position 60,000 has an error of 60,000 * 6e-8 rad.
    frequencies = np.float64(rope_frequencies(config))
    want = np.zeros(x.shape)
    for t, position in enumerate(np.asarray(positions)[0]):
        for n in range(3):
            want[0, t, n] = oracle.rotate(np.float64(x[0, t, n]), int(position), frequencies)
    assert relative_error(got[:, :4], want[:, :4]) < 10 * TOLERANCE["f32_op"]
    assert relative_error(got[:, 4:], want[:, 4:]) < 1e-2
    np.testing.assert_array_equal(got[0, 0], x[0, 0])


def test_logits_depend_on_the_distance_alone():
    config = tiny_model()
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 4)), jnp.float32) for _ in range(2))

    def logit(q_at, k_at):
        turned = [
            apply_rope(x, *rope_tables(jnp.array([[at]]), config))
            for x, at in ((q, q_at), (k, k_at))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert logit(20, 13) == pytest.approx(logit(7, 0), abs=1e-5)
    assert logit(20, 13) != pytest.approx(logit(7, 1), abs=1e-3)


def test_bf16_inputs_are_turned_in_f32():
    """bf16 angles would turn position 257 as 256: 0.8 rad wrong in the first pair at full speed."""
    config = tiny_model(rope_scaling=None)
    x = jnp.ones((1, 1, 4), jnp.bfloat16)
    got = apply_rope(x, *rope_tables(jnp.array([[257]]), config))
    want = oracle.rotate(np.ones(4), 257, oracle.rope_frequencies(config))
    assert got.dtype == jnp.bfloat16
    assert relative_error(got[0, 0], want) < TOLERANCE["bf16_op"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_heads_are_turned_in_place(dtype, monkeypatch):
    """As both parts put together, which CPUs do, and so are gradients."""
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    config = tiny_model()
    q, d_q = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 10), dtype)
    tables = rope_tables(jnp.array([[0, 1, 2, 3, 4], [7, 8, 300, 0, 1]]), config)

    def put_together(q):
        return jnp.concatenate([q[..., :6], apply_rope(q[..., 6:], *tables)], axis=-1)

    for function in (put_together, lambda q: rotate_heads(q, *tables)):
        out, pull_back = jax.vjp(function, q)
        (gradient,) = pull_back(d_q)
        if function is put_together:
            wanted = out, gradient
    limit = TOLERANCE["f32_op" if dtype == jnp.float32 else "bf16_op"]
    np.testing.assert_array_equal(out, wanted[0])
    assert out.dtype == gradient.dtype == dtype
    assert relative_error(gradient, wanted[1]) < limit
    np.testing.assert_array_equal(gradient[..., :6], d_q[..., :6])
