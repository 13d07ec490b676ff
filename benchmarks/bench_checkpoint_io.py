"""Import and export of a checkpoint with V3's layer shapes: GB/s against `cp`, and peak memory.

    python -m benchmarks.bench_checkpoint_io --folder /a/disk/with/room --gigabytes 20

The checkpoint has random weights in V3's own layout: FP8 weights with scales, 1 MoE layer and
as many dense ones as fill the size. Import, export and cp each run in a process of their own, read
a source that is not in the page cache, and count as done when the bytes are on the disk. At most
two copies exist at a time, and all are removed at the end.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.random_checkpoint import make_checkpoint, size_of, specs_of
from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.checkpoint import MANIFEST
from dsv3_jax.interop.safetensors import read_header

IMPORT = "from dsv3_jax.interop.importing import import_hf; import_hf(SRC, DST)"
EXPORT = (
    "from dsv3_jax.interop.checkpoint import open_checkpoint\n"
    "from dsv3_jax.interop.exporting import export_hf\n"
    "export_hf(open_checkpoint(SRC), DST)"
)
COPY = (
    "import subprocess, pathlib, os\n"
    "subprocess.run(['cp', '-r', SRC, DST], check=True)\n"
    "for path in pathlib.Path(DST).iterdir():\n"
    "    fd = os.open(path, os.O_RDONLY); os.fsync(fd); os.close(fd)"
)


def v3_slice(gigabytes: float) -> ModelConfig:
    """V3 with one MoE layer, no MTP, and dense layers up to about this size in FP8."""
    for dense in range(1, 1000):
        config = dataclasses.replace(
            ModelConfig(),
            num_hidden_layers=dense + 1,
            first_k_dense_replace=dense,
            num_nextn_predict_layers=0,
        )
        if size_of(specs_of(config)) >= gigabytes * 1e9:
            break
    return config


def timed(code: str, src: Path, dst: Path) -> tuple[float, float]:
    """(seconds, peak GB of the process) of a fresh process that reads `src` from the disk."""
    for path in (p for p in src.rglob("*") if p.is_file()):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    peak = "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    program = f"SRC, DST = {str(src)!r}, {str(dst)!r}\n{code}{peak}"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - start, int(done.stdout) * 1024 / 1e9


def same_bytes(imported: Path, exported: Path) -> bool:
    """Whether every exported tensor has the digest that the import recorded of the source's."""
    expected = json.loads((imported / MANIFEST).read_bytes())["sha256"]
    found = {}
    for file in exported.glob("*.safetensors"):
        for name, tensor in read_header(file)[0].items():
            digest = hashlib.sha256()
            for first in range(0, tensor.shape[0], 4096):
                part = tensor.read(first, min(first + 4096, tensor.shape[0]))
                digest.update(part.reshape(-1).view(np.uint8).data)
            found[name] = digest.hexdigest()
    return found == expected


def main() -> None:
    """Makes, copies, imports, exports, compares, removes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=float, default=20.0)
    options = parser.parse_args()
    config = v3_slice(options.gigabytes)
    size = size_of(specs_of(config)) / 1e9
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        src, dst, out = Path(work) / "hf", Path(work) / "ours", Path(work) / "out"
        make_checkpoint(src, config)
        layers = f"{config.first_k_dense_replace} dense and 1 MoE layers of V3"
        print(f"{size:.2f} GB, {len(specs_of(config))} tensors, {layers}, {os.cpu_count()} cores")
        rates = {}
        for what, code, a, b, spent in (
            ("cp", COPY, src, out, out),
            ("import", IMPORT, src, dst, src),
            ("export", EXPORT, dst, out, None),
        ):
            seconds, peak = timed(code, a, b)
            rates[what] = size / seconds
            share = f", {rates[what] / rates['cp']:.0%} of cp" if what != "cp" else ""
            memory = f", peak RSS {peak:.2f} GB" if what != "cp" else ""
            print(f"{what:7} {seconds:6.1f} s  {rates[what]:5.2f} GB/s{share}{memory}", flush=True)
            if spent:
                shutil.rmtree(spent)
        print("every byte came back" if same_bytes(dst, out) else "BYTES DIFFER")


if __name__ == "__main__":
    main()
