"""Two processes over gloo: stopped, killed, resumed, equal to one; writing; in disagreement."""

import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

import infer
import train
from tests.helpers import TOLERANCE, write_small_run

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow  # up to four processes at a time, each compiling for itself
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
            num_nextn_predict_layers=0, initializer_range=0.2, dtype="float32",
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


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return write_small_run(tmp_path_factory.mktemp("config"), CONFIG, steps=STEPS)


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


def pair_of(folder: Path, command: list[object], *options_of_second: str) -> Pair:
    coordinator, commands = address(), []
    for index in range(2):
        several = ["--distributed.coordinator", coordinator, "--distributed.num-processes", "2"]
        several += ["--distributed.process-id", index]
        commands.append([*command, *several, *(options_of_second if index else ())])
    return Pair(folder, *commands)


def train_pair(config_file: Path, run: Path, *options: str, second: tuple[str, ...] = ()) -> Pair:
    command = ["train.py", "--config", config_file, "--run-dir", run, "--devices", "2", *options]
    return pair_of(config_file.parent, command, *second)


def lines_of(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def losses_of(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines_of(run) if "loss" in line}


def reached(run: Path, step: int) -> Callable[[], bool]:
    return lambda: any(line["step"] >= step for line in lines_of(run))


def saved_step(run: Path) -> int:
    return max(int(path.parent.name) for path in run.glob("checkpoints/*/MANIFEST.json"))


@pytest.fixture(scope="module")
def run_of_two(config_file, tmp_path_factory):
    """A run that was stopped by a signal to one process, killed, resumed twice, and is done."""
    run = tmp_path_factory.mktemp("runs") / "pair"
    with train_pair(config_file, run) as pair:
        pair.wait_for(reached(run, 2))
        pair.processes[1].send_signal(signal.SIGTERM)
        assert pair.exit_codes(60) == [143, 143], pair.said()
        stops = [re.search(r"stopped by signal 15 at step (\d+)", pair.said(i)) for i in range(2)]
        assert stops[0] and stops[1] and stops[0][1] == stops[1][1], pair.said()
    stopped = int(stops[0][1])
    assert saved_step(run) == stopped < STEPS
    with train_pair(config_file, run) as pair:
        pair.wait_for(reached(run, stopped + 3))
        pair.processes[1].kill()
        killed = time.monotonic()
        codes = pair.exit_codes(60)
        assert codes[1] == -signal.SIGKILL
        assert codes[0] == 1, pair.said()
        last = [line for line in pair.said(0).splitlines() if not line.startswith("[Gloo]")][-1]
        assert last.startswith("error: process 1 was killed, so process 0 ends too"), pair.said(0)
        assert "Traceback" not in pair.said(0) and "stack trace" not in pair.said(0)
        print(f"the other ended {time.monotonic() - killed:.1f} s later with {codes[0]}")
        assert f"resumed from the checkpoint of step {stopped}" in pair.said(0)
    saved = saved_step(run)
    # Now with experts of one node on devices of both processes, which are on one host.
    with train_pair(config_file, run, "--mesh.node", "1", "--mesh.local", "4") as pair:
        assert pair.exit_codes(120) == [0, 0], pair.said()
        assert f"resumed from the checkpoint of step {saved}" in pair.said(0)
    return run


def test_stopped_killed_and_resumed_it_ends_as_one_process_does(
    config_file, run_of_two, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(config_file.parent / "cache"))
    assert train.main(["--config", str(config_file), "--run-dir", str(tmp_path / "one")]) == 0
    together, alone = losses_of(run_of_two), losses_of(tmp_path / "one")
    assert together.keys() == alone.keys() == set(range(1, STEPS + 1))
    for step, loss in alone.items():
        assert abs(together[step] - loss) <= TOLERANCE["f32_model"] * loss, step
    assert (run_of_two / "log.1.txt").exists() and (run_of_two / "sample.txt").exists()


def test_two_processes_write_what_one_does_and_the_first_prints_it(run_of_two, capsys):
    command = ["infer.py", "--checkpoint", run_of_two, "--token-ids", "256,84,104,101"]
    command += ["--max-new-tokens", "6", "--temperature", "0"]
    mesh = ["--mesh.local", "2", "--devices", "1"]
    with pair_of(run_of_two.parent, [*command, *mesh]) as pair:
        assert pair.exit_codes(60) == [0, 0], pair.said()
        together = [pair.said(index) for index in range(2)]
    capsys.readouterr()
    assert infer.main([str(word) for word in command[1:]]) == 0
    alone = capsys.readouterr().out
    assert together[0].endswith(alone) and alone.count(",") == 5
    assert not re.search(r"\d,\d", together[1])


def test_a_process_with_another_config_is_named_and_both_end(config_file, tmp_path):
    other = ("--optimizer.learning-rate", "0.5")
    with train_pair(config_file, tmp_path / "run", second=other) as pair:
        assert pair.exit_codes(60) == [2, 2], pair.said()
        for index in range(2):
            said = pair.said(index)
            assert "optimizer.learning_rate is 0.5 on process 1, 0.01 on process 0" in said
