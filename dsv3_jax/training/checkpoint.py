"""Checkpoints of a run: saved in the background, checked before use, never silently lost.

Orbax writes and reads the arrays. Around it, `manifest` says which files a step has and `restore`
which step is good. Here is what a training run does, in its order:

- a step counts once its manifest is there; older steps go only after it;
- steps that a run leaves behind are moved to `checkpoints.old-N`, not deleted.

On disk: `checkpoints/<step>/{state/, meta/, MANIFEST.json}`. With several processes, all call the
same functions in the same order on one shared file system; process 0 checks, decides and tells.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dsv3_jax.config import Config
from dsv3_jax.training.hushed_arrays import hush_other_arrays
from dsv3_jax.training.manifest import (
    MANIFEST,
    SAVING,
    TEMPORARY,
    begin_save,
    cut_off,
    damage,
    steps_in,
    write_manifest,
)
from dsv3_jax.training.restore import (
    PyTree,
    array_types,
    latest_valid,
    process_0_says,
    read_state,
    restore,
    state_bytes,
    valid_step,
)
from dsv3_jax.training.saved import CheckpointError, listed

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one training run; opening it removes what a killed save left behind.

    Use as a context manager, or call `close()`: the last save counts only once it has finished.
    """

    def __init__(self, folder: str | Path, *, every_steps: int, keep: int):
        """`keep` newest steps stay, and the newest trusted one (`trust`).

        Raises OSError with a plain message if `folder` is unusable.
        """
        self.folder = Path(folder).absolute()  # orbax accepts no relative path
        self.every_steps, self.keep = every_steps, keep
        self._manager: ocp.CheckpointManager | None = None
        self._finisher: threading.Thread | None = None
        self._saving: int | None = None  # the step under way, or the last one saved
        self._failure: BaseException | None = None
        self._trusted: int | None = None
        self._wanted = 0  # bytes of the save under way
        process_0_says(self._open)

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
        process_0_says(lambda: self._probe(num_bytes))

    def due(self, step: int) -> bool:
        """Whether the step is one of those to be saved regularly."""
        return step % self.every_steps == 0

    def trust(self, step: int) -> None:
        """Says that the state after `step` steps, and all before, were good (`divergence`)."""
        self._trusted = step

    def leave_damage_behind(self) -> str:
        """After divergence: sets aside the steps saved since the newest trusted one.

        Returns what a user should know: which step was verified, its files hashed, and why it lies
        before the damage. Where no step of this process was trusted, nothing is moved.
        """
        try:
            self.wait()
        except CheckpointError as error:
            log.warning("%s", error)
        there = process_0_says(lambda: steps_in(self.folder))
        if self._trusted is None:
            return (
                f"It was so from the first step on, after the checkpoint of step {there[-1]}: "
                "what this run was given differs, or that checkpoint is bad; --resume STEP goes on "
                f"from another of {listed(there)}"
                if there
                else "There is no checkpoint: start with a smaller --optimizer.learning-rate"
            )
        good = [step for step in there if step <= self._trusted]
        self._set_aside(after=self._trusted)
        for step in reversed(good):
            problem = process_0_says(lambda step=step: damage(self.folder / str(step)))
            if problem is None:
                return (
                    f"The checkpoint of step {step} was verified and lies before the damage: an "
                    "ordinary step followed it. The same command goes on from it; give it a "
                    "smaller --optimizer.learning-rate"
                )
            log.warning("checkpoint %s is damaged: %s", self.folder / str(step), problem)
        return "No checkpoint lies before it: start with a smaller --optimizer.learning-rate"

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
        step: int | None = None
        if how != "never":
            step = self.latest_valid() if how == "auto" else valid_step(self.folder, how)
            if step is None:
                return None
        state, meta = self.resume_from(step, abstract_state, config)
        return None if step is None else (step, state, meta)

    def resume_from(
        self, step: int | None, abstract_state: PyTree, config: Config | None = None
    ) -> tuple[PyTree | None, dict[str, Any]]:
        """As `resume`, from a step that is known to be good; None starts at step 0."""
        if step is None:
            self._set_aside(after=-1)
            return None, {}
        state, meta = read_state(self.folder, step, abstract_state, config)
        self._set_aside(after=step)
        log.info("resumed from the checkpoint of step %d", step)
        return state, meta

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
        saved_meta = {"format": 1, "arrays": array_types(state), "meta": meta}
        saved_meta |= {"jax": jax.__version__, "orbax": ocp.__version__}
        self._saving = step
        hush_other_arrays()
        try:
            self._wanted = state_bytes(state)
            process_0_says(lambda: self._begin(step))
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
        torn = [
            self.folder / str(s) for s in steps_in(self.folder) if cut_off(self.folder / str(s))
        ]
        for path in [*self.folder.glob(f"*{TEMPORARY}*"), *torn]:
            log.warning("removing %s, left by a save that was cut off", path)
            shutil.rmtree(path, ignore_errors=True)
        for note in self.folder.glob(f"{SAVING}*"):
            note.unlink(missing_ok=True)

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

    def _begin(self, step: int) -> None:
        self._free_for(self._wanted)
        begin_save(self.folder, step)

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
                write_manifest(self.folder / str(step))
                self._remove_old()
        except BaseException as error:
            self._failure = error  # raised by the next wait() or save(), in the caller's thread

    def _remove_old(self) -> None:
        finished = [s for s in steps_in(self.folder) if (self.folder / str(s) / MANIFEST).exists()]
        trusted = [s for s in finished if self._trusted is not None and s <= self._trusted]
        kept = finished[-self.keep :] + trusted[-1:]
        for step in steps_in(self.folder):
            if step < finished[-1] and step not in kept:
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
            f"saving the checkpoint of step {step}, about {_gigabytes(self._wanted)}, in "
            f"{self.folder} failed ({_cause(error)}); " + last
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
            log.warning("moved the checkpoints of steps %s to %s", listed(steps), aside)

        process_0_says(move)


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
