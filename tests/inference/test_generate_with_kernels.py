"""Generation as a Hopper GPU runs it, interpreted: attention for the prompt, then latent decode."""

import jax
import numpy as np
import pytest

from dsv3_jax.inference.generate import generate
from dsv3_jax.kernels import backend, hopper
from tests.helpers import random_tokens, random_variables, tiny_model
from tests.kernels.conftest import INTERPRETER_IS_NEWER

# V3's widths of a head and of the cache, which the kernels are made for; little else.
CONFIG = tiny_model(
    num_hidden_layers=1,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    dtype="bfloat16",
)
PROMPTS = [row[:n].tolist() for row, n in zip(random_tokens(CONFIG, 2, 9), (9, 3), strict=True)]


@INTERPRETER_IS_NEWER
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="stands in for a GPU")
def test_kernels_by_default_write_the_tokens_of_the_reference(monkeypatch):
    variables = random_variables(CONFIG)

    def tokens():
        return np.stack(list(generate(variables, PROMPTS, CONFIG, max_new_tokens=2)), 1)

    want = tokens()
    monkeypatch.setattr(backend, "_choices", {})
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 2)
    with hopper.interpreting():
        np.testing.assert_array_equal(tokens(), want)
    ran = {choice.op: choice.implementation for choice in backend.choices()}
    assert ran == {"attention": "pallas_gpu", "mla_decode": "pallas_gpu"}
