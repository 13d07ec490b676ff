"""Files from strangers: JSON that is bounded before it is parsed, and names that stay in a folder.

Whatever a folder brings besides numbers (configs, indices, manifests) is read here: at most so
many bytes, so many values, so deep, no key twice, no NaN and no number that overflows. `build` then
makes a dataclass of it, whose annotations are the schema. What does not fit is a UserError in one
line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import reprlib
import stat
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from dsv3_jax.config.rules import UserError

Kind = TypeVar("Kind")

# Of config.json and other small files of its kind; V3's has 2 kB.
MAX_CONFIG_BYTES = 1 << 20
# Parsed JSON takes some 100 bytes of memory a value: "[]," in a file of 50 MB would take 1.8 GB.
MAX_VALUES = 1 << 20
MAX_DEPTH = 64
# tokenizer_config.json spells "no limit" as an integer of 31 digits.
_MAX_DIGITS = 40
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def file_inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder; UserError when it is missing or lies elsewhere.

    `name` may lie in a folder within. Neither it nor a link may lead out; but links into the
    `blobs` of the Hugging Face cache that the folder is part of are its normal form.
    """
    if not _stays_inside(name):
        raise UserError(f"{folder}: {shown(name)} is not the name of a file within")
    path, home = folder / name, folder.resolve()
    roots = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    try:
        real = path.resolve()
        is_file = real.is_file()
    except (OSError, RuntimeError, ValueError):  # too long a name, links in a circle, no UTF-8
        raise UserError(f"{folder}: {shown(name)} cannot be the name of a file") from None
    if not any(real.is_relative_to(root) for root in roots):
        raise UserError(f"{path} is a link to {real}, outside its folder: it is not followed")
    if not is_file:
        what = "is not a file" if real.exists() else "no such file"
        raise UserError(f"{path}: {'is a link to nowhere' if path.is_symlink() else what}")
    return path


def check_folder_of(file: Path, what: str) -> None:
    """Raises UserError, naming `what` is to be written, where a file cannot be: its folder is not
    there, or it is a folder itself."""
    if file.is_dir():
        raise UserError(f"{what} {file} is a folder: name a file")
    if not file.parent.is_dir():
        raise UserError(f"{what} {file}: no folder {file.parent} to write it in")


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The JSON object in a small file of the folder; UserError as `file_inside` and `parse_json`,
    OSError."""
    return read_json(file_inside(folder, name), MAX_CONFIG_BYTES)


def read_json(path: Path, max_bytes: int, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """The JSON object in a file of at most `max_bytes`; errors as in `parse_json`, and OSError."""
    raw = read_bytes(path, max_bytes)
    refuse_lfs_pointer(raw, path)
    return parse_json(raw, path, max_values)


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """What a regular file holds; UserError when that is more than `max_bytes`, OSError."""
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device would never end
        raise UserError(f"{path}: not a regular file")
    with path.open("rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise UserError(f"{path}: {path.stat().st_size} bytes exceed the {max_bytes} allowed")
    return raw


def parse_json(raw: bytes, where: str | Path, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """The JSON object in `raw`; UserError, which begins with `where`, for anything else.

    Refused are: more than `max_values` values, deeper than MAX_DEPTH, a key given twice, NaN and
    infinities, integers of more than 40 digits, half a surrogate pair.
    """
    # Every value but the first of its list or object has a comma before it.
    if sum(map(raw.count, (b",", b"[", b"{"))) > max_values:
        raise UserError(f"{where}: more than {max_values} values")
    try:
        value = json.loads(
            raw.decode(),
            object_pairs_hook=no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_of_few_digits,
        )
        if not isinstance(value, dict):
            raise ValueError("holds no JSON object")
        _check_depth(value, whole_text=_SURROGATE.search(raw) is not None)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {_in_one_line(error)}") from error
    return value


def build(kind: type[Kind], values: Any, where: str | Path) -> Kind:
    """The dataclass `kind` with its fields from parsed JSON, each checked against its annotation.

    Annotations may be int (64 bits), float (finite), bool, str, Literal, unions, dataclasses,
    Any, tuple[X, ...] and dict[str, X]. UserError, which begins with `where`, for a field that is
    unknown, missing or of another type.
    """
    try:
        return _object(kind, values, "")
    except _Unfit as error:
        raise UserError(f"{where}: {error}") from None


def shown(value: Any) -> str:
    """A value in an error message: its repr, in one short line however large it is."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's dict, for `object_pairs_hook`; ValueError names a key that appears twice."""
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{shown(twice)} appears twice")
    return made


def _stays_inside(name: Any) -> bool:
    if not isinstance(name, str) or not name or set(name) & set("\\\0"):
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _check_depth(value: Any, *, whole_text: bool) -> None:
    level, depth = [value], 0
    while level:
        if (depth := depth + 1) > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        inner: list[Any] = []
        for container in level:
            items: Iterable[Any] = container
            if isinstance(container, dict):
                if whole_text:
                    "".join(container).encode()  # UnicodeEncodeError for half a surrogate pair
                items = container.values()
            for item in items:
                if isinstance(item, (dict, list)):
                    inner.append(item)
                elif whole_text and isinstance(item, str):
                    item.encode()
        level = inner


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _of_few_digits(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, UnicodeError):
        return "half a surrogate pair" if isinstance(error, UnicodeEncodeError) else "not UTF-8"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


class _Unfit(ValueError):
    """A value that its annotation does not allow."""


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _object(kind: Any, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise _Unfit(f"{path.rstrip('.') or 'it'}: {shown(values)} is not an object")
    hints, made = _hints(kind), {}
    if unknown := values.keys() - hints.keys():
        raise _Unfit(f"unknown field {path}{shown(min(unknown))[1:-1]}")
    for field in dataclasses.fields(kind):
        if field.name in values:
            made[field.name] = _typed(hints[field.name], values[field.name], path + field.name)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise _Unfit(f"{path}{field.name} is missing")
    return kind(**made)


def _typed(hint: Any, value: Any, path: str) -> Any:
    """The value as the annotation has it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _object(hint, value, path + ".")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        *others, last = [a for a in arguments if a is not type(None)]
        for kind in others:
            with contextlib.suppress(_Unfit):
                return _typed(kind, value, path)
        return _typed(last, value, path)
    if origin is typing.Literal:
        if any(type(value) is type(a) and value == a for a in arguments):
            return value
        raise _Unfit(f"{path}={shown(value)} is not {' or '.join(map(repr, arguments))}")
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _typed(arguments[1], v, f"{path}.{shown(k)[1:-1]}") for k, v in value.items()}
    if origin is None and _SIMPLE[hint](value):
        return int(value) if hint is int else value
    raise _Unfit(f"{path}={shown(value)} is not {_NAMES[origin or hint]}")


def _is_int(value: Any) -> bool:
    whole = type(value) is int or (type(value) is float and value.is_integer())
    return whole and abs(value) < 1 << 63


def _is_float(value: Any) -> bool:
    # An integer above 1e308 has no float, so those have 64 bits too.
    return _is_int(value) or (type(value) is float and math.isfinite(value))


_SIMPLE: dict[Any, Callable[[Any], bool]] = {
    int: _is_int,
    float: _is_float,
    bool: lambda value: type(value) is bool,
    str: lambda value: type(value) is str,
}
_NAMES = {
    int: "an integer of 64 bits",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    tuple: "a list",
    dict: "an object",
}


LFS_START = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(start: bytes, path: Path) -> None:
    """Raises UserError when a file begins as a Git LFS pointer does (github.com/git-lfs/git-lfs,
    docs/spec.md): some 130 bytes of text in the place of the file itself."""
    if not start.startswith(LFS_START):
        return
    size = re.search(rb"\nsize (\d{1,15})\n?", start)
    of = f" of {int(size[1]):,} bytes" if size else ""
    raise UserError(
        f"{path}: is a Git LFS pointer, not the file{of} that it stands for: fetch it "
        "(`git lfs pull`, or download it again)"
    )
