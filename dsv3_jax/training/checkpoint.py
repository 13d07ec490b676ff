"""Checkpoints of a run: saved in the background, checked before use, never silently lost.

Orbax writes and reads the arrays. Around it this file adds what orbax does not promise, because
orbax restores a bit-flipped file, and lists an emptied folder as a step, without an error:

- a step counts once `MANIFEST.json` (size and sha256 of each of its files) is there; that file is
  written last, and older steps go only after it;
- the newest step that matches its manifest is used, and what is wrong with newer ones is said;
- when steps exist and none is good, it refuses (CheckpointError) rather than start over;
- a step of another architecture is refused with the differences (UserError);
- steps that a run leaves behind are moved to `checkpoints.old-N`, not deleted.

On disk: `checkpoints/<step>/{state/, meta/, MANIFEST.json}`. With several processes, all call the
same functions in the same order on one shared file system; process 0 checks, decides and tells.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dsv3_jax.config import Config, RunError, UserError

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
_TEMPORARY = ".orbax-checkpoint-tmp"  # orbax renames `<step>` + this to `<step>` when it commits

# A run may change these and go on: they say how to compute, or how far, not what the weights are.
_MAY_CHANGE = ("dtype", "initializer_range", "max_position_embeddings", "rope_scaling")

PyTree = Any
T = TypeVar("T")


class CheckpointError(RunError):
    """Checkpoints cannot be written, or none of those there can be trusted (exit code 1)."""


# What is on disk


def steps_in(folder: str | Path) -> list[int]:
    """The steps that have a folder of their own, oldest first, whether valid or not."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    names = [p.name for p in folder.iterdir() if p.is_dir()]
    return sorted(int(n) for n in names if n.isascii() and n.isdigit() and n == str(int(n)))


def damage(step_folder: str | Path) -> str | None:
    """What is wrong with one step's folder, or None when every file matches its manifest.

    Reads all of it; sha256 runs at about 1 to 2 GB/s a core, and files are read in parallel.
    """
    step_folder = Path(step_folder)
    if not step_folder.is_dir():
        return "no such folder"
    manifest = step_folder / MANIFEST
    if not manifest.exists():
        empty = not any(step_folder.iterdir())
        return "the folder is empty" if empty else f"no {MANIFEST}: the save did not finish"
    try:
        files: dict[str, dict[str, Any]] = json.loads(manifest.read_bytes())["files"]
        expected = {name: (int(f["size"]), str(f["sha256"])) for name, f in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"

    def check(name: str) -> str | None:
        path, (size, digest) = step_folder / name, expected[name]
        try:
            if (found := path.stat().st_size) != size:
                return f"{name} has {found} bytes instead of {size}"
            return None if _sha256(path) == digest else f"{name} does not match its sha256"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor() as pool:
        wrong = [problem for problem in pool.map(check, sorted(expected)) if problem]
    more = f" (and {len(wrong) - 1} more files)" if len(wrong) > 1 else ""
    return wrong[0] + more if wrong else None


def latest_valid(folder: str | Path) -> int | None:
    """The newest step that matches its manifest, or None when the folder holds no step at all.

    Damaged newer steps are named on the log. Raises CheckpointError when steps exist and none is
    valid: starting over is the user's decision (`--resume never`).
    """
    return _process_0_says(lambda: _latest_valid(Path(folder)))


def read_meta(folder: str | Path, step: int | str = "auto") -> tuple[int, dict[str, Any]]:
    """(step, the `meta` that `save` got), of a step or of the newest valid one ("auto").

    Does not check the arrays of a step named by number. Raises UserError when there is none.
    """
    step = _pick(Path(folder), step) if step == "auto" else int(step)
    return step, _read_saved_meta(Path(folder) / str(step))["meta"]


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
    return _read(folder, _pick(folder, step), abstract_state, config, partial)


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


# What a training run does


class Checkpoints:
    """The checkpoints of one training run; opening it removes what a killed save left behind.

    Use as a context manager, or call `close()`: the last save counts only once it has finished.
    """

    def __init__(self, folder: str | Path, *, every_steps: int, keep: int):
        """`keep` newest steps stay; raises OSError with a plain message if `folder` is unusable."""
        self.folder = Path(folder).absolute()  # orbax accepts no relative path
        self.every_steps, self.keep = every_steps, keep
        self._manager: ocp.CheckpointManager | None = None
        self._finisher: threading.Thread | None = None
        self._saving: int | None = None  # the step under way, or the last one saved
        self._failure: BaseException | None = None
        _process_0_says(self._open)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The other processes may never come to where close() waits for them.
        if kind is None or jax.process_count() == 1:
            self.close()

    def probe(self, num_bytes: int) -> None:
        """Writes and removes a small file, and checks that one checkpoint of `num_bytes` fits.

        Raises OSError with a message for the user, before any training is lost.
        """
        _process_0_says(lambda: self._probe(num_bytes))

    def due(self, step: int) -> bool:
        """Whether the step is one of those to be saved regularly."""
        return step % self.every_steps == 0

    def latest_valid(self) -> int | None:
        """As the function of this name."""
        return latest_valid(self.folder)

    def resume(
        self, how: str | int, abstract_state: PyTree, config: Config | None = None
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """(step, state, meta) to go on from, or None to start at step 0.

        `how` is `Config.resume`: "auto" takes the newest valid step, a number that step, "never"
        none. Steps that the new history will not contain (all of them for "never", damaged and
        newer ones otherwise) are moved to `checkpoints.old-N`, with a line on the log, once the
        restore has succeeded. Errors: those of `latest_valid` and `restore`.
        """
        if how == "never":
            self._set_aside(after=-1)
            return None
        step = self.latest_valid() if how == "auto" else _pick(self.folder, how)
        if step is None:
            return None
        state, meta = _read(self.folder, step, abstract_state, config, partial=False)
        self._set_aside(after=step)
        log.info("resumed from the checkpoint of step %d", step)
        return step, state, meta

    def restore(
        self, step: int | str, abstract_state: PyTree, config: Config | None = None
    ) -> tuple[PyTree, dict[str, Any]]:
        """As the function of this name."""
        return restore(self.folder, step, abstract_state, config)

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Starts saving and returns once the state is copied: its buffers may then be donated.

        Waits for a save still under way first. `meta` is JSON; its "config" entry, if any, should
        be `dataclasses.asdict(Config)`. Saving the step just saved again does nothing. Raises
        CheckpointError, naming the last good step, when this or the previous save failed.
        """
        self.wait()
        if step == self._saving:
            return
        if step in steps_in(self.folder):
            raise CheckpointError(f"{self.folder / str(step)} already exists; it was left alone")
        saved_meta = {"format": 1, "arrays": _describe(state), "meta": meta}
        saved_meta |= {"jax": jax.__version__, "orbax": ocp.__version__}
        self._saving = step
        try:
            # Found out by orbax, a full disk prints a traceback for every array from C++ threads.
            _process_0_says(lambda: self._free_for(state_bytes(state)))
            manager = self._manager
            if manager is None:
                options = ocp.CheckpointManagerOptions(save_root_metadata=False)
                manager = self._manager = ocp.CheckpointManager(self.folder, options=options)
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(saved_meta)
            )
            manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._failed(error) from error
        # Not a daemon: a process that ends without close() still tries to finish the save.
        self._finisher = threading.Thread(target=self._finish, args=(manager, step))
        self._finisher.start()

    def wait(self) -> None:
        """Returns when the save under way, if any, is complete; raises as `save` does."""
        if self._finisher is None:
            return
        self._finisher.join()
        self._finisher = None
        failure, self._failure = self._failure, None
        if jax.process_count() > 1:  # process 0 writes the manifest; the others wait for it here
            failed = multihost_utils.process_allgather(np.bool_(failure is not None))
            if failure is None and np.any(failed):
                failure = OSError("another process could not finish the save")
        if failure is not None:
            raise self._failed(failure) from failure

    def close(self) -> None:
        """Waits for the save under way, then lets go of orbax's threads; harmless when repeated."""
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        for path in self.folder.glob(f"*{_TEMPORARY}*"):
            log.warning("removing %s, left by a save that was cut off", path)
            shutil.rmtree(path, ignore_errors=True)

    def _probe(self, num_bytes: int) -> None:
        path = self.folder / ".probe"
        try:
            with path.open("wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
            path.unlink()
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        free = self._free_for(num_bytes)
        if free < (self.keep + 1) * num_bytes:
            log.warning(
                "checkpoints: %s free in %s; keeping %d of %s needs room for %d while saving",
                *(_gigabytes(free), self.folder, self.keep, _gigabytes(num_bytes), self.keep + 1),
            )

    def _free_for(self, num_bytes: int) -> int:
        """The free bytes; OSError when one checkpoint of `num_bytes` does not fit."""
        free = shutil.disk_usage(self.folder).free
        if free < num_bytes:
            raise OSError(
                f"one checkpoint takes about {_gigabytes(num_bytes)} but only {_gigabytes(free)} "
                f"are free in {self.folder}: free some space, or choose another --run-dir"
            )
        return free

    def _finish(self, manager: ocp.CheckpointManager, step: int) -> None:
        """In a thread: waits for orbax's commit, writes the manifest, and removes old steps."""
        try:
            manager.wait_until_finished()
            if jax.process_index() == 0:
                _write_manifest(self.folder / str(step))
                self._remove_old()
        except BaseException as error:
            self._failure = error  # raised by the next wait() or save(), in the caller's thread

    def _remove_old(self) -> None:
        finished = [s for s in steps_in(self.folder) if (self.folder / str(s) / MANIFEST).exists()]
        for step in steps_in(self.folder):
            if step < finished[-self.keep :][0]:
                # The manifest goes first, so that a half-removed step never looks like a good one.
                (self.folder / str(step) / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(self.folder / str(step))

    def _failed(self, error: BaseException) -> CheckpointError:
        """The error to raise for a failed save; a half-written folder of it is removed."""
        step, self._saving = self._saving, None
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except Exception as also:
                log.debug("orbax did not close cleanly after a failed save: %s", also)
        if jax.process_index() == 0:
            self._remove_unfinished()
        good = [s for s in steps_in(self.folder) if (self.folder / str(s) / MANIFEST).exists()]
        last = f"the last good one is step {good[-1]}" if good else "there is none before it"
        return CheckpointError(
            f"saving the checkpoint of step {step} in {self.folder} failed ({_cause(error)}); "
            + last
        )

    def _set_aside(self, after: int) -> None:
        """Moves the steps after `after` into a new checkpoints.old-N beside the folder."""

        def move() -> None:
            steps = [step for step in steps_in(self.folder) if step > after]
            if not steps:
                return
            n = 1
            while (aside := self.folder.with_name(f"{self.folder.name}.old-{n}")).exists():
                n += 1
            aside.mkdir()
            for step in steps:
                (self.folder / str(step)).rename(aside / str(step))
            log.warning("moved the checkpoints of steps %s to %s", _listed(steps), aside)

        _process_0_says(move)


# How it is done


def _latest_valid(folder: Path) -> int | None:
    steps = steps_in(folder)
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


def _pick(folder: Path, step: int | str) -> int:
    """The valid step that "auto" or a number stands for."""

    def pick() -> int:
        if step == "auto":
            if (newest := _latest_valid(folder)) is None:
                raise UserError(f"no checkpoint in {folder}")
            return newest
        if int(step) not in (there := steps_in(folder)):
            has = f"it has {_listed(there)}" if there else "it has none"
            raise UserError(f"no checkpoint of step {step} in {folder}: {has}")
        if problem := damage(folder / str(step)):
            raise CheckpointError(f"checkpoint {folder / str(step)} is damaged: {problem}")
        return int(step)

    return _process_0_says(pick)


def _read(
    folder: Path, step: int, abstract_state: PyTree, config: Config | None, partial: bool
) -> tuple[PyTree, dict[str, Any]]:
    path = (folder / str(step)).absolute()
    saved = _read_saved_meta(path)
    _refuse_other_architecture(path, saved, abstract_state, config, partial)
    target = jax.tree.map(_with_sharding, abstract_state)
    if partial:
        args = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
    else:
        args = ocp.args.StandardRestore(target)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        state = reader.restore(path, args=ocp.args.Composite(state=args))["state"]
    return state, saved["meta"]


def _read_saved_meta(step_folder: Path) -> dict[str, Any]:
    if not step_folder.is_dir():
        raise UserError(f"no checkpoint {step_folder}")
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            items = ocp.args.Composite(meta=ocp.args.JsonRestore())
            saved = reader.restore(step_folder.absolute(), args=items)["meta"]
        if saved["format"] != 1:
            raise ValueError(f"its format is {saved['format']}, this program reads 1")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"checkpoint {step_folder} cannot be read: {error}") from error
    return saved


def _refuse_other_architecture(
    path: Path, saved: dict[str, Any], abstract_state: PyTree, config: Config | None, partial: bool
) -> None:
    """Raises UserError with the differences between what is saved and what is asked for."""
    different = []
    model = (saved["meta"].get("config") or {}).get("model")
    if config is not None and model is not None:
        ours = json.loads(json.dumps(dataclasses.asdict(config.model)))
        for field in sorted(model.keys() | ours.keys()):
            was, now = model.get(field), ours.get(field)
            if was == now:
                continue
            if field in _MAY_CHANGE:
                log.warning("model.%s was %s in %s and is now %s", field, was, path, now)
            else:
                different.append(f"model.{field}: {was} in the checkpoint, {now} in this run")
    there, wanted = saved["arrays"], _describe(abstract_state)
    for name in sorted(wanted if partial else there.keys() | wanted.keys()):
        was, now = there.get(name, "absent"), wanted.get(name, "absent")
        if was != now:
            different.append(f"{name}: {was} in the checkpoint, {now} in this run")
    if different:
        shown = different[:12]
        if len(different) > len(shown):
            shown.append(f"and {len(different) - len(shown)} more")
        raise UserError(
            f"{path} is a checkpoint of another architecture:\n  "
            + "\n  ".join(shown)
            + "\nUse the configuration it was made with (config.json of its run), or another "
            "--run-dir, or --resume never."
        )


def _write_manifest(step_folder: Path) -> None:
    """Writes size and sha256 of each file of a committed step: under another name, then renamed."""
    paths = sorted(p for p in step_folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_sha256, paths))
    files = {
        path.relative_to(step_folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests)
    }
    temporary = step_folder.parent / f"{step_folder.name}{_TEMPORARY}.manifest"
    with temporary.open("w") as file:
        json.dump({"format": 1, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(step_folder / MANIFEST)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _describe(tree: PyTree) -> dict[str, str]:
    """For each leaf, its path and something like "float32[3, 5]"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _with_sharding(leaf: Any) -> Any:
    # Orbax would otherwise use the sharding saved in the checkpoint, whose devices may not exist.
    first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding = getattr(leaf, "sharding", None) or first_device
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _process_0_says(compute: Callable[[], T]) -> T:
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


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(f"cannot write checkpoints to {folder}: {error.strerror}")


def _cause(error: BaseException) -> str:
    """The reason in a few words: TensorStore puts it after a page of its own paths."""
    text = (str(error).strip().splitlines() or [""])[0]
    if " [os_error_code" in text:
        return text.partition(" [os_error_code")[0].rpartition(": ")[2]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def _listed(steps: list[int]) -> str:
    names = [str(step) for step in steps]
    return ", ".join(names if len(names) <= 8 else names[:3] + ["..."] + names[-3:])
