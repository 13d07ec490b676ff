"""What was saved of a run, read back: which step is good, whose it is, and its arrays.

- The newest step that matches its manifest is used, and what is wrong with newer ones is said;
- a step whose save was cut off counts for nothing, also where it is the first;
- when steps exist and none is good, it refuses (CheckpointError) rather than start over;
- a step of another architecture is refused with the differences (UserError).

Nothing here changes what is on disk. With several processes, all call the same functions in the
same order on one shared file system; process 0 checks, decides and tells.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dsv3_jax.config import Config, UserError
from dsv3_jax.config.files import file_inside, read_json, shown
from dsv3_jax.training.hushed_arrays import hush_other_arrays
from dsv3_jax.training.saved import (
    MAX_BYTES,
    CheckpointError,
    newest_valid,
    pick_step,
    read_saved,
)

log = logging.getLogger(__name__)

# A run may change these and go on: they say how to compute, or how far, not what the weights are.
_MAY_CHANGE = ("dtype", "initializer_range", "max_position_embeddings", "rope_scaling")

# What orbax writes beside each of its items.
_CHECKPOINT_FILE = "_CHECKPOINT_METADATA"
# What orbax and TensorStore raise for files that they did not write.
_UNREADABLE = (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError)

PyTree = Any
T = TypeVar("T")


def latest_valid(folder: str | Path) -> int | None:
    """The newest step that matches its manifest, or None when no step was ever saved whole.

    Damaged newer steps are named on the log. Raises CheckpointError when steps exist and none is
    valid: starting over is the user's decision (`--resume never`).
    """
    return process_0_says(lambda: newest_valid(Path(folder)))


def read_meta(folder: str | Path, step: int | str = "auto") -> tuple[int, dict[str, Any]]:
    """(step, the `meta` that `save` got), of a step or of the newest valid one ("auto").

    All files of the step are compared with its manifest, so `read_state` may follow. Errors as in
    `restore`.
    """
    number = valid_step(Path(folder), step)
    return number, read_saved(Path(folder) / str(number))["meta"]


def restore(
    folder: str | Path,
    step: int | str,
    abstract_state: PyTree,
    config: Config | None = None,
    *,
    partial: bool = False,
) -> tuple[PyTree, dict[str, Any]]:
    """(state, meta) of a step, or of the newest valid one ("auto"); changes nothing on disk.

    `abstract_state` is a pytree of jax.ShapeDtypeStruct; each leaf is restored bit for bit onto its
    own sharding (of any mesh; the first device when it has none). `partial=True` restores only the
    dict entries named in it, such as the parameters without the optimizer's state. With `config`,
    its model must be the one that was saved. Raises UserError for another architecture (with the
    differences) or a step that is not there, CheckpointError for a damaged one.
    """
    folder = Path(folder)
    return read_state(folder, valid_step(folder, step), abstract_state, config, partial=partial)


def state_sha256(state: PyTree) -> str:
    """The sha256, in hex, of every leaf's path, dtype, shape and bytes; the same on any mesh."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        dtype = str(leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        array = np.asarray(leaf)
        digest.update(f"{_name(path)} {dtype}{list(leaf.shape)}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def state_bytes(abstract_state: PyTree) -> int:
    """Bytes of a whole state, and so, nearly, of one checkpoint (compression saves a few %)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state))


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def array_types(tree: PyTree) -> dict[str, str]:
    """For each leaf, its path and something like "float32[3, 5]"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _with_sharding(leaf: Any) -> Any:
    # Orbax would otherwise use the sharding saved in the checkpoint, whose devices may not exist.
    first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding = getattr(leaf, "sharding", None) or first_device
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def process_0_says(compute: Callable[[], T]) -> T:
    """What `compute` returns (JSON) or raises on process 0, on every process."""
    if jax.process_count() == 1:
        return compute()
    text = b""
    if jax.process_index() == 0:
        try:
            text = json.dumps({"value": compute()}).encode()
        except (UserError, CheckpointError, OSError) as error:
            text = json.dumps({"error": type(error).__name__, "message": str(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = np.zeros(size, np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    said = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))))
    if "error" in said:
        kinds = {"UserError": UserError, "CheckpointError": CheckpointError}
        raise kinds.get(said["error"], OSError)(said["message"])
    return said["value"]


def valid_step(folder: Path, step: int | str) -> int:
    """The valid step that "auto" (the newest) or a number stands for; errors as in `restore`."""

    return process_0_says(lambda: pick_step(folder, step))


def read_state(
    folder: Path,
    step: int,
    abstract_state: PyTree,
    config: Config | None = None,
    *,
    partial: bool = False,
) -> tuple[PyTree, dict[str, Any]]:
    """As `restore`, of a step that `read_meta`, `valid_step` or `latest_valid` has returned: its
    files are not hashed again."""
    path = (folder / str(step)).absolute()
    saved = read_saved(path)
    if different := architecture_differences(path, saved, abstract_state, config, partial):
        raise UserError(
            f"{path} is a checkpoint of another architecture:\n  "
            + "\n  ".join(different)
            + "\nUse the configuration it was made with (config.json of its run), or another "
            "--run-dir, or --resume never."
        )
    target = jax.tree.map(_with_sharding, abstract_state)
    if partial:
        args = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
    else:
        args = ocp.args.StandardRestore(target)
    hush_other_arrays()
    try:
        _check_orbax_s_files(path)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            state = reader.restore(path, args=ocp.args.Composite(state=args))["state"]
    except _UNREADABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise CheckpointError(f"checkpoint {path} cannot be read: {reason}") from error
    return state, saved["meta"]


def _check_orbax_s_files(step_folder: Path) -> None:
    """Raises UserError for a file that orbax parses whole and would not have written."""
    state = step_folder / "state"
    names = [_CHECKPOINT_FILE, "state/_METADATA", "state/_sharding"]
    names += sorted(f"state/array_metadatas/{p.name}" for p in state.glob("array_metadatas/*"))
    for name in names:
        if (step_folder / name).exists():
            read_json(file_inside(step_folder, name), MAX_BYTES)


def architecture_differences(
    path: Path,
    saved: dict[str, Any],
    abstract_state: PyTree,
    config: Config | None,
    partial: bool = False,
) -> list[str]:
    """What differs, a line each, between the model that was saved and the one asked for.

    Fields that may change are told on the log instead.
    """
    different = []
    model = (saved["meta"].get("config") or {}).get("model")
    if config is not None and model is not None:
        ours = json.loads(json.dumps(dataclasses.asdict(config.model)))
        for field in sorted(model.keys() | ours.keys()):
            was, now = model.get(field), ours.get(field)
            if was == now:
                continue
            if field in _MAY_CHANGE:
                log.warning("model.%s was %s in %s and is now %s", field, shown(was), path, now)
            else:
                told = f"{shown(was)} in the checkpoint, {shown(now)} in this run"
                different.append(f"model.{field[:80]}: {told}")
    there, wanted = saved["arrays"], array_types(abstract_state)
    for name in sorted(wanted if partial else there.keys() | wanted.keys()):
        was, now = there.get(name, "absent"), wanted.get(name, "absent")
        if was != now:
            different.append(f"{name[:200]}: {was[:80]} in the checkpoint, {now} in this run")
    more = len(different) - 12
    return different[:12] + ([f"and {more} more"] if more > 0 else [])
