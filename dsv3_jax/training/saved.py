"""What a step says of itself, besides its arrays: read without JAX, so that any tool may look.

Nothing here changes what is on disk. Of several processes each reads by itself; `restore.py` has
the same questions asked once and answered to all.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_jax.config import RunError, UserError
from dsv3_jax.config.files import build, file_inside, read_json, shown
from dsv3_jax.training.manifest import cut_off, damage, steps_in

log = logging.getLogger(__name__)

# Where the `meta` that `save` got lies.
_META_FILE = "meta/metadata"
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class _Saved:
    """What a step holds besides its arrays."""

    format: int
    arrays: dict[str, str]  # "float32[3, 5]" by path
    meta: dict[str, Any]
    jax: str | None = None
    orbax: str | None = None


class CheckpointError(RunError):
    """Checkpoints cannot be written, or none of those there can be trusted (exit code 1)."""


def newest_valid(folder: Path) -> int | None:
    """The newest step that matches its manifest, or None when no step was ever saved whole.

    Errors as in `restore.latest_valid`.
    """
    steps = [step for step in steps_in(folder) if not cut_off(folder / str(step))]
    wrong = []
    for step in reversed(steps):
        problem = damage(folder / str(step))
        if problem is None:
            return step
        wrong.append(f"step {step}: {problem}")
        log.warning("checkpoint %s is damaged: %s", folder / str(step), problem)
    if not steps:
        return None
    raise CheckpointError(
        f"none of the {len(steps)} checkpoints in {folder} is valid, and nothing was changed:\n  "
        + "\n  ".join(wrong)
        + "\nStart again with --resume never (it keeps them, as checkpoints.old-N)."
    )


def pick_step(folder: Path, step: int | str) -> int:
    """The valid step that "auto" (the newest) or a number stands for; errors as in `restore`."""
    if step == "auto":
        if (newest := newest_valid(folder)) is None:
            raise UserError(f"no checkpoint in {folder}")
        return newest
    if isinstance(step, str) and not (step.isascii() and step.isdecimal()):
        raise UserError(f"step {step} must be auto or a step number")
    if int(step) not in (there := steps_in(folder)):
        has = f"it has {listed(there)}" if there else "it has none"
        raise UserError(f"no checkpoint of step {step} in {folder}: {has}")
    if problem := damage(folder / str(step)):
        raise CheckpointError(f"checkpoint {folder / str(step)} is damaged: {problem}")
    return int(step)


def read_saved(step_folder: Path) -> dict[str, Any]:
    """What a step holds besides its arrays: `meta`, the arrays' types, and the versions that saved.

    Raises UserError when there is no such step, CheckpointError when it cannot be read.
    """
    if not step_folder.is_dir():
        raise UserError(f"no checkpoint {step_folder}")
    try:
        path = file_inside(step_folder, _META_FILE)
        saved = build(_Saved, read_json(path, MAX_BYTES), path)
        if saved.format != 1:
            raise ValueError(f"its format is {saved.format}, this program reads 1")
        config = saved.meta.get("config")
        model = config.get("model") if isinstance(config, dict) else None
        for name, value in (("config", config), ("config.model", model)):
            if not isinstance(value, dict | None):
                raise ValueError(f"meta.{name}={shown(value)} is not an object")
    except (ValueError, OSError) as error:
        reason = str(error).removeprefix(f"{step_folder}/")
        raise CheckpointError(f"checkpoint {step_folder} cannot be read: {reason}") from error
    return vars(saved)


def listed(steps: list[int]) -> str:
    """Step numbers for a message, the middle of a long list left out."""
    names = [str(step) for step in steps]
    return ", ".join(names if len(names) <= 8 else names[:3] + ["..."] + names[-3:])
