"""Import and export of a checkpoint with V3's layer shapes: GB/s against `cp`, and peak memory.

    python -m benchmarks.bench_checkpoint_io --folder /a/disk/with/room --gigabytes 20

The checkpoint is made of random bytes in V3's own layout: FP8 weights with scales, 1 MoE layer and
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

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.checkpoint import INDEX, MANIFEST
from dsv3_jax.interop.hf_config import model_config_to_hf
from dsv3_jax.interop.name_map import places, scale_name, scale_shape
from dsv3_jax.interop.safetensors import num_bytes, open_writer, read_header

SHARD_BYTES = 4_300_000_000  # as DeepSeek-V3's own files
CHUNK = 64 << 20

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


def specs_of(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every tensor as V3 was published."""
    specs = {}
    for name, place in places(config).items():
        if place.fp8:
            specs[name] = ("F8_E4M3", place.shape)
            specs[scale_name(name)] = ("F32", scale_shape(place.shape))
        else:
            specs[name] = ("F32" if place.path[0] == "router" else "BF16", place.shape)
    return specs


def size_of(specs: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of all tensors."""
    return sum(num_bytes(*spec) for spec in specs.values())


def make_checkpoint(folder: Path, config: ModelConfig) -> None:
    """Writes random bytes in V3's layout."""
    specs = specs_of(config)
    shards: list[dict] = [{}]
    for name, spec in specs.items():
        if size_of(shards[-1]) > SHARD_BYTES and not name.endswith("_scale_inv"):
            shards.append({})
        shards[-1][name] = spec
    folder.mkdir()
    random = np.random.default_rng(0).integers(0, 256, CHUNK + 4096, np.uint8)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with open_writer(folder / file, shard, {"format": "pt"}) as writer:
            for i, (name, spec) in enumerate(shard.items()):
                for at in range(0, num_bytes(*spec), CHUNK):
                    count = min(CHUNK, num_bytes(*spec) - at)
                    writer.write(name, random[i % 4096 :][:count], at)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    values = model_config_to_hf(config, fp8=True)
    (folder / "config.json").write_text(json.dumps(values))


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
