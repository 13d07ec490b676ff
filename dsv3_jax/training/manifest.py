"""The manifest of a checkpoint: the size and sha256 of each file of a step, written last.

Orbax restores a bit-flipped file, and lists an emptied folder as a step, without an error. Here a
step counts once `MANIFEST.json` is there, and is good while every file matches it.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dsv3_jax.config import UserError
from dsv3_jax.config.files import build, file_inside, read_json

MANIFEST = "MANIFEST.json"
SAVING = ".saving-"  # and the step, beside its folder: its save has begun
TEMPORARY = ".orbax-checkpoint-tmp"  # orbax renames `<step>` + this to `<step>` when it commits


_MAX_BYTES = 64 << 20  # a file takes some 150 bytes


@dataclass(frozen=True)
class _File:
    size: int
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    format: int
    files: dict[str, _File]


def steps_in(folder: str | Path) -> list[int]:
    """The steps that have a folder of their own, oldest first, whether valid or not."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    names = [p.name for p in folder.iterdir() if p.is_dir()]
    steps = [n for n in names if n.isascii() and n.isdigit() and len(n) < 19]
    return sorted(int(n) for n in steps if n == str(int(n)))


def begin_save(folder: Path, step: int) -> None:
    """Notes that the save of a step begins; `write_manifest` ends it."""
    _note(folder / str(step)).touch()


def cut_off(step_folder: Path) -> bool:
    """Whether the step's save was cut off: it began here, and there is no manifest.

    Orbax renames a step's folder into place when its arrays are written; a process that is killed
    between that and the manifest leaves it so.
    """
    return _note(step_folder).exists() and not (step_folder / MANIFEST).exists()


def _note(step_folder: Path) -> Path:
    return step_folder.with_name(SAVING + step_folder.name)


def damage(step_folder: str | Path) -> str | None:
    """What is wrong with one step's folder, or None when every file matches its manifest.

    Reads all of it; sha256 runs at about 1 to 2 GB/s a core, and files are read in parallel.
    """
    step_folder = Path(step_folder)
    if not step_folder.is_dir():
        return "no such folder"
    if not (step_folder / MANIFEST).exists():
        empty = not any(step_folder.iterdir())
        return "the folder is empty" if empty else f"no {MANIFEST}: the save did not finish"
    try:
        expected = _listed(step_folder)
    except (UserError, OSError) as error:
        told = str(error).removeprefix(f"{step_folder / MANIFEST}: ")
        return f"{MANIFEST} cannot be read ({told})"
    if not expected:
        return f"{MANIFEST} lists no files"

    def check(name: str) -> str | None:
        record = expected[name]
        try:
            path = file_inside(step_folder, name)
            if (found := path.stat().st_size) != record.size:
                return f"{name} has {found} bytes instead of {record.size}"
            return None if _sha256(path) == record.sha256 else f"{name} does not match its sha256"
        except UserError as error:
            missing = f"{step_folder / name}: no such file"
            return f"{name} is missing" if str(error) == missing else str(error)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor() as pool:
        wrong = [problem for problem in pool.map(check, sorted(expected)) if problem]
    more = f" (and {len(wrong) - 1} more files)" if len(wrong) > 1 else ""
    return wrong[0] + more if wrong else None


def strangers(step_folder: str | Path) -> list[str]:
    """The files of a step's folder that its manifest does not list, by name.

    A step with such files is good: one may be a note, or a file browser's. But orbax reads some by
    what lies there, as `array_metadatas/process_1`, so `verify` names them. Raises UserError or
    OSError for a manifest that cannot be read.
    """
    step_folder = Path(step_folder)
    there = {path.relative_to(step_folder).as_posix() for path in _files(step_folder)}
    return sorted(there - _listed(step_folder).keys())


def _files(step_folder: Path) -> list[Path]:
    """All but the manifest itself."""
    manifest = step_folder / MANIFEST
    return sorted(p for p in step_folder.rglob("*") if not p.is_dir() and p != manifest)


def _listed(step_folder: Path) -> dict[str, _File]:
    values = read_json(file_inside(step_folder, MANIFEST), _MAX_BYTES)
    return build(_Manifest, values, step_folder / MANIFEST).files


def write_manifest(step_folder: Path) -> None:
    """Writes size and sha256 of each file of a committed step: under another name, then renamed."""
    paths = _files(step_folder)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_sha256, paths))
    files = {
        path.relative_to(step_folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests)
    }
    temporary = step_folder.parent / f"{step_folder.name}{TEMPORARY}.manifest"
    with temporary.open("w") as file:
        json.dump({"format": 1, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(step_folder / MANIFEST)
    _note(step_folder).unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
