"""Runs train.py and infer.py over several devices in every way, and compares each with one device.

    python -m benchmarks.check_mesh                     # all GPUs, 2 or 4 of them
    python -m benchmarks.check_mesh --virtual 4         # virtual CPU devices
    python -m benchmarks.check_mesh --list              # the cases; --only REGEX takes some
    python -m benchmarks.check_mesh --at-once 4 --cache DIR

What tests cannot see without accelerators: NCCL, kernels that read peers' memory, a process for
each GPU. Every case is a process of its own, since one that hangs must not end the others; a few
run at once, as many as --at-once, or as memory and cores allow: most of their time is compiling.
One line a case, as it ends; the exit code is 1 if one is off. Between processes XLA asks for
XLA_FLAGS=--xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback=true, which is set here.
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
from typing import Any, NamedTuple

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
        train=TrainConfig(steps={steps}, batch_size=8, seq_len=32, log_every=1, eval_every={steps},
                          eval_batches=1, sample_tokens=0),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(warmup_steps=2, batch_start_ratio=1.0),
    )
"""
EXACT, FP8 = 1e-5, 2e-2  # the largest relative difference of a loss
FP8_STEPS = 4  # of whose losses that holds: rounded gradients make another model with each step

TRANSPORT = "--expert-parallel.transport"
ON_WIRE = ["--expert-parallel.dispatch-format", "fp8", "--expert-parallel.combine-format", "bf16"]
GIB_OF_A_CASE, CORES_OF_A_CASE = 6, 3  # while it compiles


class Run(NamedTuple):
    """One line of the table: options, what it is compared with, and how many processes it is."""

    options: list[str]
    limit: float = EXACT
    processes: int = 1  # or as many as devices
    like: str = "one device"  # the case that gives the losses or tokens wanted
    then: list[str] | None = None  # options that training goes on with, to two more steps


def mesh(**sizes: int) -> list[str]:
    """The options of a mesh."""
    return [word for axis, size in sizes.items() for word in (f"--mesh.{axis}", str(size))]


def train_cases(devices: int) -> dict[str, Run]:
    """Every way of training that so many devices allow, by name."""
    local, ring = mesh(local=devices), ["--sharding.context", "ring"]
    cases = {
        "one device": Run(mesh(data=1)),
        "one device, and on": Run(mesh(data=1), like="one device, and on", then=mesh(data=1)),
        "data": Run(mesh(data=devices)),
        "data, fsdp": Run(mesh(data=devices) + ["--sharding.state", "fsdp"]),
        "data, replicated": Run(mesh(data=devices) + ["--sharding.state", "replicated"]),
        "data, a process each": Run(mesh(data=devices), processes=devices),
        "context": Run(mesh(context=devices)),
        "context, ring": Run(mesh(context=devices) + ring),
        "tensor": Run(mesh(tensor=devices)),
        "written on all, read on half": Run(
            mesh(data=devices), like="one device, and on", then=mesh(data=devices // 2)
        ),
    }
    for transport in ("allgather", "padded", "pallas", "ragged"):
        cases[f"local, {transport}"] = Run([*local, TRANSPORT, transport])
    for transport in ("padded", "pallas", "ragged"):
        options = [*local, TRANSPORT, transport, *ON_WIRE]
        cases[f"local, {transport}, FP8 out"] = Run(options, FP8)
    cases["local, padded, a process each"] = Run([*local, TRANSPORT, "padded"], processes=devices)
    if devices == 4:
        two = mesh(node=2, local=2)
        cases |= {
            "2 x 2, padded": Run([*two, TRANSPORT, "padded"]),
            "2 x 2, pallas": Run([*two, TRANSPORT, "pallas"]),
            "2 x 2, padded, FP8 out": Run([*two, TRANSPORT, "padded", *ON_WIRE], FP8),
            "2 x 2, pallas, FP8 out": Run([*two, TRANSPORT, "pallas", *ON_WIRE], FP8),
            "data 2, local 2, pallas, fsdp": Run(
                mesh(data=2, local=2) + [TRANSPORT, "pallas", "--sharding.state", "fsdp"]
            ),
            "data 2, context 2, ring": Run(mesh(data=2, context=2) + ring),
            "tensor 2, context 2, ring": Run(mesh(tensor=2, context=2) + ring),
        }
    return cases


def infer_cases(devices: int) -> dict[str, Run]:
    """Every way of generating, by name; all read the checkpoint of one device."""
    local = [*mesh(local=devices), TRANSPORT]
    alone, quantized = "infer, one device", "infer, one device, FP8 weights"
    return {
        alone: Run([], like=alone),
        quantized: Run(["--fp8"], like=quantized),
        "infer, tensor": Run(mesh(tensor=devices), like=alone),
        "infer, context": Run(mesh(context=devices), like=alone),
        "infer, local, padded": Run([*local, "padded"], like=alone),
        "infer, local, pallas": Run([*local, "pallas"], like=alone),
        "infer, local, FP8 weights": Run([*local, "padded", "--fp8"], like=quantized),
        "infer, local, a process each": Run([*local, "padded"], processes=devices, like=alone),
    }


class Started:
    """The processes of a run, each writing to a file of its own."""

    def __init__(self, name: str, run: Run, command: list[str], folder: Path, options: Any):
        self.name, self.run, self.command, self.options = name, run, command, options
        self.start, self.place = time.monotonic(), folder / re.sub(r"\W+", "_", name)
        self.run_dir = self.place
        self.outputs = [Path(f"{self.place}.{i}.txt") for i in range(run.processes)]
        self.then = run.then
        self.processes = self._launch(run.options)

    def _launch(self, mesh_options: list[str]) -> list[subprocess.Popen]:
        coordinator, count = f"localhost:{_free_port()}", self.run.processes
        processes = []
        for index, output in enumerate(self.outputs):
            words = [sys.executable, *self.command, *mesh_options]
            environment = os.environ | {
                # Sums as exact as on one device, and room for the other runs.
                "JAX_DEFAULT_MATMUL_PRECISION": "float32",
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                "NCCL_NVLS_ENABLE": "0",
                "XDG_CACHE_HOME": f"{self.place}.{index}.cache",
            }
            if self.options.cache:
                environment["JAX_COMPILATION_CACHE_DIR"] = self.options.cache
            if self.command[0] == "train.py":
                words += ["--run-dir", str(self.place)]
            if self.options.virtual:
                words += ["--devices", str(1 if count > 1 else self.options.devices)]
            if count > 1:
                words += ["--distributed.coordinator", coordinator]
                words += ["--distributed.num-processes", str(count)]
                words += ["--distributed.process-id", str(index)]
                environment["CUDA_VISIBLE_DEVICES"] = str(index)
                if "ragged" in mesh_options:
                    flag = "--xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback=true"
                    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}"
            with output.open("a") as file:
                processes.append(
                    subprocess.Popen(
                        words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
                    )
                )
        return processes

    @property
    def done(self) -> bool:
        """Whether all processes have ended; starts what comes after them."""
        if any(process.poll() is None for process in self.processes):
            return False
        if self.then is None or any(process.returncode for process in self.processes):
            return True
        more, self.then = [*self.then, "--train.steps", str(self.options.steps + 2)], None
        self.processes = self._launch(more)
        return False

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
        counted = FP8_STEPS if self.run.limit == FP8 else len(want)
        pairs = list(zip(got, want, strict=True))[:counted]
        apart = max(abs(a - b) / max(abs(b), 1e-30) for a, b in pairs)
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
    """Runs the cases, a few at once, and prints a line as each ends; the exit code."""
    options = parse()
    cases = train_cases(options.devices) | infer_cases(options.devices)
    chosen = [name for name in cases if re.search(options.only, name)]
    if options.list:
        print("\n".join(chosen))
        return 0
    # What a case is compared with, and the checkpoint that is read, come first.
    needed = {cases[name].like for name in chosen} | {"one device"}
    waiting = [n for n in cases if n in needed] + [n for n in chosen if n not in needed]
    deadline, right = time.monotonic() + options.seconds, True
    running: dict[str, Started] = {}
    ended: dict[str, Started] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = ["train.py", "--config", str(write_config(folder, options.steps))]
        infer = ["infer.py", "--checkpoint", str(folder / "one_device")]
        infer += ["--token-ids", "256,84,104,101", "--max-new-tokens", "16", "--temperature", "0"]
        while (waiting or running) and time.monotonic() < deadline:
            for name in list(waiting):
                needs_checkpoint = name.startswith("infer") and "one device" not in ended
                if len(running) < options.at_once and not needs_checkpoint:
                    waiting.remove(name)
                    command = infer if name.startswith("infer") else train
                    running[name] = Started(name, cases[name], command, folder, options)
            for name, run in list(running.items()):
                late = time.monotonic() - run.start > options.seconds_each
                if late:
                    run.end()
                if (run.done or late) and (run.run.like in ended or run.run.like == name):
                    right &= run.report(ended.get(run.run.like, run))
                    ended[name] = running.pop(name)
            time.sleep(0.05)
        for run in running.values():
            run.end()
            run.report(run)
        for name in waiting:
            print(f"{name:32} NOT RUN in {options.seconds:.0f} s")
        right &= not running and not waiting
    return 0 if right else 1


def parse() -> argparse.Namespace:
    """The options of the command line, with what follows from the machine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--virtual", type=int, default=0, help="so many virtual CPU devices")
    parser.add_argument("--only", default="", help="cases whose names match this regex")
    parser.add_argument("--list", action="store_true", help="print the names and do nothing")
    parser.add_argument("--steps", type=int, default=4, help="of training, in each case")
    parser.add_argument("--at-once", type=int, default=0, help="0: as memory and cores allow")
    parser.add_argument("--seconds", type=float, default=600, help="what is not done then, failed")
    parser.add_argument("--seconds-each", type=float, default=240, help="a case that takes longer")
    parser.add_argument("--cache", default="", help="folder for compiled programs")
    options = parser.parse_args()
    options.devices = options.virtual or _gpus()
    if options.devices not in (2, 4):
        parser.error(f"needs 2 or 4 devices, and there are {options.devices}: try --virtual 2")
    if not options.at_once:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        cores = len(os.sched_getaffinity(0))
        options.at_once = max(1, min(int(free / GIB_OF_A_CASE), cores // CORES_OF_A_CASE, 16))
    return options


def _gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return min(len(listed.stdout.splitlines()), 4)


def write_config(folder: Path, steps: int) -> Path:
    """A tiny model's config and its corpus."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(12):
        text = f"Document {number}. " + "The quick brown fox jumps over the lazy dog. " * 40
        (corpus / f"{number}.txt").write_text(text)
    path = folder / "small.py"
    path.write_text(CONFIG.format(corpus=str(corpus), steps=steps))
    return path


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
