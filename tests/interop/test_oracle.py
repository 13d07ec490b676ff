"""Logits, MTP logits, expert choices and greedy tokens agree with transformers, case by case.

The golden numbers need nothing installed. Tests marked `oracle` ask transformers itself, also about
what we export, and are skipped with the reason shown where it is not installed.
"""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax.interop.checkpoint import from_variables, open_hf
from dsv3_jax.interop.exporting import export_hf
from dsv3_jax.interop.load import load, load_hf
from dsv3_jax.interop.trace import trace
from dsv3_jax.model.transformer import forward
from tests.fixtures.interop import make
from tests.fixtures.interop.tiny import TINY, hf_tensors, write_hf

# f32 arithmetic in another order: runtimes that agree differ by up to 1e-4 in logits of std 4; a
# norm's epsilon of 1e-5 instead of 1e-6 already moves them by more than 4e-4.
LOGIT_LIMIT = 3e-4


@pytest.fixture(scope="module")
def golden():
    return np.load(make.HERE / "golden.npz", allow_pickle=False)


def expected_of(golden, name):
    prefix = name + "/"
    return {key.removeprefix(prefix): golden[key] for key in golden.files if key.startswith(prefix)}


def compare(expected, variables, config):
    """Everything the model says about two rows, and that a third row continues greedily."""
    tokens, greedy = expected["tokens"], expected["greedy"]
    length = tokens.shape[1]
    rows = np.zeros((3, len(greedy)), np.int32)
    rows[:2, :length], rows[2] = tokens, greedy  # what follows a token cannot change it
    found = trace(variables, rows, config)

    for key in [k for k in expected if "logits" in k]:
        valid = expected[key].shape[1]
        difference = np.abs(found[key][:2, :valid] - expected[key]).max()
        assert difference <= LOGIT_LIMIT, (key, difference, np.std(expected[key]))
    hidden = found["hidden"][:-1, :2, :length]
    np.testing.assert_allclose(hidden, expected["hidden"], rtol=0, atol=LOGIT_LIMIT)

    order = np.argsort(found["experts"], -1)
    experts = np.take_along_axis(found["experts"], order, -1)[:, :2, :length]
    weights = np.take_along_axis(found["weights"], order, -1)[:, :2, :length]
    np.testing.assert_array_equal(experts, expected["experts"])
    np.testing.assert_allclose(weights, expected["weights"], rtol=1e-4)

    np.testing.assert_array_equal(found["logits"][2, length - 1 : -1].argmax(-1), greedy[length:])
    return found


@pytest.mark.parametrize("name", make.CASES)
def test_model_agrees_with_the_golden_numbers(tmp_path, golden, name):
    config, tensors, _ = make.case(name)
    expected = expected_of(golden, name)
    assert make.digest(tensors) == str(expected["digest"]), "NumPy's random numbers changed"
    write_hf(tmp_path / "hf", config, tensors)
    found, variables = load_hf(tmp_path / "hf", dtype="f32")
    # Arithmetic is f32 here, whatever the storage.
    config = dataclasses.replace(found, dtype="float32")
    traced = compare(expected, variables, config)
    if name == "v3_two_mtp":
        outputs = jax.jit(forward, static_argnums=2)(variables, expected["tokens"], config)
        np.testing.assert_allclose(outputs.logits, traced["logits"][:2, :17], rtol=0, atol=1e-5)
        for depth, logits in enumerate(outputs.mtp_logits):
            mtp = traced[f"mtp_logits_{depth}"][:2, : 16 - depth]
            np.testing.assert_allclose(logits[:, : 16 - depth], mtp, rtol=0, atol=1e-5)


def transformers_or_skip(fp8: bool = False):
    pytest.importorskip("torch", reason="needs the oracle extra: torch is not installed")
    pytest.importorskip("transformers", reason="needs the oracle extra: no transformers")
    if fp8:
        pytest.importorskip("accelerate", reason="transformers reads FP8 with accelerate only")


@pytest.mark.oracle
@pytest.mark.parametrize("name", make.CASES)
def test_transformers_reads_our_export_as_we_do(tmp_path, name):
    transformers_or_skip(fp8=name == "fp8_storage")
    config, tensors, tokens = make.case(name)
    write_hf(tmp_path / "hf", config, tensors)
    checkpoint = open_hf(tmp_path / "hf")
    variables = load(checkpoint, dtype="f32")
    exported = export_hf(checkpoint, tmp_path / "out", shard_bytes=300_000)
    expected = make.transformers_outputs(exported, config, tokens)
    compare(expected | {"tokens": tokens}, variables, config)


@pytest.mark.oracle
def test_partial_fp8_blocks_are_right_in_an_f32_export(tmp_path):
    """transformers 5.23 reads partial blocks wrong, so it gets the same numbers in F32."""
    transformers_or_skip()
    tensors = hf_tensors(TINY, "fp8", 3)
    write_hf(tmp_path / "hf", TINY, tensors)
    _, variables = load_hf(tmp_path / "hf", dtype="f32")
    exported = export_hf(from_variables(variables, TINY), tmp_path / "out")
    tokens = np.arange(34, dtype=np.int32).reshape(2, 17)
    expected = make.transformers_outputs(exported, TINY, tokens)
    compare(expected | {"tokens": tokens}, variables, TINY)


@pytest.mark.oracle
def test_a_checkpoint_that_transformers_writes_loads(tmp_path):
    """Its own config form, its own file layout, and no MTP."""
    transformers_or_skip()
    import torch
    from transformers import AutoModelForCausalLM

    config, tensors, tokens = make.case("v3_two_mtp")
    write_hf(tmp_path / "hf", config, tensors)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    found, variables = load_hf(tmp_path / "theirs")
    assert found == dataclasses.replace(config, num_nextn_predict_layers=0)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    ours = forward(variables, tokens, found).logits
    assert np.abs(ours - logits).max() <= LOGIT_LIMIT
