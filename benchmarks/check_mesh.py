"""Runs train.py and infer.py over two devices in every way, and compares each with one device.

    python -m benchmarks.check_mesh             # two GPUs
    python -m benchmarks.check_mesh --virtual   # two virtual CPU devices
    XLA_FLAGS=--xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback=true \\
        python -m benchmarks.check_mesh --only "ragged"  # between processes XLA asks for the flag

What tests cannot see without accelerators: NCCL, real `ragged_all_to_all`, a process for each GPU.
Every run is a process of its own; all of them start together and share the devices, since most of
their time goes into compiling. One line a run, as it ends; the exit code is 1 if one is off.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
CONFIG = """
import dataclasses
from dsv3_jax.config import *

def get_config():
    model = ModelConfig(
        vocab_size=272, hidden_size=128, num_hidden_layers=2, max_position_embeddings=128,
        bos_token_id=256, eos_token_id=257, num_attention_heads=4, q_lora_rank=64, kv_lora_rank=32,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, rope_scaling=None,
        intermediate_size=256, moe_intermediate_size=128, first_k_dense_replace=1,
        n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
        num_nextn_predict_layers=0, dtype="float32",
        initializer_range=0.06,  # of 0.006 Adam makes steps of rounding errors
    )
    return Config(
        model=model,
        data=DataConfig(path={corpus!r}, val_fraction=0.2),
        train=TrainConfig(steps=4, batch_size=8, seq_len=32, log_every=1, eval_every=4,
                          eval_batches=1, sample_tokens=0),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(warmup_steps=2, batch_start_ratio=1.0),
    )
"""
EXACT, FP8 = 1e-5, 2e-2  # the largest relative difference of a loss

EXPERTS = ["--mesh.local", "2", "--expert-parallel.transport"]
ON_WIRE = ["--expert-parallel.dispatch-format", "fp8", "--expert-parallel.combine-format", "bf16"]


class Run(NamedTuple):
    """One line of the table: options, what it is compared with, and how many processes it is."""

    options: list[str]
    limit: float = EXACT
    processes: int = 1  # 2: one for each device


TRAIN = {
    "data": Run(["--mesh.data", "2"]),
    "data, fsdp": Run(["--mesh.data", "2", "--sharding.state", "fsdp"]),
    "data, two processes": Run(["--mesh.data", "2"], processes=2),
    "experts, allgather": Run([*EXPERTS, "allgather"]),
    "experts, padded": Run([*EXPERTS, "padded"]),
    "experts, ragged": Run([*EXPERTS, "ragged"]),
    "experts, padded, FP8 out": Run([*EXPERTS, "padded", *ON_WIRE], FP8),
    "experts, ragged, FP8 out": Run([*EXPERTS, "ragged", *ON_WIRE], FP8),
    "experts, ragged, two processes": Run([*EXPERTS, "ragged"], processes=2),
    "tensor": Run(["--mesh.tensor", "2"]),
    "context, allgather": Run(["--mesh.context", "2"]),
    "context, ring": Run(["--mesh.context", "2", "--sharding.context", "ring"]),
}
INFER = {
    "infer, tensor": Run(["--mesh.tensor", "2"]),
    "infer, context": Run(["--mesh.context", "2"]),
    "infer, experts, ragged": Run([*EXPERTS, "ragged"]),
    "infer, experts, FP8 weights": Run([*EXPERTS, "padded", "--fp8"]),
    "infer, experts, two processes": Run([*EXPERTS, "padded"], processes=2),
}


class Started:
    """The processes of a run, each writing to a file of its own."""

    def __init__(self, name: str, run: Run, command: list[str], folder: Path, virtual: bool):
        self.name, self.run, self.start = name, run, time.monotonic()
        place = folder / name.replace(", ", "_").replace(" ", "_")
        self.run_dir = place
        coordinator = f"localhost:{_free_port()}"
        self.outputs, self.processes = [], []
        for index in range(run.processes):
            words = [sys.executable, *command, *run.options]
            environment = os.environ | {
                # Sums as exact as on one device, and room for the other runs.
                "JAX_DEFAULT_MATMUL_PRECISION": "float32",
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                "NCCL_NVLS_ENABLE": "0",
                "XDG_CACHE_HOME": f"{place}.{index}.cache",
            }
            if command[0] == "train.py":
                words += ["--run-dir", str(place)]
            if virtual:
                words += ["--devices", str(3 - run.processes)]
            if run.processes > 1:
                words += ["--distributed.coordinator", coordinator]
                words += ["--distributed.num-processes", "2", "--distributed.process-id"]
                words += [str(index)]
                environment["CUDA_VISIBLE_DEVICES"] = str(index)
            self.outputs.append(Path(f"{place}.{index}.txt"))
            with self.outputs[-1].open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
                    )
                )

    @property
    def done(self) -> bool:
        """Whether all processes have ended."""
        return all(process.poll() is not None for process in self.processes)

    def result(self) -> list[float] | None:
        """The losses so far, or the tokens; None when a process wrote none."""
        metrics = self.run_dir / "metrics.jsonl"
        if metrics.exists():
            lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
            return [line["loss"] for line in map(json.loads, lines) if "loss" in line] or None
        ids = [line for line in self.outputs[0].read_text().splitlines() if line.count(",") > 3]
        return [float(number) for number in ids[-1].split(",")] if ids else None

    def report(self, reference: "Started") -> bool:
        """Prints the run's line and, where it failed, the end of what it said."""
        got, want = self.result(), reference.result()
        seconds = f"{time.monotonic() - self.start:5.1f} s"
        codes = [process.poll() for process in self.processes]
        if got and want and any(code != 0 for code in codes):
            apart = max(abs(a - b) / abs(b) for a, b in zip(got, want))
            said = f"exit codes {codes} after {len(got)} steps, largest difference {apart:.1e}"
            print(f"{self.name:32} FAILED {seconds}  {said}", flush=True)
            got = None
        elif got is None or want is None or len(got) != len(want):
            print(f"{self.name:32} FAILED {seconds}  exit codes {codes}", flush=True)
            got = None
        if got is None or want is None:
            for output in self.outputs:
                print("    " + "\n    ".join(output.read_text().splitlines()[-12:]), flush=True)
            return False
        apart = max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(got, want, strict=True))
        limit = 0.0 if self.name.startswith("infer") else self.run.limit
        right = apart <= limit
        said = (
            f"largest difference {apart:.1e}" if limit else f"tokens {'' if right else 'not '}equal"
        )
        print(f"{self.name:32} {'ok    ' if right else 'OFF   '} {seconds}  {said}", flush=True)
        return right

    def end(self) -> None:
        """Kills what still runs."""
        for process in self.processes:
            process.kill()
            process.wait()


def main() -> int:
    """Starts everything, prints a line as each run ends; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--virtual", action="store_true", help="two virtual CPU devices")
    parser.add_argument("--seconds", type=float, default=300, help="what is not done then, failed")
    parser.add_argument("--only", default="", help="runs whose names match this regex")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    right = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = ["train.py", "--config", str(write_config(folder))]

        def start(name: str, run: Run, command: list[str]) -> Started:
            return Started(name, run, command, folder, options.virtual)

        one = start("one device", Run(["--mesh.data", "1"]), train)
        infer = ["infer.py", "--checkpoint", str(one.run_dir), "--token-ids", "256,84,104,101"]
        infer += ["--max-new-tokens", "16", "--temperature", "0"]
        alike = {n: run for n, run in (TRAIN | INFER).items() if re.search(options.only, n)}
        waiting = [start(n, run, train) for n, run in alike.items() if n in TRAIN]
        began = [one, *waiting]
        reference, written = {"train": one}, False
        while (waiting or not written) and time.monotonic() < deadline:
            if one.done and not written:
                written = True
                print(f"{'one device':32} losses {one.result()}", flush=True)
                later = [start(n, run, infer) for n, run in alike.items() if n in INFER]
                waiting += later
                began += later
                for key in {key_of(run) for run in later}:
                    more = ["--fp8"] if key == "fp8" else []
                    reference[key] = start(f"infer, one device, {key}", Run(more), infer)
                    began.append(reference[key])
            for run in list(waiting):
                key = (
                    "train"
                    if run.name in TRAIN
                    else "fp8"
                    if "--fp8" in run.run.options
                    else "infer"
                )
                if run.done and key in reference and reference[key].done:
                    right &= run.report(reference[key])
                    waiting.remove(run)
            time.sleep(0.05)
        for run in waiting:
            right = False
            run.end()
            run.report(one if run.name in TRAIN else run)
        for run in began:
            run.end()
    return 0 if right else 1


def key_of(run: Started) -> str:
    """What a run is compared with."""
    if run.name in TRAIN:
        return "train"
    return "fp8" if "--fp8" in run.run.options else "infer"


def write_config(folder: Path) -> Path:
    """A tiny model's config and its corpus."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(12):
        text = f"Document {number}. " + "The quick brown fox jumps over the lazy dog. " * 40
        (corpus / f"{number}.txt").write_text(text)
    path = folder / "small.py"
    path.write_text(CONFIG.format(corpus=str(corpus)))
    return path


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
