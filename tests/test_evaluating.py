"""What `evaluate` says of a model: against the oracle's arithmetic, and what it refuses."""

import json

import numpy as np
import pytest

from dsv3_jax import cli, loading
from dsv3_jax.config import Config, UserError
from dsv3_jax.data.tokenizer import ByteTokenizer, train_tokenizer
from dsv3_jax.evaluating import Batch, measure, text_batches
from dsv3_jax.parallel.sharding import ONE_DEVICE
from tests import oracle
from tests.fixtures.interop.tiny import TINY, hf_tensors, write_hf
from tests.helpers import random_tokens, random_variables, relative_error, tiny_model

MODEL = tiny_model(num_hidden_layers=2, num_nextn_predict_layers=2)
VARIABLES = random_variables(MODEL)


def test_numbers_agree_with_the_oracle():
    ids = random_tokens(MODEL, 20)
    batches = text_batches(ids, 7, 2, pad_id=3)
    assert [b.tokens.shape for b in batches] == [(2, 8), (2, 8)]
    assert sum(int(b.counted.sum()) for b in batches) == 19
    model = loading.Model(Config(model=MODEL), ONE_DEVICE, VARIABLES)
    found = measure(model, batches, None)
    nats, hits, drafts = 0.0, np.zeros(2), np.zeros(2)
    load = np.zeros(MODEL.n_routed_experts)
    for start in range(0, 19, 7):
        row = ids[start : start + 8]
        out = oracle.forward(VARIABLES, row[:-1], MODEL)
        nats += oracle.nats(out.logits, row[1:]).sum()
        greedy = out.logits.argmax(-1)
        for depth in (1, 2):
            said = out.mtp_logits[depth - 1].argmax(-1)[: len(row) - 1 - depth]
            hits[depth - 1] += (said == greedy[depth:]).sum()
            drafts[depth - 1] += len(said)
    assert found["tokens"] == 19
    assert relative_error(np.array([found["nats_per_token"]]), np.array([nats / 19])) < 1e-5
    assert found["perplexity"] == pytest.approx(np.exp(nats / 19), rel=1e-5)
    np.testing.assert_allclose(found["mtp_accuracy"], hits / drafts, atol=1e-6)
    assert len(found["expert_load"]) == 3 and len(load) == len(found["expert_load"][0])
    assert sum(found["expert_load"][0]) == pytest.approx(1, abs=0.01)


def test_bytes_are_those_of_predicted_tokens():
    tokens = np.array([[256, *b"abc", 257]], np.int32)
    batch = Batch(tokens, np.array([[False, True, True, False, True]]))
    model = tiny_model(vocab_size=272, bos_token_id=256, eos_token_id=257)
    made = loading.Model(Config(model=model), ONE_DEVICE, random_variables(model))
    found = measure(made, [batch], ByteTokenizer())
    assert found["tokens"] == 3
    assert found["bits_per_byte"] == pytest.approx(found["bits_per_token"] * 3 / 2)
    with pytest.raises(ValueError, match="no token counts"):
        measure(made, [batch._replace(counted=np.zeros((1, 5), bool))], None)


def test_the_command_reads_a_folder_and_a_text(tmp_path, capsys):
    import dataclasses

    config = dataclasses.replace(TINY, vocab_size=320, bos_token_id=0, eos_token_id=1)
    folder = write_hf(tmp_path / "hf", config, hf_tensors(config, "bf16"))
    train_tokenizer(["some words of text " * 9], 300, folder / "tokenizer.json")
    (tmp_path / "text.txt").write_text("some words of text, and more of them")
    argv = ["evaluate", "--checkpoint", folder, "--text", tmp_path / "text.txt"]
    argv += ["--seq-len", 16, "--batch-size", 2, "--json", tmp_path / "out.json"]
    cli.main([*map(str, argv)])
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert f"{found['bits_per_byte']:.4f}" in said and "max_vio" in said
    assert found["nats_per_token"] > 0 and len(found["mtp_accuracy"]) == 1
    with pytest.raises(UserError, match="either --text FILE or --data"):
        cli.main(["evaluate", "--checkpoint", str(folder)])
    with pytest.raises(UserError, match="exceeds the model's 512"):
        cli.main([*map(str, argv[:5]), "--seq-len", "1024"])
    with pytest.raises(UserError, match="--json"):  # before anything is computed
        cli.main([*map(str, argv[:-1]), str(tmp_path / "nowhere" / "out.json")])
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(UserError, match="is empty"):
        cli.main([*map(str, argv)])
