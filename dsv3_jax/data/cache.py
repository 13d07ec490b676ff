"""Where tokens are cached, by what name, and how several processes share one place."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv3_jax.config import UserError
from dsv3_jax.data.documents import Inputs


def default_cache_dir() -> Path:
    """dsv3_jax in the user's cache folder: $XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3_jax"


@contextmanager
def told_when_full(out: Path, inputs: Inputs, vocab_size: int) -> Iterator[None]:
    """Where the disk is full, an OSError with the place and about how many bytes are wanted."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        texts = sum(file.path.stat().st_size for file in inputs.files)
        width = 2 if vocab_size <= 2**16 else 4
        raise OSError(
            error.errno,
            f"{error.strerror}: the tokens of {texts:,} bytes of files take up to "
            f"{width * texts:,} (more where those are compressed)",
            str(out),
        ) from error


def fingerprints(inputs: Inputs, path: str) -> list[list[Any]]:
    """What tells files apart: path, size and time of change.

    The standard library's files count by name and size, with Python's version.
    """
    files: list[list[Any]] = []
    for file in inputs.files:
        status = file.path.stat()
        if path == "stdlib":
            files.append([platform.python_version(), file.path.name, status.st_size])
        else:
            files.append([str(file.path.resolve()), status.st_size, status.st_mtime_ns])
    return files


def short_hash(made_of: list[Any]) -> str:
    """The name of what is made of these, all JSON."""
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:20]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a lock beside a cache folder, so that of several processes one builds, others wait."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise UserError(
            f"cannot use the token cache {folder.parent}: {error.strerror or error}; set "
            "XDG_CACHE_HOME to a folder that can be written, or give a prepared folder"
        ) from error
    with lock:  # closing it lets go of the lock
        yield


def remove(folder: Path) -> None:
    """Removes a damaged cache."""
    # Renamed first: whoever has the files open keeps them, and no half-removed cache is ever seen.
    grave = Path(tempfile.mkdtemp(prefix=f".{folder.name}.damaged-", dir=folder.parent))
    folder.rename(grave / folder.name)
    shutil.rmtree(grave)
