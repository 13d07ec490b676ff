"""The folder of a run: one run at a time, and nothing in it changed before it is that run's own.

`RunFolder` holds a lock that ends with its process. A run that begins anew in a used folder sets
the old one's files aside, under names that say so, and deletes none of them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from pathlib import Path

import jax

from dsv3_jax.config import Config, UserError, to_json
from dsv3_jax.data.tiktoken_model import CODE_FILES
from dsv3_jax.data.tokenizer import KEPT_WITH_WEIGHTS, Tokenizer
from dsv3_jax.training.restore import process_0_says

log = logging.getLogger(__name__)

LOCK = ".lock"
# What a run writes besides its checkpoints, and what would be another run's under the same name.
OWN_FILES = (
    "config.json",
    "metrics.jsonl",
    "sample.txt",
    "samples.jsonl",
    "tensorboard",
    "wandb",
    "report.html",
    # of the weights that it began with
    "origin.json",
    "published_scales.safetensors",
    *KEPT_WITH_WEIGHTS,
    *CODE_FILES,
)
# One of these is in every run's folder, from its first moments on.
_MARKS = ("log.txt", "metrics.jsonl", "checkpoints")


class RunFolder:
    """Use as a context manager: inside it, no other process on this file system has the folder.

    Of several processes of one run, the first holds the lock. It is flock's on RUN/.lock: it ends
    with the process that holds it, however that ends. On NFS it holds between hosts from Linux
    2.6.12 on; where a file system has no locks, a warning says so. Raises UserError when another
    run has the folder, or when files that a run would set aside lie there without a run; OSError,
    which names --run-dir, when it is none or cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = -1

    def __enter__(self) -> RunFolder:
        process_0_says(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock >= 0:
            # Whoever opened the file in the meantime sees that it is no longer the folder's.
            (self.path / LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1

    def has_nothing_to_do(self, start: int | None, steps: int) -> bool:
        """Whether a run at step `start` has made its `steps`, and what is written after them."""
        if start is None or start < steps:
            return False
        return start > steps or process_0_says(lambda: self._is_finished(steps))

    def _is_finished(self, steps: int) -> bool:
        try:
            with (self.path / "metrics.jsonl").open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
                record = json.loads(file.read(4096).splitlines()[-1])
            return record["step"] == steps and "seconds" in record
        except (OSError, IndexError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def claim(
        self,
        config: Config,
        tokenizer: Tokenizer,
        chat_template: Path | None = None,
        *,
        new: bool,
    ) -> None:
        """Writes config.json, the tokenizer's file and the chat template that the data was written
        by, each whole or not at all.

        With `new`, the files of an older run get names of their own: config.old-1.json and so on.
        """
        if jax.process_index():
            return
        if new:
            self._set_aside()
        write_whole(self.path / "config.json", to_json(config).encode())
        for name, path in tokenizer.files.items():
            write_whole(self.path / name, path.read_bytes())
        if chat_template is not None:
            write_whole(self.path / chat_template.name, chat_template.read_bytes())

    def _set_aside(self) -> None:
        old = [self.path / name for name in OWN_FILES if (self.path / name).exists()]
        if not old:
            return
        n = 1
        while any(_aside(path, n).exists() for path in old):
            n += 1
        for path in old:
            path.rename(_aside(path, n))
        names = ", ".join(_aside(path, n).name for path in old)
        log.warning("a new run starts in %s: the older one's files are now %s", self.path, names)

    def _enter(self) -> None:
        foreign = [name for name in OWN_FILES if (self.path / name).exists()]
        if foreign and not any((self.path / mark).exists() for mark in _MARKS):
            raise UserError(
                f"--run-dir {self.path} holds no run, but {', '.join(foreign[:4])}, which a run "
                "would set aside: choose another folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        except OSError as error:
            reason = "it is a file" if self.path.is_file() else error.strerror
            if self.path.is_symlink() and not self.path.exists():
                reason = "it is a link to nowhere"
            raise OSError(f"--run-dir {self.path} cannot be used: {reason}") from error

    def _locked(self) -> int:
        file = self.path / LOCK
        while True:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                raise UserError(
                    f"--run-dir {self.path} is in use by another run"
                    + (f" ({holder})" if holder.isprintable() and holder else "")
                    + ": wait for its end, stop it, or choose another --run-dir"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    os.close(descriptor)
                    raise
                log.warning("%s has no locks: a second run in it would not be noticed", self.path)
                return descriptor
            # The holder before may have removed the file between our open and our lock.
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
            os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under another name, then renames it; one that holds this already is left."""
    if path.exists() and path.read_bytes() == content:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = f"{error.strerror}; {len(content):,} bytes are wanted"
        raise OSError(error.errno, reason, str(path)) from error
    temporary.replace(path)


def _aside(path: Path, n: int) -> Path:
    return path.with_name(f"{path.stem}.old-{n}{path.suffix}")
