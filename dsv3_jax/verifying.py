"""Folders read whole and compared with what they should hold: `python -m dsv3_jax verify DIR`.

It joins rooms that do not see each other: `training` knows a run's checkpoints, `interop` imports
and published weights, `data` prepared tokens. What is damaged is named, a line each; nothing is
changed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dsv3_jax.config import RunError, UserError
from dsv3_jax.config.run import config_of_run
from dsv3_jax.data.corpus import damage_of_prepared, is_prepared
from dsv3_jax.data.shards import INDEX_FILE, TokenShards
from dsv3_jax.interop.import_manifest import MANIFEST
from dsv3_jax.training.manifest import MANIFEST as STEP_MANIFEST
from dsv3_jax.training.manifest import damage, steps_in, strangers


class Verified(NamedTuple):
    """What a folder is, and a line for each file or tensor of it that is damaged."""

    kind: str
    damaged: list[str]


def verify(folder: str | Path) -> Verified:
    """Reads all of a run, an import, a Hugging Face folder or prepared data.

    Runs are compared with the manifests of their steps, which must list all that lies there;
    imports and prepared data with their sha256; of published weights, which bring none, the headers
    must fit config.json and every number must be finite. Raises UserError for a folder that is none
    of these.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for kind, is_one, look in _KINDS:
        if is_one(folder):
            try:
                return Verified(kind, look(folder))
            except (UserError, RunError) as error:  # so damaged that it cannot be opened
                return Verified(kind, [str(error)])
    raise UserError(
        f"{folder}: neither a run, nor an import, nor a Hugging Face folder, nor prepared data"
    )


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir() or bool(steps_in(folder))


def _run(folder: Path) -> list[str]:
    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    steps = steps_in(checkpoints)
    found = [] if steps else [f"{checkpoints}: holds no step"]
    for step in steps:
        here = checkpoints / str(step)
        if problem := damage(here):
            found.append(f"{here}: {problem}")
            continue
        more = strangers(here)
        found += [f"{here}: {name} is not in its {STEP_MANIFEST}" for name in more[:12]]
        if more[12:]:
            found.append(f"{here}: and {len(more) - 12} more files")
    if (folder / "config.json").exists():
        try:
            config_of_run(folder)
        except UserError as error:
            found.append(str(error))
    return found


def _is_import(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def _import(folder: Path) -> list[str]:
    from dsv3_jax.interop.digests import verify_imported

    return [f"{folder}: {name} does not match its sha256" for name in verify_imported(folder)]


def _is_published(folder: Path) -> bool:
    from dsv3_jax.interop.checkpoint import is_weights_folder

    return is_weights_folder(folder)


def _published(folder: Path) -> list[str]:
    from dsv3_jax.interop.checkpoint import open_hf
    from dsv3_jax.interop.stream import not_finite

    bad = not_finite(open_hf(folder))
    return [f"{folder}: {name}: {n} numbers are NaN or infinite" for name, n in bad.items()]


def _is_shards(folder: Path) -> bool:
    return (folder / INDEX_FILE).exists()


# In this order: a folder is the first of these that it may be.
_KINDS: tuple[tuple[str, Callable[[Path], bool], Callable[[Path], list[str]]], ...] = (
    ("prepared data", is_prepared, damage_of_prepared),
    ("a run", _is_run, _run),
    ("an import", _is_import, _import),
    ("token shards", _is_shards, lambda folder: TokenShards(folder).damage()),
    ("a Hugging Face folder", _is_published, _published),
)
