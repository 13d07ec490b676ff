"""train.py as two processes over gloo: killed, stopped, resumed, and equal to one process."""

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import train
from tests.helpers import TOLERANCE

ROOT = Path(__file__).parent.parent
STEPS = 14

CONFIG = """
from dsv3_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(
            vocab_size=272, hidden_size=16, num_hidden_layers=1, max_position_embeddings=32,
            bos_token_id=256, eos_token_id=257, num_attention_heads=2, q_lora_rank=None,
            kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
            rope_scaling=None, moe_intermediate_size=16, first_k_dense_replace=0,
            n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
            num_nextn_predict_layers=0, dtype="float32",
        ),
        mesh=ParallelConfig(node=2, local=2),
        data=DataConfig(path={corpus!r}, val_fraction=0.2),
        train=TrainConfig(steps={steps}, batch_size=8, micro_batch_size=4, seq_len=16, log_every=1,
                          eval_every=1000, eval_batches=1, sample_tokens=1),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=4),
        distributed=DistributedConfig(heartbeat_timeout=5, start_timeout=60),
    )
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(12):
        text = f"Document {number}. " + "The quick brown fox jumps over the lazy dog. " * 20
        (corpus / f"{number}.txt").write_text(text)
    path = folder / "small.py"
    path.write_text(CONFIG.format(corpus=str(corpus), steps=STEPS))
    return path


class Pair:
    """Two processes of two virtual devices each; they end with the `with` block."""

    def __init__(self, config_file: Path, run: Path, *second: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XDG_CACHE_HOME": str(config_file.parent / "cache"),
        }
        if importlib.metadata.version("jaxlib").startswith("0.10."):
            # As in conftest.py; the step of two processes is not cached: 7 s instead of 17.
            environment["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
        self.run = run
        self.processes, self.outputs = [], []
        for index in range(2):
            argv = [sys.executable, "train.py", "--config", config_file, "--run-dir", run]
            argv += ["--devices", "2", "--distributed.coordinator", f"127.0.0.1:{port}"]
            argv += ["--distributed.num-processes", "2", "--distributed.process-id", str(index)]
            argv += second if index else ()
            output = (config_file.parent / f"{run.name}.{index}.{time.monotonic()}").open("w+")
            self.outputs.append(output)
            self.processes.append(
                subprocess.Popen(
                    list(map(str, argv)), cwd=ROOT, env=environment, stdout=output, stderr=output
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process, output in zip(self.processes, self.outputs, strict=True):
            process.kill()
            process.wait()
            output.close()

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 90
        while not any(line["step"] >= step for line in lines_of(self.run)):
            assert time.monotonic() < deadline and not self.ended(), self.said()
            time.sleep(0.02)

    def ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def exit_codes(self, seconds: float) -> list[int]:
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(deadline - time.monotonic(), 0.01)) for p in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.said()}")

    def said(self) -> str:
        for output in self.outputs:
            output.flush()
        return "\n".join(f"--- {Path(o.name).read_text()}" for o in self.outputs)


def lines_of(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def losses_of(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines_of(run) if "loss" in line}


def test_killed_stopped_and_resumed_it_ends_as_one_process_does(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(config_file.parent / "cache"))
    run = tmp_path / "pair"
    with Pair(config_file, run) as pair:
        pair.wait_for_step(6)
        pair.processes[1].kill()
        killed = time.monotonic()
        codes = pair.exit_codes(40)
        assert codes[1] == -signal.SIGKILL
        assert codes[0] != 0, pair.said()
        print(f"the other ended {time.monotonic() - killed:.1f} s later with {codes[0]}")
    with Pair(config_file, run) as pair:
        pair.wait_for_step(8)
        pair.processes[1].send_signal(signal.SIGTERM)
        assert pair.exit_codes(40) == [143, 143], pair.said()
    stopped_at = lines_of(run)[-1]["step"]
    assert (run / "checkpoints" / str(stopped_at) / "MANIFEST.json").exists()
    with Pair(config_file, run) as pair:
        assert pair.exit_codes(90) == [0, 0], pair.said()
        assert f"resumed from the checkpoint of step {stopped_at}" in pair.said()
    assert train.main(["--config", str(config_file), "--run-dir", str(tmp_path / "one")]) == 0
    together, alone = losses_of(run), losses_of(tmp_path / "one")
    assert together.keys() == alone.keys() == set(range(1, STEPS + 1))
    for step, loss in alone.items():
        assert abs(together[step] - loss) <= TOLERANCE["f32_model"] * loss, step
    assert (run / "log.1.txt").exists() and (run / "sample.txt").exists()


def test_a_process_with_another_config_is_named_and_both_end(config_file, tmp_path):
    with Pair(config_file, tmp_path / "run", "--optimizer.learning-rate", "0.5") as pair:
        assert pair.exit_codes(60) == [2, 2], pair.said()
        said = pair.said()
    assert said.count("optimizer.learning_rate is 0.5 on process 1, 0.01 on process 0") == 2
