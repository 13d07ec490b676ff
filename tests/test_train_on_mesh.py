"""train.py and infer.py on a mesh by options alone: a run, its resumption, and what it writes."""

import json
from pathlib import Path

import pytest

import infer
import train
from dsv3_jax.training.manifest import steps_in
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
