"""Checkpoints of ours as Hugging Face folders for transformers, vLLM, SGLang and llama.cpp.

Per-expert names, shards of at most 5 GB with an index, a weight and its scales always in one shard
(vLLM and DeepSeek's converter look for them together), config.json in the hub's own form, MTP
modules as the layers after the last with their copies of embedding and head.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

from dsv3_jax.data.tokens import TOKENIZER_CONFIG
from dsv3_jax.interop.checkpoint import FP8, INDEX, Checkpoint
from dsv3_jax.interop.companions import (
    CARD,
    RunFacts,
    model_card,
    write_run_files,
)
from dsv3_jax.interop.digests import compared
from dsv3_jax.interop.hf_config import model_config_to_hf
from dsv3_jax.interop.name_map import Place, places
from dsv3_jax.interop.safetensors import Writer, num_bytes, open_writer
from dsv3_jax.interop.stored import count_non_finite
from dsv3_jax.interop.stream import (
    Specs,
    StorageDType,
    carry_along,
    chunks,
    finished_folder,
    for_each,
    specs_of,
    tell_not_finite,
    unconverted,
)

SHARD_BYTES = 5 * 10**9


def export_hf(
    source: Checkpoint,
    dst: str | Path,
    dtype: StorageDType = "stored",
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
    facts: RunFacts | None = None,
) -> Path:
    """Writes `source` as a Hugging Face folder `dst` and returns `dst`.

    "stored" and FP8 from FP8 keep every byte; "fp8" quantises what V3 published in FP8, in 128x128
    blocks, with power-of-two scales if `source.scale_fmt` is "ue8m0". Raises UserError when `dst`
    exists, OSError when the disk is too small or fails, RunError when a matrix of an import does
    not match its sha256, and then leaves nothing behind.
    `tokenizer` is a tokenizer.json to add, for sources that bring no such files along; `facts` are
    the numbers of a run, for the model card.
    """
    source = compared(source)
    table = places(source.config)
    originals = {place.path: name for name, place in table.items() if not place.copy}
    # A copy is written from its original, which an imported or trained checkpoint holds once.
    sources = {n: originals[p.path] if p.copy else n for n, p in table.items()}
    specs: dict[str, Specs] = {}
    for name, place in table.items():
        made = specs_of(source, sources[name], place, dtype)
        specs[name] = {_renamed(tensor, sources[name], name): made[tensor] for tensor in made}
    shards = _shards(specs, shard_bytes)
    size = sum(num_bytes(*spec) for group in specs.values() for spec in group.values())
    with finished_folder(Path(dst), size, overwrite=overwrite, resume=False) as folder:
        weight_map: dict[str, str] = {}
        bad: Counter[str] = Counter()
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            in_shard: Specs = {tensor: spec for n in names for tensor, spec in specs[n].items()}
            weight_map |= dict.fromkeys(in_shard, file)
            with open_writer(folder / file, in_shard, {"format": "pt"}) as writer:

                def copy(name: str, writer: Writer = writer) -> int:
                    return _copy_one(source, sources[name], name, table[name], dtype, writer, bad)

                for_each(names, copy, size, f"exporting {file}")
        tell_not_finite(bad, f"exporting to {dst}")
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        values = _hf_config(source, specs, unconverted(source, dtype))
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        carry_along(source.folder, folder)
        if source.folder is None:
            _files_of_run(folder, source, tokenizer)
        if not (folder / CARD).exists():
            stored = {name: specs[name][name] for name, place in table.items() if not place.copy}
            count = sum(math.prod(shape) for _, shape in stored.values())
            kinds = {kind for kind, _ in stored.values()}
            card = model_card(Path(dst).name, source.config, count, kinds, facts)
            (folder / CARD).write_text(card, encoding="utf-8")
    return Path(dst)


def _files_of_run(folder: Path, source: Checkpoint, tokenizer: Path | None) -> None:
    """The tokenizer's and similar files: those that a run took over, or those that it needs."""
    if tokenizer is not None and (tokenizer.parent / TOKENIZER_CONFIG).exists():
        carry_along(tokenizer.parent, folder)
    if not (folder / TOKENIZER_CONFIG).exists():
        write_run_files(folder, source.config, tokenizer)


def _copy_one(
    source: Checkpoint,
    origin: str,
    name: str,
    place: Place,
    dtype: StorageDType,
    writer: Writer,
    bad: Counter[str],
) -> int:
    done = 0
    for tensor, first, rows in chunks(source, origin, place, dtype):
        if count := count_non_finite(rows):
            bad[tensor] += count
        tensor = _renamed(tensor, origin, name)
        stored = writer.tensors[tensor]
        writer.write(tensor, rows, first * num_bytes(stored.dtype, stored.shape[1:]))
        done += rows.nbytes
    return done


def _renamed(tensor: str, origin: str, name: str) -> str:
    """`name`, or the name of its scales when `tensor` is that of `origin`'s."""
    return name + tensor.removeprefix(origin)


def _shards(specs: dict[str, Specs], shard_bytes: int) -> list[list[str]]:
    """Names in groups of at most `shard_bytes`, in order; a larger weight is alone in its group."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, group in specs.items():
        size = sum(num_bytes(*spec) for spec in group.values())
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _hf_config(source: Checkpoint, specs: dict[str, Specs], kept: list[str]) -> dict:
    """config.json that says what is stored: FP8 tensors without it load as garbage elsewhere."""
    dtypes = {spec[0] for group in specs.values() for spec in group.values()}
    weights = {group[name][0] for name, group in specs.items() if name.endswith(".weight")}
    dtype = "float32" if weights == {"F32"} else "bfloat16"
    scale_fmt = "ue8m0" if "F8_E8M0" in dtypes else source.scale_fmt
    return model_config_to_hf(source.config, dtype, FP8 in dtypes, scale_fmt, kept)
