"""What importing and exporting share: tensors in chunks, several threads, a folder at the end.

Memory holds a few chunks of 16 MiB, whatever the sizes of tensors and checkpoints.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from dsv3_jax.config import UserError
from dsv3_jax.config.files import file_inside, refuse_lfs_pointer
from dsv3_jax.data.tokenizer import KEPT_WITH_WEIGHTS
from dsv3_jax.interop.checkpoint import FP8, Checkpoint, Tensor
from dsv3_jax.interop.name_map import Place, scale_name, scale_shape
from dsv3_jax.interop.published_scales import as_published
from dsv3_jax.interop.safetensors import DTYPES, StoredTensor, num_bytes
from dsv3_jax.interop.stored import count_non_finite
from dsv3_jax.quantization.block_scaled import PER_BLOCK, BlockScaled, ScaleFormat, quantize

log = logging.getLogger(__name__)

# "stored": as it is; "bf16", "f32": all of it, FP8 dequantised; "fp8": as V3 was published.
StorageDType = Literal["stored", "bf16", "f32", "fp8"]
CHUNK_BYTES = 16 << 20
WORKERS = 3
BLOCK = PER_BLOCK[0]
_E4M3_NUMBERS = np.arange(256, dtype=np.uint8).view(DTYPES[FP8]).astype(np.float32)

CARRIED = (*KEPT_WITH_WEIGHTS, "README.md")
MAX_CARRIED_BYTES = 256 << 20

Specs = dict[str, tuple[str, tuple[int, ...]]]


def specs_of(checkpoint: Checkpoint, name: str, place: Place, dtype: StorageDType) -> Specs:
    """(dtype, shape) of what a weight becomes in `dtype`: one tensor, or FP8 values and scales.

    Router biases are F32 in every form but "stored": they are compared, not multiplied. Scales that
    are stored keep their dtype.
    """
    if dtype not in get_args(StorageDType):
        raise UserError(f"dtype {dtype!r} must be one of {', '.join(get_args(StorageDType))}")
    stored = checkpoint.tensors[name].dtype
    if dtype == "stored":
        target = stored
    elif place.path[0] == "router":
        target = "F32"
    else:
        published = checkpoint.published_scales
        as_fp8 = place.fp8 and (published is None or scale_name(name) in published)
        target = {"bf16": "BF16", "f32": "F32", "fp8": FP8 if as_fp8 else "BF16"}[dtype]
    specs = {name: (target, place.shape)}
    if target == FP8:
        scales = "F32"
        if stored == FP8:
            scales = checkpoint.tensors[scale_name(name)].dtype
        elif checkpoint.published_scales and checkpoint.scale_fmt == "ue8m0":
            scales = checkpoint.published_scales[scale_name(name)].dtype
        specs[scale_name(name)] = (scales, scale_shape(place.shape))
    return specs


def chunks(
    checkpoint: Checkpoint, name: str, place: Place, dtype: StorageDType
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(tensor name, first row, rows) of a weight in `dtype`, in order, with its scales if FP8."""
    specs = specs_of(checkpoint, name, place, dtype)
    target = specs[name][0]
    tensor = checkpoint.tensors[name]
    scales = None
    if tensor.dtype == FP8:
        scales = checkpoint.tensors[scale_name(name)].read()
        if target == FP8:
            yield scale_name(name), 0, scales
    row_bytes = num_bytes("F32", place.shape[1:])
    step = max(CHUNK_BYTES // row_bytes // BLOCK, 1) * BLOCK
    for first in range(0, place.shape[0], step):
        rows = tensor.read(first, min(first + step, place.shape[0]))
        if target == tensor.dtype:
            yield name, first, rows
        elif target == FP8:
            scale_format = "ue8m0" if checkpoint.scale_fmt == "ue8m0" else "f32"
            quantized = quantize_rows(rows, scale_format)
            made = np.asarray(quantized.values), np.asarray(quantized.scales)
            if checkpoint.published_scales:
                blocks = first // BLOCK, -(-(first + len(rows)) // BLOCK)
                old = checkpoint.published_scales[scale_name(name)].read(*blocks)
                made = as_published(rows, *made, old, BLOCK)
            kind = specs[scale_name(name)][0]
            yield name, first, made[0]
            yield scale_name(name), first // BLOCK, made[1].astype(DTYPES[kind], copy=False)
        elif scales is not None:
            of_rows = scales[first // BLOCK : -(-(first + len(rows)) // BLOCK)]
            yield name, first, dequantize_rows(rows, of_rows, target)
        else:
            yield name, first, rows.astype(DTYPES[target])


def dequantize_rows(values: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers of FP8 rows (from a multiple of 128 on) and their scales, in F32 or BF16.

    What `quantization.dequantize` returns, bit for bit, but on the host: rows that go from file
    to file need no device, and no program compiled for each of a checkpoint's 20 shapes.
    """
    rows, columns = values.shape
    numbers = _E4M3_NUMBERS[values.view(np.uint8)]
    scales = scales.astype(np.float32)
    numbers *= np.repeat(np.repeat(scales, BLOCK, axis=1)[:, :columns], BLOCK, axis=0)[:rows]
    return numbers.astype(DTYPES[dtype], copy=False)


@functools.partial(jax.jit, static_argnames="scale_format")
def quantize_rows(rows: Any, scale_format: ScaleFormat) -> BlockScaled:
    """Rows, from a multiple of 128 on, in FP8 blocks of 128x128."""
    return quantize(rows, PER_BLOCK, scale_format)


def unconverted(checkpoint: Checkpoint, dtype: StorageDType) -> list[str]:
    """Modules that are not FP8 in `dtype` although V3 publishes them so, where others are FP8.

    With `lm_head`: a list that names any takes the place of what runtimes leave out by themselves.
    """
    kinds = {}
    for name, place in checkpoint.places.items():
        if place.fp8:
            kinds[name] = specs_of(checkpoint, name, place, dtype)[name][0]
    found = [name.removesuffix(".weight") for name, kind in kinds.items() if kind != FP8]
    return ["lm_head", *found] if 0 < len(found) < len(kinds) else []


def tell_not_finite(bad: Counter[str], what: str) -> None:
    """Logs a line about tensors with numbers that are NaN or infinite, which `bad` counts."""
    if bad:
        log.warning("%s: NaN or infinite numbers in %s", what, most_not_finite(bad))


def most_not_finite(bad: Counter[str], most: int = 16) -> str:
    """The tensors with the most such numbers, and how many others there are."""
    named = ", ".join(f"{name} ({count})" for name, count in bad.most_common(most))
    return named + (f" and {len(bad) - most} more" if len(bad) > most else "")


def not_finite(checkpoint: Checkpoint) -> Counter[str]:
    """How many numbers of each tensor are NaN or infinite, of those that have any; reads all."""
    bad: Counter[str] = Counter()

    def look(name: str) -> int:
        tensor = checkpoint.tensors[name]
        step = max(CHUNK_BYTES // max(num_bytes(tensor.dtype, tensor.shape[1:]), 1), 1)
        for first in range(0, tensor.shape[0], step):
            rows = tensor.read(first, min(first + step, tensor.shape[0]))
            if count := count_non_finite(rows):
                bad[name] += count
        return tensor.nbytes

    names = in_file_order(checkpoint.tensors.items())
    size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    for_each(names, look, size, f"reading {checkpoint.folder}")
    return bad


def in_file_order(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names in the order their bytes have on the disk, so that reading is sequential."""

    def position(item: tuple[str, Tensor]) -> tuple[str, int]:
        tensor = item[1]
        return (str(tensor.file), tensor.start) if isinstance(tensor, StoredTensor) else ("", 0)

    return [name for name, _ in sorted(tensors, key=position)]


def for_each(names: list[str], work: Callable[[str], int], total: int, what: str) -> None:
    """Calls work(name) -> bytes done on a few threads, and logs progress every ten seconds.

    The first exception stops the rest and is raised.
    """
    done, last = 0, time.monotonic()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for count in pool.map(work, names):
                done += count
                if time.monotonic() - last > 10:
                    last = time.monotonic()
                    log.info("%s: %.1f of %.1f GB", what, done / 1e9, total / 1e9)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def carry_along(source: Path | None, folder: Path) -> None:
    """Copies the tokenizer's and similar files of `source` to `folder`, links resolved."""
    for path in carried_files(source) if source else ():
        shutil.copyfile(path, folder / path.name)


def carried_files(source: Path) -> Iterator[Path]:
    """The files of a folder that belong to its model besides the weights.

    UserError for one that is too large, a Git LFS pointer, or a link out of the folder.
    """
    for name in CARRIED:
        if not (source / name).exists():
            continue
        path = file_inside(source, name)
        if path.stat().st_size > MAX_CARRIED_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes exceed {MAX_CARRIED_BYTES}")
        with path.open("rb") as file:
            refuse_lfs_pointer(file.read(1024), path)
        yield path


@contextmanager
def finished_folder(dst: Path, size: int, *, overwrite: bool, resume: bool) -> Iterator[Path]:
    """A hidden folder beside `dst` that becomes `dst` when the block ends without an exception.

    With an exception it is removed. One that a killed process left is used again if `resume`, and
    removed otherwise. Raises UserError when `dst` exists and `overwrite` is not asked for, when it
    holds a run's checkpoints, or when another process is at work; OSError when fewer than `size`
    bytes are free.
    """
    dst = dst.absolute()
    exists = dst.exists() and not (dst.is_dir() and not any(dst.iterdir()))
    if exists and not overwrite:
        raise UserError(f"{dst} exists: choose another folder, or --overwrite")
    if _holds_checkpoints(dst):
        raise UserError(f"{dst} holds a run's checkpoints, also with --overwrite: choose another")
    folder = dst.with_name(f".{dst.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing {dst}") from error
        try:
            if not resume:
                _empty(folder)
            _check_space(folder, size)
            yield folder
            _replace(folder, dst)
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _holds_checkpoints(folder: Path) -> bool:
    """Whether it is a run's folder, its checkpoints, or one of these."""
    marks = ("MANIFEST.json", "*/MANIFEST.json", "checkpoints/*")
    return any(any(folder.glob(mark)) for mark in marks)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_space(folder: Path, size: int) -> None:
    there = sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())
    free = shutil.disk_usage(folder).free
    if free + there < size:
        raise OSError(
            errno.ENOSPC,
            f"{size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free",
            str(folder.parent),
        )


def _replace(folder: Path, dst: Path) -> None:
    old = dst.with_name(f".{dst.name}.old")
    if dst.exists():
        dst.rename(old)
    folder.rename(dst)
    parent = os.open(dst.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)
    if old.exists():
        shutil.rmtree(old)
