"""What supervised shards hold besides tokens: a target bit for each, and where documents begin.

Two files beside the tokens: `targets.bin`, a bit a token, and `documents.bin`, the number of tokens
of each document as uint32. Shards of plain text have neither: there all tokens are targets, and
documents are marked by bos and eos.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from dsv3_jax.config.files import file_inside

TARGETS_FILE, DOCUMENTS_FILE = "targets.bin", "documents.bin"
_LENGTH = np.dtype("<u4")
_PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class SupervisionIndex:
    """The checksums of the two files."""

    targets_sha256: str
    documents_sha256: str


class SupervisionWriter:
    """Writes the two files into a folder, document by document; `close` gives their checksums."""

    def __init__(self, folder: Path):
        self._targets = _HashedFile(folder / TARGETS_FILE)
        self._documents = _HashedFile(folder / DOCUMENTS_FILE)
        self._bits = np.zeros(0, bool)  # fewer than a byte's, not written yet

    def add(self, targets: Bool[np.ndarray, " T"]) -> None:
        """Appends one document's targets."""
        self._documents.write(np.array([targets.size], _LENGTH).tobytes())
        bits = np.concatenate([self._bits, targets])
        whole = bits.size - bits.size % 8
        self._targets.write(np.packbits(bits[:whole]).tobytes())
        self._bits = bits[whole:]

    def close(self) -> SupervisionIndex:
        """The checksums, once both files are complete."""
        self._targets.write(np.packbits(self._bits).tobytes())
        return SupervisionIndex(self._targets.close(), self._documents.close())


class Supervision:
    """The two files of a folder whose shards hold so many documents and tokens.

    ValueError when their sizes or sums differ from that.
    """

    def __init__(self, folder: Path, documents: int, tokens: int):
        self._folder = folder
        paths = folder / TARGETS_FILE, folder / DOCUMENTS_FILE
        for path, size in zip(paths, (-(-tokens // 8), documents * _LENGTH.itemsize)):
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found:,} bytes, not {size:,}"
                raise ValueError(f"{path} {state}")
            file_inside(folder, path.name)
        self.document_starts: Int64[np.ndarray, " starts"] = _starts(paths[1], tokens)
        self._bytes = np.memmap(paths[0], np.uint8, mode="r") if tokens else np.zeros(0, np.uint8)

    def targets(self, start: int, stop: int) -> Bool[np.ndarray, " T"]:
        """Whether each token of [start, stop) is a target."""
        first = start // 8
        bits = np.unpackbits(self._bytes[first : -(-stop // 8)])
        return bits[start - 8 * first : stop - 8 * first].astype(bool)

    def verify(self, index: SupervisionIndex) -> None:
        """Reads both files; ValueError names one whose checksum is not the index's."""
        for name, expected in (
            (TARGETS_FILE, index.targets_sha256),
            (DOCUMENTS_FILE, index.documents_sha256),
        ):
            with (self._folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise ValueError(
                    f"{self._folder / name} does not hold what was written (sha256 "
                    f"{found[:12]}..., expected {expected[:12]}...)"
                )


def _starts(path: Path, tokens: int) -> Int64[np.ndarray, " starts"]:
    """Where each document begins, and `tokens`; a hole in the file ends the reading."""
    parts, total = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while raw := file.read(_PIECE_BYTES):
            lengths = np.frombuffer(raw, _LENGTH).astype(np.int64)
            if not lengths.all():
                raise ValueError(f"{path} has a document without tokens")
            parts.append(total + np.cumsum(lengths))
            total = int(parts[-1][-1])
    if total != tokens:
        raise ValueError(f"{path} sums up to {total:,} tokens, not {tokens:,}")
    return np.concatenate(parts)


class _HashedFile:
    def __init__(self, path: Path):
        self._file: Any = path.open("wb", buffering=2**20)
        self._sha256 = hashlib.sha256()

    def write(self, raw: bytes) -> None:
        self._file.write(raw)
        self._sha256.update(raw)

    def close(self) -> str:
        self._file.close()
        return self._sha256.hexdigest()
