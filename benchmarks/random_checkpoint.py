"""Checkpoint folders of any size with random weights, as published: FP8 with scales, or BF16."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.checkpoint import INDEX
from dsv3_jax.interop.hf_config import model_config_to_hf
from dsv3_jax.interop.name_map import places, scale_name, scale_shape
from dsv3_jax.interop.safetensors import num_bytes, open_writer

SHARD_BYTES = 4_300_000_000  # as DeepSeek-V3's own files
POOL = 1 << 24  # numbers that all weights are made of, each from another one on
STRIDE = 4093

Specs = dict[str, tuple[str, tuple[int, ...]]]


def specs_of(config: ModelConfig, fp8: bool = True) -> Specs:
    """(dtype, shape) of every tensor as V3 was published, or all in BF16."""
    specs = {}
    for name, place in places(config).items():
        if place.fp8 and fp8:
            specs[name] = ("F8_E4M3", place.shape)
            specs[scale_name(name)] = ("F32", scale_shape(place.shape))
        else:
            specs[name] = ("F32" if place.path[0] == "router" else "BF16", place.shape)
    return specs


def size_of(specs: Specs) -> int:
    """Bytes of all tensors."""
    return sum(num_bytes(*spec) for spec in specs.values())


def make_checkpoint(folder: Path, config: ModelConfig, fp8: bool = True) -> None:
    """Writes the folder: matrices are normal with about the config's std, vectors are ones."""
    specs = specs_of(config, fp8)
    shards: list[Specs] = [{}]
    for name, spec in specs.items():
        if size_of(shards[-1]) > SHARD_BYTES and not name.endswith("_scale_inv"):
            shards.append({})
        shards[-1][name] = spec
    folder.mkdir(parents=True)
    normal = np.random.default_rng(0).standard_normal(POOL + (1 << 20), np.float32)
    pools = {
        "F8_E4M3": np.clip(100 * normal, -448, 448).astype(ml_dtypes.float8_e4m3fn),
        "BF16": (config.initializer_range * normal).astype(ml_dtypes.bfloat16),
    }
    first: dict[Any, int] = {}  # MTP's copies of embedding and head are those numbers again
    of_place = {n: (place.path, place.index) for n, place in places(config).items()}
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with open_writer(folder / file, shard, {"format": "pt"}) as writer:
            for name, (dtype, shape) in shard.items():
                if dtype == "F32":
                    value = config.initializer_range / 100 * name.endswith("_scale_inv")
                    writer.write(name, np.full(shape, value, np.float32))
                elif len(shape) == 1:
                    writer.write(name, np.ones(shape, pools[dtype].dtype))
                else:
                    start = first.setdefault(of_place[name], len(first) * STRIDE % (1 << 20))
                    pool, size = pools[dtype][start:], int(np.prod(shape))
                    for at in range(0, size, POOL):
                        part = pool[: min(POOL, size - at)]
                        writer.write(name, part, at * part.itemsize)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(model_config_to_hf(config, fp8=fp8)))
