"""What it takes to fine-tune a folder of weights: seconds to load, tokens a second, peak memory.

    python -m benchmarks.bench_finetune --make configs/moonlight_16b.py --folder MODEL
    python -m benchmarks.bench_finetune --folder MODEL -- --lora.rank 16 --train.steps 6

`--make` writes a folder of random weights of a config's model, as published in FP8 or with
`--bf16`; `--layers` cuts it. Options after `--` are train.py's: it runs in a process of its own,
and its metrics make one line. Loading reads the folder from the disk where `--cold` is given.
"""

import argparse
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.random_checkpoint import make_checkpoint, size_of, specs_of
from dsv3_jax.config import load_config

ROOT = Path(__file__).parent.parent


def train(folder: Path, options: list[str], run_dir: Path, log: Path | None) -> dict[str, Any]:
    """What train.py took: its own numbers, or the last line of what it said when it failed."""
    argv = [sys.executable, "train.py", "--init-from", str(folder), "--run-dir", str(run_dir)]
    start = time.perf_counter()
    done = subprocess.run(
        [*argv, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seconds = round(time.perf_counter() - start, 1)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    if log is not None:
        log.write_text(done.stdout)
    if done.returncode:
        said = done.stdout.strip().splitlines()
        return {"failed": done.returncode, "said": said[-1:], "seconds": seconds}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("tokens_per_s")]
    told = {
        name: round(float(np.median([line[name] for line in steps])), 2)
        for name in ("tokens_per_s", "peak_memory_gib", "host_memory_gib")
        if steps and steps[-1].get(name) is not None
    }
    parts = next((line["seconds"] for line in reversed(lines) if "seconds" in line), {})
    parts = {name: round(value, 1) for name, value in parts.items()}
    losses = [round(line["loss"], 4) for line in lines if "loss" in line]
    held = re.search(r"weights +([\d.,]+) MB", done.stdout)  # of a frozen base
    told["peak_rss_gb"] = round(peak, 2)
    if held:
        told["frozen_base_gb"] = float(held[1].replace(",", "")) / 1e3
    return {**told, "phases": parts, "losses": losses[:3] + losses[-1:], "seconds": seconds}


def forget(folder: Path) -> None:
    """Takes a folder's files out of the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Makes the folder, or trains from it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--make", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--log", type=Path)
    parser.add_argument("options", nargs="*")
    given = parser.parse_args()
    if given.make:
        model = load_config(given.make).model
        layers = given.layers or model.num_hidden_layers
        ends = {"bos_token_id": 256, "eos_token_id": 257}  # of bytes: there is no tokenizer
        model = dataclasses.replace(model, num_hidden_layers=layers, **ends)
        start = time.perf_counter()
        make_checkpoint(given.folder, model, fp8=not given.bf16)
        size, seconds = size_of(specs_of(model, not given.bf16)), time.perf_counter() - start
        print(f"{size / 1e9:.2f} GB in {seconds:.1f} s: {given.folder}")
        return
    if given.cold:
        forget(given.folder)
    with tempfile.TemporaryDirectory() as work:
        found = train(given.folder, given.options, Path(work) / "run", given.log)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
