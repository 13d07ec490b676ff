"""The sha256 of every published matrix, which an import keeps: compared on export, and by `verify`.

Reading a matrix from its first row to its last is enough to compare it, so exporting an import
costs a hash of it and no second reading.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import RunError, UserError
from dsv3_jax.config.files import file_inside, read_bytes
from dsv3_jax.interop.checkpoint import Checkpoint, Tensor, open_imported
from dsv3_jax.interop.import_manifest import MANIFEST, ImportManifest, read_manifest
from dsv3_jax.interop.name_map import scale_name
from dsv3_jax.interop.stream import MAX_CARRIED_BYTES, for_each, in_file_order


def sha256_of(tensor: Tensor, rows: int = 4096) -> str:
    """The sha256, in hex, of a matrix' bytes, read a few rows at a time."""
    digest = hashlib.sha256()
    for first in range(0, tensor.shape[0], rows):
        _add(digest, tensor.read(first, min(first + rows, tensor.shape[0])))
    return digest.hexdigest()


def verify_imported(folder: str | Path) -> list[str]:
    """The published names whose bytes differ from their sha256, or have none; reads all of it."""
    manifest = read_manifest(folder)
    checkpoint, expected = open_imported(folder, manifest), manifest.sha256
    wrong: list[str] = []

    def look(name: str) -> int:
        if sha256_of(checkpoint.tensors[name]) != expected.get(name):
            wrong.append(name)
        return checkpoint.tensors[name].nbytes

    names = in_file_order((n, checkpoint.tensors[n]) for n in _with_digest(checkpoint))
    size = sum(checkpoint.tensors[name].nbytes for name in names)
    for_each(names, look, size, f"verifying {folder}")
    return _damaged_files(folder, manifest) + sorted(wrong)


def _damaged_files(folder: str | Path, manifest: ImportManifest) -> list[str]:
    """The files beside an import's weights (its tokenizer and such) that are not as imported.

    Imports of before that was kept have none to compare.
    """
    folder, wrong = Path(folder), []
    for name, expected in manifest.files.items():
        try:
            raw = read_bytes(file_inside(folder, name), MAX_CARRIED_BYTES)
        except UserError:
            wrong.append(name)
            continue
        if hashlib.sha256(raw).hexdigest() != expected:
            wrong.append(name)
    return wrong


def compared(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of an import with matrices that are compared with their sha256 as they are
    read from first row to last: RunError names one that differs. Others are returned as they are.
    The files beside the weights are compared at once.
    """
    if checkpoint.folder is None or not (checkpoint.folder / MANIFEST).exists():
        return checkpoint
    manifest = read_manifest(checkpoint.folder)
    if wrong := _damaged_files(checkpoint.folder, manifest):
        names = ", ".join(wrong)
        raise RunError(f"{checkpoint.folder}: {names} changed since the import: import it again")
    expected = manifest.sha256
    tensors = dict(checkpoint.tensors)
    for name in _with_digest(checkpoint):
        where = f"{checkpoint.folder}: {name}"
        tensors[name] = _Compared(tensors[name], expected.get(name), where)
    return dataclasses.replace(checkpoint, tensors=tensors)


class _Compared:
    """A matrix that is hashed while a thread reads its rows in order."""

    def __init__(self, tensor: Tensor, expected: str | None, where: str):
        self._tensor, self._expected, self._where = tensor, expected, where
        self._at = threading.local()
        self.dtype, self.shape, self.nbytes = tensor.dtype, tensor.shape, tensor.nbytes

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """As `StoredTensor.read`."""
        last = self.shape[0] if last is None else last
        rows = self._tensor.read(first, last)
        if first == 0:
            self._at.row, self._at.digest = 0, hashlib.sha256()
        if getattr(self._at, "row", None) == first:
            _add(self._at.digest, rows)
            self._at.row = last
            if last == self.shape[0] and self._at.digest.hexdigest() != self._expected:
                raise RunError(f"{self._where} does not match its sha256: import it again")
        return rows


def _with_digest(checkpoint: Checkpoint) -> list[str]:
    """Names of matrices and scales that are stored on their own: an MTP module's copies are not."""
    weights = [name for name, place in checkpoint.places.items() if not place.copy]
    scales = [scale_name(name) for name in weights if scale_name(name) in checkpoint.tensors]
    return weights + scales


def _add(digest: Any, rows: np.ndarray) -> None:
    digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
