"""The safetensors file format: a strict reader and a streaming writer, float8 included.

A file is 8 bytes of header length (little endian), that many bytes of JSON, then the tensors.
Written for checkpoints from strangers: everything in a header is checked before a byte of a tensor
is read, and names are keys, never paths. Tensors are read with pread rather than mmap: the pages of
a mapping count as this process's memory, and a file that shrinks under one ends the process with
SIGBUS where pread gives an error.

The library of the same name (https://github.com/huggingface/safetensors) defines the format. It
cannot give float8 to NumPy, and accepts duplicate names and a million empty tensors.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv3_jax.config import UserError
from dsv3_jax.config.files import LFS_START, no_duplicates, refuse_lfs_pointer, shown

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# V3's 163 headers are about 70 KB each; a whole Kimi-K2 in one file would need 15 MB.
MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 1 << 18
_MAX_DIMS = 16
# Characters that are parsed at once: about, and at most.
_PIECE, _MAX_PIECE = 1 << 16, 1 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a file: enough to read any of its rows, with nothing held open."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its bytes, from the start of the file

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return num_bytes(self.dtype, self.shape)

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows [first, last) of the leading dim as a fresh array of the stored dtype."""
        if not self.shape:
            return self._read_bytes(0, self.nbytes).view(DTYPES[self.dtype]).reshape(())
        last = self.shape[0] if last is None else last
        row = num_bytes(self.dtype, self.shape[1:])
        raw = self._read_bytes(first * row, last * row)
        return raw.view(DTYPES[self.dtype]).reshape(last - first, *self.shape[1:])

    def at(self, position: int, shape: tuple[int, ...]) -> StoredTensor:
        """The `position`-th of the equal parts of `shape` that this tensor is a stack of."""
        size = num_bytes(self.dtype, shape)
        return StoredTensor(self.file, self.dtype, shape, self.start + position * size)

    def _read_bytes(self, begin: int, end: int) -> np.ndarray:
        raw = np.empty(end - begin, np.uint8)
        with open(self.file, "rb", buffering=0) as file:
            done = 0
            while done < raw.size:
                count = os.preadv(file.fileno(), [raw[done:].data], self.start + begin + done)
                if count == 0:
                    raise UserError(f"{self.file}: ends before the data its header announces")
                done += count
        return raw


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this dtype (a name of the format) and shape."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def read_header(path: str | Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """(tensors by name, metadata) of a file, every offset checked; reads no tensor.

    Raises UserError that names the file and the tensor when the header is too large, is not JSON,
    holds a name twice, an unknown dtype or an impossible shape, or when the tensors do not fill the
    file exactly: no gap, no overlap, nothing cut off, nothing after the last.
    """
    path = Path(path)
    with open(path, "rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if prefix == LFS_START[:8]:
            refuse_lfs_pointer(prefix + file.read(1024), path)
        if len(prefix) < 8:
            raise UserError(f"{path}: {file_size} bytes are no safetensors file")
        length = int.from_bytes(prefix, "little")
        if length > file_size - 8:
            raise UserError(f"{path}: the header's {length} bytes exceed the file's {file_size}")
        if length > MAX_HEADER_BYTES:
            raise UserError(f"{path}: the header's {length} bytes exceed {MAX_HEADER_BYTES}")
        text = file.read(length)
    if not text.startswith(b"{"):
        raise UserError(f"{path}: the header does not start with '{{'")
    tensors: dict[str, StoredTensor] = {}
    metadata: Any = None
    pieces = _pieces(text, path)
    del text  # `_pieces` lets go of it once it is decoded
    for piece in pieces:
        for name, entry in piece.items():
            if name in tensors or (name == "__metadata__" and metadata is not None):
                raise UserError(f"{path}: {shown(name)} appears twice")
            if name == "__metadata__":
                metadata = entry
                continue
            if not name.isprintable():
                raise UserError(f"{path}: {shown(name)} is no name of a tensor")
            if len(tensors) == MAX_TENSORS:
                raise UserError(f"{path}: more than {MAX_TENSORS} tensors")
            tensors[name] = _checked_entry(path, name, entry, 8 + length)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path}: __metadata__ must hold strings only")
    _check_layout(path, tensors, 8 + length, file_size)
    return tensors, metadata


def _pieces(header: bytes, path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a header, some hundreds at a time, so that parsing takes bounded memory.

    Parsed as a whole, 50 MB of "[]," become 1.8 GB of lists.
    """
    try:
        text = header.decode().rstrip(" \t\n\r")
        del header
        at, end = 1, len(text) - 1
        while at < end:
            border = _BORDER.search(text, at + _PIECE, at + _MAX_PIECE)
            stop, following = (border.start() + 1, border.end() - 1) if border else (end, end)
            if stop - at > _MAX_PIECE:
                raise ValueError(f"an entry is longer than {_MAX_PIECE - _PIECE} characters")
            yield _DECODER.decode("{" + text[at:stop] + ("}" if border else text[end]))
            at = following
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: the header is no JSON object: {reason}") from None


def encode_header(
    specs: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """(the file's first bytes, where each tensor starts in the file) for (dtype, shape) by name.

    Wide dtypes come first, as the library writes them, so that every tensor is aligned to its own
    item size; within a dtype the order is that of `specs`. The first tensor starts at a multiple
    of 8.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset, offsets = 0, {}
    for name in sorted(specs, key=lambda name: -DTYPES[specs[name][0]].itemsize):
        dtype, shape = specs[name]
        end = offset + num_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offsets[name], offset = offset, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES or len(specs) > MAX_TENSORS:
        raise ValueError(f"{len(specs)} tensors are too many for one file's header")
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: data + at for n, at in offsets.items()}


class Writer:
    """A file whose tensors are all announced first and then written in any order, in pieces.

    `specs` are (dtype, shape) by name. `keep=True` opens a file that an earlier Writer with the
    same specs left unfinished, and keeps what is in it. Safe to call from several threads.
    """

    def __init__(
        self,
        path: str | Path,
        specs: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        *,
        keep: bool = False,
    ):
        head, starts = encode_header(specs, metadata)
        self.path, self.specs = Path(path), dict(specs)
        self.tensors = {n: StoredTensor(self.path, *specs[n], starts[n]) for n in specs}
        size = max([len(head)] + [t.start + t.nbytes for t in self.tensors.values()])
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | (0 if keep else os.O_TRUNC), 0o644)
        os.ftruncate(self._fd, size)
        _write_at(self._fd, memoryview(head), 0)

    def write(self, name: str, array: np.ndarray, offset: int = 0) -> None:
        """Writes the array's bytes `offset` bytes into the tensor."""
        tensor = self.tensors[name]
        assert 0 <= offset <= tensor.nbytes - array.nbytes, (name, offset, array.shape)
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        _write_at(self._fd, raw.data, tensor.start + offset)

    def sync(self) -> None:
        """Returns when all that was written is on the disk."""
        os.fsync(self._fd)

    def close(self, *, sync: bool = True) -> None:
        """Closes the file, its bytes on the disk when `sync`."""
        if sync:
            self.sync()
        os.close(self._fd)


@contextmanager
def open_writer(path: str | Path, specs: Any, metadata: Any = None) -> Iterator[Writer]:
    """A Writer that is closed at the end; the file is synced only when nothing was raised."""
    writer = Writer(path, specs, metadata)
    try:
        yield writer
    except BaseException:
        writer.close(sync=False)
        raise
    writer.close()


def save_file(
    tensors: Mapping[str, np.ndarray], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file of NumPy arrays (ml_dtypes included) at once."""
    specs = {name: (DTYPE_NAMES[array.dtype], array.shape) for name, array in tensors.items()}
    with open_writer(path, specs, metadata) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def load_file(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a file, in memory, by name."""
    return {name: tensor.read() for name, tensor in read_header(path)[0].items()}


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _checked_entry(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    if problem := _entry_problem(entry):
        raise UserError(f"{path}: tensor {shown(name)} {problem}")
    return StoredTensor(
        path, entry["dtype"], tuple(entry["shape"]), data + entry["data_offsets"][0]
    )


def _entry_problem(entry: Any) -> str | None:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        return "must have dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has dtype {shown(dtype)}; known are {', '.join(DTYPES)}"
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        return "has an impossible shape"
    if not _are_sizes(offsets) or len(offsets) != 2:
        return "has impossible data_offsets"
    if offsets[1] - offsets[0] != (size := num_bytes(dtype, tuple(shape))):
        return f"is {dtype} {shape} of {size} bytes, but its data_offsets are {offsets}"
    return None


def _check_layout(path: Path, tensors: dict[str, StoredTensor], data: int, file_size: int) -> None:
    expected = data
    for start, size, name in sorted((t.start, t.nbytes, name) for name, t in tensors.items()):
        if start != expected:
            what = "overlaps the one before it" if start < expected else "leaves a gap"
            raise UserError(f"{path}: tensor {shown(name)} {what}")
        expected = start + size
    if expected != file_size:
        raise UserError(
            f"{path}: has {file_size} bytes, but its header describes {expected}: "
            + (
                "it is cut off"
                if file_size < expected
                else "there is something after the last tensor"
            )
        )


def _are_sizes(values: Any) -> bool:
    if not isinstance(values, list) or not {int}.issuperset(map(type, values)):
        return False
    return not values or (min(values) >= 0 and max(values) < 1 << 63)


_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_DECODER = json.JSONDecoder(object_pairs_hook=no_duplicates)
# Between two entries. Within a string it would need its quotation mark escaped.
_BORDER = re.compile(r"\}\s*,\s*\"")
