"""Documents of text from files: .txt, source trees, .jsonl, .jsonl.gz and .parquet.

A file that the user names must be readable; in a folder, files that are not text are skipped, and
`skipped` counts them by reason. Damaged structured data (a bad JSON line, a missing field) is an
error everywhere. Memory is bounded by the largest document; one of a line or a row has at most
MAX_RECORD_BYTES, however little of a compressed file it takes.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dsv3_jax.config import UserError
from dsv3_jax.config.files import MAX_VALUES, shown
from dsv3_jax.data.parquet import parquet_columns, parquet_rows

MAX_RECORD_BYTES = 64 << 20

# Folders of the standard library that are not its source: tests, installed packages, caches.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class InputFile:
    """A file of documents; `named` by the user, or found in a folder."""

    path: Path
    named: bool


@dataclass(frozen=True)
class Inputs:
    """The files of a corpus in reading order, and the entries of folders that are not read."""

    files: tuple[InputFile, ...]
    skipped: Counter[str]


def find_files(inputs: Iterable[str | Path]) -> Inputs:
    """Every file of the inputs; folders are walked in sorted order, without hidden entries.

    UserError names an input that is missing.
    """
    files: list[InputFile] = []
    skipped: Counter[str] = Counter()
    for path in map(Path, inputs):
        if path.is_file():
            files.append(InputFile(path, named=True))
        elif path.is_dir():
            files += [InputFile(found, named=False) for found in _walk(path, skipped)]
        else:
            raise UserError(f"{path}: no such file or folder")
    return Inputs(tuple(files), skipped)


def stdlib_files() -> Inputs:
    """The running Python's standard library source, without its tests: about 12 MB in 700 files."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[InputFile] = []
    for folder, names, leaves in os.walk(root):
        names[:] = sorted(set(names) - _NOT_STDLIB)
        files += [InputFile(Path(folder, leaf), False) for leaf in leaves if leaf.endswith(".py")]
    if not files:
        raise UserError(
            f"data.path 'stdlib': no .py files under {root} (is Python's library zipped or "
            "compiled?); point data.path at a text file or folder"
        )
    files.sort(key=lambda file: file.path.relative_to(root).as_posix())
    return Inputs(tuple(files), Counter())


def read_documents(
    inputs: Inputs, text_field: str = "text", skipped: Counter[str] | None = None
) -> Iterator[str]:
    """The documents of all files, in order; empty ones are left out.

    Adds to `skipped` what was passed over, by reason. Raises UserError naming the file and the
    place: a byte offset, or a line or row number.
    """
    skipped = Counter() if skipped is None else skipped
    skipped.update(inputs.skipped)
    for file in inputs.files:
        try:
            for text in _READERS[_kind(file.path)](file.path, text_field):
                if text:
                    yield text
                else:
                    skipped["empty document"] += 1
        except NotText as error:
            if file.named:
                raise
            skipped[error.reason] += 1
        except OSError as error:
            if file.named:
                raise UserError(f"cannot read {file.path}: {error.strerror or error}") from error
            skipped["unreadable file"] += 1


def read_records(inputs: Inputs) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of every JSON line and parquet row, in order.

    The place is "file:line" or "file: row N". UserError for another kind of file, and for whatever
    is no record.
    """
    for file in inputs.files:
        reader = _RECORDS.get(_kind(file.path))
        if reader is None:
            raise UserError(
                f"{file.path}: conversations come in .jsonl, .jsonl.gz or .parquet, and this is "
                "none of them: prepare plain text apart"
            )
        try:
            yield from reader(file.path)
        except OSError as error:
            raise UserError(f"cannot read {file.path}: {error.strerror or error}") from error


class NotText(UserError):
    """A file that holds no text."""

    def __init__(self, path: Path, reason: str, offset: int):
        super().__init__(
            f"{path}: {reason} at byte {offset:,}: not a text file "
            "(.txt or other UTF-8 text, .jsonl, .jsonl.gz and .parquet are read)"
        )
        self.reason = reason


def _walk(root: Path, skipped: Counter[str]) -> Iterator[Path]:
    for folder, names, leaves in os.walk(root):
        hidden = [name for name in names + leaves if name.startswith(".")]
        if hidden:
            skipped["hidden file or folder"] += len(hidden)
        names[:] = sorted(set(names) - set(hidden))
        for leaf in sorted(set(leaves) - set(hidden)):
            path = Path(folder, leaf)
            if path.is_file():
                yield path
            else:  # a pipe, a socket, a dangling link
                skipped["not a regular file"] += 1


def _kind(path: Path) -> str:
    name = path.name.lower()
    return next((end for end in (".jsonl", ".jsonl.gz", ".parquet") if name.endswith(end)), "text")


def _read_text(path: Path, text_field: str) -> Iterator[str]:
    yield _decode(path, path.read_bytes())


def _decode(path: Path, raw: bytes) -> str:
    if (offset := raw.find(b"\0")) >= 0:
        raise NotText(path, "a NUL byte", offset)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise NotText(path, "bytes that are not UTF-8", error.start) from error


def _text_of_records(path: Path, text_field: str) -> Iterator[str]:
    for place, record in _RECORDS[_kind(path)](path):
        text = record.get(text_field)
        if not isinstance(text, str):
            raise _no_text(place, text_field, record)
        yield text


def _jsonl_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        yield from _json_records(path, file)


def _jsonl_gz_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with gzip.open(path, "rb") as file:
            yield from _json_records(path, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file: {error}") from error


def _json_records(
    path: Path, file: IO[bytes] | gzip.GzipFile
) -> Iterator[tuple[str, dict[str, Any]]]:
    for number in itertools.count(1):
        line = file.readline(MAX_RECORD_BYTES + 1)
        if not line:
            return
        place = f"{path}:{number}"
        if len(line) > MAX_RECORD_BYTES:
            raise UserError(f"{place}: a line of more than {MAX_RECORD_BYTES:,} bytes")
        if not line.strip():
            continue
        try:
            _check_number_of_values(line)
            record = _without_surrogates(json.loads(line.rstrip().decode()))
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: not UTF-8 at byte {error.start} of the line") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{place}: a {type(record).__name__}, not a JSON object")
        yield place, record


def _check_number_of_values(line: bytes) -> None:
    """ValueError for JSON of more than MAX_VALUES values, before it is parsed into memory."""
    if sum(map(line.count, (b",", b"[", b"{"))) <= MAX_VALUES:
        return
    outside = re.sub(rb'"[^"\\]*(?:\\.[^"\\]*)*"', b"", line)  # a text may hold many commas
    if sum(map(outside.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} values")


def _without_surrogates(value: Any) -> Any:
    """JSON can spell half a surrogate pair, which no UTF-8 can hold: U+FFFD instead."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(k): _without_surrogates(v) for k, v in value.items()}
    return value


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, row in parquet_rows(path):
        # Lists of objects, as messages are, bring every object's fields: null where it has none.
        yield place, _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return value


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    columns = parquet_columns(path)
    if text_field not in columns:
        raise _no_text(str(path), text_field, columns)
    for place, row in parquet_rows(path, text_field):
        text = row[text_field]
        if not isinstance(text, str):
            raise UserError(f"{place}: {text_field!r} is {type(text).__name__}, not text")
        yield text


def _no_text(place: str, text_field: str, fields: Iterable[Any]) -> UserError:
    names = ", ".join(map(shown, list(fields)[:8])) or "none"
    return UserError(
        f"{place}: no text in field {text_field!r}; fields here: {names} (choose with --text-field)"
    )


_RECORDS = {
    ".jsonl": _jsonl_records,
    ".jsonl.gz": _jsonl_gz_records,
    ".parquet": _parquet_records,
}
_READERS = {
    "text": _read_text,
    ".jsonl": _text_of_records,
    ".jsonl.gz": _text_of_records,
    ".parquet": _read_parquet,
}
