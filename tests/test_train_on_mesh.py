"""train.py and infer.py on a mesh by options alone: a run, its resumption, and what it writes."""

import json
from pathlib import Path

import numpy as np
import pytest

import infer
import train
from dsv3_jax.config import load_config
from dsv3_jax.training.manifest import steps_in
from dsv3_jax.training.restore import read_saved
from tests.fixtures.interop.tiny import hf_tensors, write_hf
from tests.helpers import write_small_run

CONFIG = """
from dsv3_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(
            vocab_size=272, hidden_size=32, num_hidden_layers=1, max_position_embeddings=64,
            bos_token_id=256, eos_token_id=257, num_attention_heads=2, q_lora_rank=16,
            kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
            rope_scaling=None, intermediate_size=32, moe_intermediate_size=16,
            first_k_dense_replace=0, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
            topk_group=1, num_nextn_predict_layers=0, dtype="float32",
        ),
        data=DataConfig(path={corpus!r}, val_fraction=0.2),
        train=TrainConfig(steps=4, batch_size=4, seq_len=24, log_every=1, eval_every=4,
                          eval_batches=1, sample_tokens=0),
        schedule=ScheduleConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=2),
    )
"""
MESH = ["--mesh.node", "2", "--mesh.local", "2", "--mesh.tensor", "2"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = write_small_run(tmp_path_factory.mktemp("config"), CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield path


def lines_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.slow
def test_a_run_on_a_mesh_resumes_bitwise_and_its_model_writes(config_file, tmp_path, capsys):
    run = tmp_path / "run"
    argv = ["--config", str(config_file), "--run-dir", str(run), *MESH]
    assert train.main(argv) == 0
    first = lines_of(run)
    assert [line["step"] for line in first] == [1, 2, 3, 4] and "val_loss" in first[-1]
    (run / "checkpoints" / "4").rename(tmp_path / "set-aside")
    assert train.main(argv) == 0
    for line, again in zip(first[2:], lines_of(run)[2:], strict=True):
        assert {k: line[k] for k in ("loss", "grad_norm")} == {
            k: again[k] for k in ("loss", "grad_norm")
        }
    assert steps_in(run / "checkpoints") == [2, 4]

    # The same text with and without a mesh.
    def said():  # after what the log of the training run still shows
        return capsys.readouterr().out.splitlines()[-1]

    argv = ["--checkpoint", str(run), "--token-ids", "256,105,109", "--max-new-tokens", "4"]
    assert infer.main([*argv, "--temperature", "0"]) == 0
    alone = said()
    assert infer.main([*argv, "--temperature", "0", *MESH]) == 0
    assert said() == alone and alone.count(",") == 3


@pytest.mark.slow
def test_a_lora_run_on_a_mesh_has_one_device_s_losses_and_resumes_bitwise(config_file, tmp_path):
    """On a frozen base in FP8 blocks, with adapters of attention and of experts."""
    model = load_config(config_file).model
    weights = write_hf(tmp_path / "hf", model, hf_tensors(model, "fp8"))
    (weights / "tokenizer.json").unlink()  # bytes, as the config says
    argv = ["--config", config_file, "--init-from", weights, "--model.dtype", "float32"]
    argv += ["--schedule.batch-start-ratio", 1, "--optimizer.learning-rate", 1e-2]
    argv += ["--lora.rank", 2, "--lora.targets", "o_proj", "experts/down_proj"]
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert train.main([*map(str, argv), "--run-dir", str(alone)]) == 0
    on_mesh = [*map(str, argv), "--run-dir", str(run), *MESH]
    assert train.main(on_mesh) == 0
    want, first = lines_of(alone), lines_of(run)
    assert want[-1]["loss"] < want[0]["loss"] - 1e-3
    for name in ("loss", "grad_norm"):
        found = [[line[name] for line in lines] for lines in (first, want)]
        np.testing.assert_allclose(*found, rtol=1e-5)
    was = (run / "checkpoints" / "4").rename(tmp_path / "set-aside")
    assert train.main(on_mesh) == 0
    for line, again in zip(first, lines_of(run), strict=True):
        assert (line["loss"], line["grad_norm"]) == (again["loss"], again["grad_norm"])
    saved = [read_saved(step)["arrays"] for step in (was, run / "checkpoints" / "4")]
    assert any(name.endswith("lora_a") for name in saved[0]) and saved[0].keys() == saved[1].keys()
    for name, array in saved[0].items():
        np.testing.assert_array_equal(array, saved[1][name])
