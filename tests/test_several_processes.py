"""Two processes over gloo: killed, resumed, equal to one; stopped together; in disagreement."""

import importlib.metadata
import json
import os
import re
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
        distributed=DistributedConfig(heartbeat_timeout=20, start_timeout=60),
    )
"""


# A loop of steps that do nothing but ask whether to stop.
LOOP = """
import sys, time
from dsv3_jax import cli
from dsv3_jax.config import DistributedConfig
from dsv3_jax.parallel import hosts
from dsv3_jax.training.stopping import StopRequest

def main(argv):
    cli.use_virtual_devices(2)
    hosts.start(DistributedConfig(argv[0], 2, int(argv[1])))
    with StopRequest() as stop:
        for step in range(10_000):
            stop.poll()
            if stop.requested:
                print("stopped at", step)
                return stop.exit_code
            print("step", step, flush=True)
            time.sleep(0.01)

cli.run_command(main)
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
    """Two processes of two virtual devices each, which end with the `with` block."""

    def __init__(self, folder: Path, *commands: list[object]):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        if importlib.metadata.version("jaxlib").startswith("0.10."):
            environment["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"  # as in conftest.py
        self.outputs = [
            (folder / f"{time.monotonic()}.{i}").open("w+") for i in range(len(commands))
        ]
        self.processes = [
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
            )
            for command, output in zip(commands, self.outputs, strict=True)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process, output in zip(self.processes, self.outputs, strict=True):
            process.kill()
            process.wait()
            output.close()

    def wait_for(self, happened) -> None:
        deadline = time.monotonic() + 120
        while not happened():
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

    def said(self, index: int | None = None) -> str:
        texts = [Path(output.name).read_text() for output in self.outputs]
        return "\n---\n".join(texts) if index is None else texts[index]


def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def train_pair(config_file: Path, run: Path, *options_of_second: str) -> Pair:
    coordinator, commands = address(), []
    for index in range(2):
        command = ["train.py", "--config", config_file, "--run-dir", run, "--devices", "2"]
        command += ["--distributed.coordinator", coordinator, "--distributed.num-processes", "2"]
        command += ["--distributed.process-id", index]
        commands.append(command + list(options_of_second if index else ()))
    return Pair(config_file.parent, *commands)


def lines_of(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def losses_of(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines_of(run) if "loss" in line}


def test_killed_and_resumed_it_ends_as_one_process_does(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(config_file.parent / "cache"))
    run = tmp_path / "pair"
    with train_pair(config_file, run) as pair:
        pair.wait_for(lambda: any(line["step"] >= 6 for line in lines_of(run)))
        pair.processes[1].kill()
        killed = time.monotonic()
        codes = pair.exit_codes(60)
        assert codes[1] == -signal.SIGKILL
        assert codes[0] != 0, pair.said()
        print(f"the other ended {time.monotonic() - killed:.1f} s later with {codes[0]}")
    saved = max(int(path.parent.name) for path in run.glob("checkpoints/*/MANIFEST.json"))
    with train_pair(config_file, run) as pair:
        assert pair.exit_codes(120) == [0, 0], pair.said()
        assert f"resumed from the checkpoint of step {saved}" in pair.said(0)
    assert train.main(["--config", str(config_file), "--run-dir", str(tmp_path / "one")]) == 0
    together, alone = losses_of(run), losses_of(tmp_path / "one")
    assert together.keys() == alone.keys() == set(range(1, STEPS + 1))
    for step, loss in alone.items():
        assert abs(together[step] - loss) <= TOLERANCE["f32_model"] * loss, step
    assert (run / "log.1.txt").exists() and (run / "sample.txt").exists()


def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path):
    script, coordinator = tmp_path / "loop.py", address()
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{LOOP}")
    with Pair(tmp_path, *([script, coordinator, index] for index in range(2))) as pair:
        pair.wait_for(lambda: "step 5\n" in pair.said(0))
        pair.processes[1].send_signal(signal.SIGTERM)
        assert pair.exit_codes(30) == [143, 143], pair.said()
        stops = [re.search(r"stopped at (\d+)", pair.said(index)) for index in range(2)]
    assert stops[0] and stops[1] and stops[0][1] == stops[1][1]


def test_a_process_with_another_config_is_named_and_both_end(config_file, tmp_path):
    other = ("--optimizer.learning-rate", "0.5")
    with train_pair(config_file, tmp_path / "run", *other) as pair:
        assert pair.exit_codes(60) == [2, 2], pair.said()
        for index in range(2):
            said = pair.said(index)
            assert "optimizer.learning_rate is 0.5 on process 1, 0.01 on process 0" in said
