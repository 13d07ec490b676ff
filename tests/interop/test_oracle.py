"""Logits, MTP logits, expert choices and greedy tokens agree with transformers, case by case.

The golden numbers need nothing installed. Tests marked `oracle` ask transformers itself, also about
what we export, and are skipped with the reason shown where it is not installed.
"""

import dataclasses
import json

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


# Another file form of the same network: (fields that differ from TINY, what its config.json says
# and, as None, does not say).
FORMS = {
    "v3 without router keys": (
        {"n_routed_experts": 16, "n_group": 8, "topk_group": 4},
        {"n_group": None, "topk_group": None, "routed_scaling_factor": None},
    ),
    "v3 without norm_topk_prob": ({}, {"norm_topk_prob": None, "scoring_func": None}),
    "glm4_moe_lite": (
        {"rope_scaling": None, "rms_norm_eps": 1e-5, "eos_token_id": (3, 5)},
        {"model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"]},
    ),
    "glm4_moe_lite without router keys": (
        {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8, "rope_theta": 1e6},
        {"model_type": "glm4_moe_lite", "n_group": None, "topk_group": None}
        | {"routed_scaling_factor": None, "first_k_dense_replace": None},
    ),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", FORMS)
def test_a_file_form_means_what_transformers_makes_of_it(tmp_path, name):
    transformers_or_skip()
    fields, says = FORMS[name]
    config = dataclasses.replace(TINY, num_nextn_predict_layers=0, **fields)
    folder = write_hf(tmp_path / "hf", config, hf_tensors(config, "f32", 5))
    values = json.loads((folder / "config.json").read_text()) | says
    values = {key: value for key, value in values.items() if key not in says or value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 17)).astype(np.int32)
    found, variables = load_hf(folder)
    assert found == config
    expected = make.transformers_outputs(folder, config, tokens)
    traced = compare(expected | {"tokens": tokens}, variables, found)
    assert np.abs(traced["logits"][:2, :17] - expected["logits"]).max() <= 1e-4
