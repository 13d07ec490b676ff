"""A base model learns eight conversations, and answers each of them word for word."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import infer
import train
from dsv3_jax import cli
from tests.helpers import write_small_run

ROOT = Path(__file__).parent.parent
BASE = """
from dsv3_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(
            vocab_size=320, hidden_size=64, num_hidden_layers=2, max_position_embeddings=256,
            bos_token_id=0, eos_token_id=1, num_attention_heads=4, q_lora_rank=32,
            kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
            rope_scaling=None, intermediate_size=128, moe_intermediate_size=32,
            first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
            topk_group=1, num_nextn_predict_layers=1, initializer_range=0.06, dtype="float32",
        ),
        data=DataConfig(path={corpus!r}, tokenizer="bpe:320", val_fraction=0.2),
        train=TrainConfig(steps=10, batch_size=8, seq_len=64, sample_tokens=0),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        schedule=ScheduleConfig(warmup_steps=2, batch_start_ratio=1.0),
    )
"""
TALKS = {
    "Who jumps over the dog?": "The quick brown fox.",
    "And who lies there?": "The dog, which is lazy.",
    "What colour is the fox?": "Brown, as foxes are.",
    "How many documents are there?": "Twelve.",
    "What is the number of the last one?": "11, counted from 0.",
    "Is the dog quick?": "No; the fox is.",
    "May I go?": "Yes, you may go now.",
    "Say nothing.": "...",
}
HOW = """--config configs/finetune.py --train.steps 80 --train.batch-size 8 --train.seq-len 96
    --optimizer.learning-rate 1e-2 --schedule.bias-update-speed 0 --train.eval-every 80"""


@pytest.mark.parametrize(
    "default", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["small", "default run"]
)
def test_answers_are_written_word_for_word(default, tmp_path, capsys, monkeypatch):
    base, data, tuned = (str(tmp_path / name) for name in ("base", "data", "tuned"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if default:  # in a process of its own: it has a virtual device for each core
        subprocess.run([sys.executable, "train.py", "--run-dir", base], cwd=ROOT, check=True)
    else:
        config = str(write_small_run(tmp_path, BASE))
        assert train.main(["--config", config, "--run-dir", base]) == 0
    chat = tmp_path / "chat.jsonl"
    with chat.open("w") as file:
        for question, answer in TALKS.items():
            turns = [{"role": "user", "content": question}]
            turns.append({"role": "assistant", "content": answer})
            file.write(json.dumps({"messages": turns}) + "\n")
    cli.main(["prepare", str(chat), "--out", data, "--tokenizer", base])
    argv = [*HOW.split(), "--init-from", base, "--data.path", data, "--run-dir", tuned]
    assert train.main(argv) == 0
    capsys.readouterr()

    prompts = [word for question in TALKS for word in ("--prompt", question)]
    argv = ["--checkpoint", tuned, "--chat", *prompts]
    assert infer.main([*argv, "--temperature", "0", "--max-new-tokens", "40"]) == 0
    said = capsys.readouterr().out
    assert said == "".join(f"--- {i}\n{text}\n" for i, text in enumerate(TALKS.values()))
