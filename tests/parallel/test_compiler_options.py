"""What XLA rounds float32 to, who is told, and who asks it not to."""

from functools import partial

import jax
import numpy as np
import pytest

from dsv3_jax.config import Config
from dsv3_jax.interop import trace
from dsv3_jax.notebook import _multiply_exactly
from dsv3_jax.parallel.compiler_options import rounded_operands, rounding_line
from dsv3_jax.training.banner import banner
from dsv3_jax.training.state import init_state
from tests.helpers import tiny_model


@pytest.mark.parametrize(
    "platform, dtype, rounded",
    [
        ("gpu", "float32", "TF32"),
        ("tpu", "float32", "bfloat16"),
        ("gpu", "bfloat16", None),
        ("cpu", "float32", None),
    ],
)
def test_what_float32_is_multiplied_as(platform, dtype, rounded):
    assert rounded_operands(platform, dtype) == rounded
    line = rounding_line(platform, dtype)
    assert line is None if rounded is None else f"XLA rounds to {rounded}" in str(line)
    with jax.default_matmul_precision("highest"):  # as the environment or a caller says
        assert rounded_operands(platform, dtype) is None


@pytest.mark.parametrize("backend, told", [("gpu", 1), ("cpu", 0)])
def test_a_run_says_so(backend, told, monkeypatch):
    config = Config(model=tiny_model(dtype="float32"))
    abstract = jax.eval_shape(partial(init_state, config=config), jax.random.key(0))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    lines = [line for line in banner(config, abstract) if line.startswith("products    of float32")]
    assert len(lines) == told


@pytest.mark.parametrize("dtype, precision", [("float32", "highest"), ("bfloat16", None)])
def test_numbers_to_compare_are_made_exactly(dtype, precision, monkeypatch):
    def seen(variables, tokens, config):
        return {"is": np.array(str(jax.config.jax_default_matmul_precision))}

    monkeypatch.setattr(trace, "_trace", seen)
    found = trace.trace({}, np.zeros((1, 4), np.int32), tiny_model(dtype=dtype))
    assert found["is"] == str(precision)


@pytest.mark.parametrize("platform, told", [("gpu", True), ("cpu", False)])
def test_a_notebook_multiplies_exactly_on_every_device(platform, told, capsys):
    before = jax.config.jax_default_matmul_precision
    try:
        _multiply_exactly(jax, platform)
        assert jax.config.jax_default_matmul_precision == ("highest" if told else before)
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert ("XLA would take TF32" in capsys.readouterr().out) == told
