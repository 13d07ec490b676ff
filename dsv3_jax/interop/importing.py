"""Hugging Face checkpoints into a folder of our own leaves, and that folder checked.

    config.json               as in the hub
    weights/PATH.safetensors  one leaf of our variables a file: "values", and "scales" if FP8
    dsv3_jax_weights.json     the architecture, and the sha256 of every published matrix
    tokenizer.json ...        carried along

A published matrix is one contiguous block of its leaf, so blocks are written in the order the
source has them and any part of a leaf can be read back for any mesh. Orbax, which the trainer
saves with, wants whole arrays in memory; hence a form of our own, in a format everyone can read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import UserError
from dsv3_jax.config.files import file_inside, parse_json, read_bytes
from dsv3_jax.interop.checkpoint import (
    Checkpoint,
    open_hf,
    position_in,
    same_numbers,
)
from dsv3_jax.interop.digests import sha256_of
from dsv3_jax.interop.hf_config import model_config_to_hf
from dsv3_jax.interop.import_manifest import MANIFEST, MAX_MANIFEST_BYTES, ImportManifest, leaf_file
from dsv3_jax.interop.name_map import Place, leaves, scale_shape
from dsv3_jax.interop.safetensors import StoredTensor, Writer, num_bytes
from dsv3_jax.interop.stored import count_non_finite
from dsv3_jax.interop.stream import (
    Specs,
    StorageDType,
    carry_along,
    chunks,
    finished_folder,
    for_each,
    in_file_order,
    most_not_finite,
    specs_of,
    tell_not_finite,
    unconverted,
)

log = logging.getLogger(__name__)
PROGRESS = "progress.jsonl"


def import_hf(
    src: str | Path,
    dst: str | Path,
    dtype: StorageDType = "stored",
    *,
    overwrite: bool = False,
    allow_non_finite: bool = False,
) -> Path:
    """Checks a Hugging Face folder and writes it to `dst`, stacked; returns `dst`.

    `load` and `--init-from` read either form. "stored" keeps every byte, FP8 included; "bf16" and
    "f32" convert. Killed and called again, it keeps what was complete and still matches its digest.
    Raises UserError for a source that is wrong in any way (as NaN and infinite numbers are unless
    `allow_non_finite`) or a `dst` that exists, OSError when the disk is too small or fails; both
    leave nothing behind. Source: names, shapes and FP8 scales of deepseek-ai/DeepSeek-V3
    (docs/checkpoints.md).

    >>> import dsv3_jax as ds
    >>> ds.import_hf("nowhere", "imported")
    Traceback (most recent call last):
    dsv3_jax.config.rules.UserError: nowhere/config.json: no such file
    """
    if dtype == "fp8":
        raise UserError("import to stored, bf16 or f32: FP8 is a form to export to")
    source = open_hf(src)
    plan = _leaf_specs(source, dtype)
    size = sum(num_bytes(*spec) for specs in plan.values() for spec in specs.values())
    with finished_folder(Path(dst), size, overwrite=overwrite, resume=True) as folder:
        bad: Counter[str] = Counter()
        digests = _copy_all(source, plan, dtype, folder, size, bad)
        if bad and not allow_non_finite:
            raise UserError(
                f"{src}: {len(bad)} tensors hold NaN or infinite numbers, damaged in transit or "
                f"trained to ruin: {most_not_finite(bad)}. --allow-non-finite imports them all "
                "the same"
            )
        tell_not_finite(bad, f"imported from {src}")
        carry_along(source.folder, folder)
        fp8 = any(spec[0] == "F8_E4M3" for specs in plan.values() for spec in specs.values())
        hf_dtype = "float32" if dtype == "f32" else "bfloat16"
        scale_fmt = source.scale_fmt if fp8 else None
        kept = unconverted(source, dtype)
        values = model_config_to_hf(source.config, hf_dtype, fp8, scale_fmt, kept)
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        beside = [path for path in sorted(folder.iterdir()) if path.is_file()]
        files = {p.name: p.read_bytes() for p in beside if p.name not in (PROGRESS, MANIFEST)}
        manifest = ImportManifest(
            format=1,
            model=source.config,
            scale_fmt="ue8m0" if scale_fmt == "ue8m0" else None,
            sha256=dict(sorted(digests.items())),
            files={n: hashlib.sha256(r).hexdigest() for n, r in files.items()},
        )
        text = json.dumps(dataclasses.asdict(manifest.sealed()), indent=0)
        (folder / MANIFEST).write_text(text + "\n")
        (folder / PROGRESS).unlink()
    return Path(dst)


def _leaf_specs(source: Checkpoint, dtype: StorageDType) -> dict[tuple[str, ...], Specs]:
    """Dtype and shape of "values" and "scales" of every leaf.

    A leaf whose matrices are stored in several dtypes is a tensor a matrix, by published names.
    """
    alone: dict[tuple[str, ...], Specs] = {}
    kinds: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for name, place in source.places.items():
        if not place.copy:
            specs = specs_of(source, name, place, dtype)
            alone.setdefault(place.path, {}).update(specs)
            kinds.setdefault(place.path, set()).add(tuple(kind for kind, _ in specs.values()))
    made: dict[tuple[str, ...], Specs] = {}
    stacks = leaves(source.config)
    for path, specs in alone.items():
        if len(kinds[path]) > 1:
            made[path] = specs
            continue
        (kind, *scales), leaf = next(iter(kinds[path])), stacks[path]
        # FP8 tiles cross heads (192 rows each), so FP8 leaves keep the published matrices.
        made[path] = {"values": (kind, leaf.lead + (leaf.shape if scales else leaf.dims))}
        if scales:
            made[path]["scales"] = (scales[0], leaf.lead + scale_shape(leaf.shape))
    return made


def _slot(specs: Specs, tensor: str, name: str, position: int) -> tuple[str, int]:
    """(tensor of the leaf's file, place in it) of a weight or its scales."""
    if tensor in specs:
        return tensor, 0
    return ("values" if tensor == name else "scales"), position


def _copy_all(
    source: Checkpoint,
    plan: dict[Any, Specs],
    dtype: StorageDType,
    folder: Path,
    size: int,
    bad: Counter[str],
) -> dict[str, str]:
    """Writes all leaves but what an earlier attempt completed; returns all digests.

    Tensors with numbers that are not finite are counted in `bad`, and not as completed: another
    attempt would not know of them.
    """
    stacks = leaves(source.config)
    originals = {p.path: n for n, p in source.places.items() if not p.copy}
    (folder / "weights").mkdir(exist_ok=True)
    digests = _completed(source, plan, dtype, folder)
    lock = threading.Lock()
    with ExitStack() as stack, (folder / PROGRESS).open("a") as progress:
        writers = {}
        for path, specs in plan.items():
            writers[path] = Writer(folder / leaf_file(path), specs, keep=True)
            stack.callback(writers[path].close, sync=False)

        def copy(name: str) -> int:
            place = source.places[name]
            if place.copy:
                if not same_numbers(source, name, originals[place.path]):
                    raise UserError(
                        f"{name} differs from {originals[place.path]}; MTP modules share the main "
                        "model's embedding and head here, so its numbers would be lost"
                    )
                return 0
            if name in digests:
                return 0
            position = position_in(stacks[place.path].lead, place.index)
            made = _copy_one(source, name, place, dtype, writers[place.path], position, bad)
            with lock:
                digests.update(made)
                if not bad.keys() & made.keys():
                    progress.write(json.dumps(made) + "\n")
                    progress.flush()
            return source.tensors[name].nbytes

        names = in_file_order((name, source.tensors[name]) for name in source.places)
        for_each(names, copy, size, f"importing {source.folder}")
        for writer in writers.values():
            writer.sync()
    return digests


def _copy_one(
    source: Checkpoint,
    name: str,
    place: Place,
    dtype: StorageDType,
    writer: Writer,
    position: int,
    bad: Counter[str],
) -> dict[str, str]:
    """Writes one weight (and scales) as the `position`-th matrix of its leaf; returns digests.

    Numbers that are not finite are counted in `bad`.
    """
    specs = specs_of(source, name, place, dtype)
    sums = {tensor: hashlib.sha256() for tensor in specs}
    for tensor, first, rows in chunks(source, name, place, dtype):
        if count := count_non_finite(rows):
            bad[tensor] += count
        target, shape = specs[tensor]
        slot, before = _slot(writer.specs, tensor, name, position)
        offset = before * num_bytes(target, shape) + first * num_bytes(target, shape[1:])
        writer.write(slot, rows, offset)
        sums[tensor].update(rows.reshape(-1).view(np.uint8).data)
    return {tensor: sums[tensor].hexdigest() for tensor in specs}


def _completed(
    source: Checkpoint, plan: dict[Any, Specs], dtype: StorageDType, folder: Path
) -> dict[str, str]:
    """Digests of what an interrupted import of the same source left here, checked; else {}.

    The first line of the progress file says which source and dtype it was.
    """
    assert source.folder is not None
    files = {t.file for t in source.tensors.values() if isinstance(t, StoredTensor)}
    stats = {path.name: path.stat() for path in sorted(files)}
    identity = {
        "source": str(source.folder.resolve()),
        "dtype": dtype,
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }
    progress = folder / PROGRESS
    recorded: list[dict[str, Any] | None] = []
    if progress.exists():
        lines = read_bytes(file_inside(folder, PROGRESS), MAX_MANIFEST_BYTES).splitlines()
        recorded = [_json_or_none(line) for line in lines]
    if not recorded or recorded[0] != identity:
        if recorded:
            log.warning("%s was left by another import: starting clean", folder)
        progress.write_text(json.dumps(identity) + "\n")
        return {}
    stacks = leaves(source.config)
    kept: dict[str, str] = {}
    for made in recorded[1:]:
        name = next(iter(made or {}), "")
        if name not in source.places or made is None:
            continue
        place = source.places[name]
        position = position_in(stacks[place.path].lead, place.index)
        # Starts in the file depend on the leaf's specs alone, so they are where they were.
        writer = Writer(folder / leaf_file(place.path), plan[place.path], keep=True)
        shapes = specs_of(source, name, place, dtype)
        parts = {}
        for tensor, spec in shapes.items():
            slot, before = _slot(writer.specs, tensor, name, position)
            parts[tensor] = writer.tensors[slot].at(before, spec[1])
        writer.close(sync=False)
        if made == {tensor: sha256_of(part) for tensor, part in parts.items()}:
            kept.update(made)
    log.info("continuing an import: %d tensors are there already", len(kept))
    # A line cut off by the kill would spoil the next one.
    progress.write_text("\n".join(json.dumps(line) for line in recorded if line) + "\n")
    return kept


def _json_or_none(line: bytes) -> dict[str, Any] | None:
    try:
        return parse_json(line, PROGRESS)
    except UserError:
        return None
