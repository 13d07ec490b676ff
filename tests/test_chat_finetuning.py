"""A base model learns some conversations, and answers each of them word for word."""

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
# The rate falls, so that no late step undoes what was learned: at 1e-2 throughout, one does.
HOW = """--config configs/finetune.py --train.seq-len 96 --optimizer.learning-rate 1e-2
    --schedule.decay-start 0.4 --schedule.decay-end 0.95
    --schedule.bias-update-speed 0 --train.eval-every 80"""


def here(script: str, *argv: str) -> None:
    """A command in this process, where XLA does not optimise: for small models."""
    main = {"train.py": train.main, "infer.py": infer.main, "-m dsv3_jax": cli.main}[script]
    assert not main(list(argv))


def apart(script: str, *argv: str) -> None:
    """In a process of its own, with a device for each core, as users have it: for many steps."""
    subprocess.run([sys.executable, *script.split(), *argv], cwd=ROOT, check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("run", [here, apart], ids=["small", "default run"])
def test_answers_are_written_word_for_word(run, tmp_path, capfd, monkeypatch):
    base, data, tuned = (str(tmp_path / name) for name in ("base", "data", "tuned"))
    # The small model learns half of them: what a step costs is tokens, where XLA does not optimise.
    talks, steps = (dict([*TALKS.items()][:4]), 60) if run is here else (TALKS, 80)
    small = []
    if run is here:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        small = ["--config", str(write_small_run(tmp_path, BASE))]
    run("train.py", *small, "--run-dir", base)
    chat = tmp_path / "chat.jsonl"
    with chat.open("w") as file:
        for question, answer in talks.items():
            turns = [{"role": "user", "content": question}]
            turns.append({"role": "assistant", "content": answer})
            file.write(json.dumps({"messages": turns}) + "\n")
    run("-m dsv3_jax", "prepare", str(chat), "--out", data, "--tokenizer", base)
    weights = ["--init-from", base, "--data.path", data, "--run-dir", tuned]
    length = ["--train.steps", str(steps), "--train.batch-size", str(len(talks))]
    run("train.py", *HOW.split(), *length, *weights)
    capfd.readouterr()

    prompts = [word for question in talks for word in ("--prompt", question)]
    how = ["--temperature", "0", "--max-new-tokens", "40"]
    run("infer.py", "--checkpoint", tuned, "--chat", *prompts, *how)
    said = capfd.readouterr().out
    assert said == "".join(f"--- {i}\n{text}\n" for i, text in enumerate(talks.values()))
