"""Saving where it fails: a process that is killed, a disk that is full or cannot be written."""

import logging
import os
import resource
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.manifest import damage, steps_in
from dsv3_jax.training.restore import (
    latest_valid,
    state_bytes,
    state_sha256,
)
from dsv3_jax.training.saved import CheckpointError
from tests.training.saved_states import ABSTRACT, make_state, run_file, run_named


def test_kill_9_during_a_save_leaves_the_previous_step(tmp_path, caplog):
    result = run_file(__file__, "save_and_die", tmp_path, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = [p.name for p in tmp_path.iterdir()]
    assert damage(tmp_path / "2") is not None
    with caplog.at_level(logging.WARNING), Checkpoints(tmp_path, every_steps=1, keep=2) as opened:
        step, state, _ = opened.resume("auto", jax.eval_shape(lambda: big_state(1)))
        assert step == 1
        assert state_sha256(state) == state_sha256(big_state(1))
        assert steps_in(tmp_path) == [1]
        if "2" not in left:  # killed before orbax's commit, as nearly always
            assert "2.orbax-checkpoint-tmp" in left
            assert "left by a save that was cut off" in caplog.text
        assert [p.name for p in tmp_path.iterdir()] == ["1"]


def big_state(seed: int) -> dict:
    # NumPy's numbers: this process and the one it starts compile with different XLA options.
    return {"w": jnp.asarray(np.random.default_rng(seed).random(1 << 22, np.float32))}


def save_and_die(folder: Path) -> None:
    checkpoints = Checkpoints(folder, every_steps=1, keep=2)
    checkpoints.save(1, big_state(1), {})
    checkpoints.wait()
    state = jax.block_until_ready(big_state(2))
    checkpoints.save(2, state, {})
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_failed_save_is_told_at_the_next_call(tmp_path):
    checkpoints = Checkpoints(tmp_path, every_steps=1, keep=2)
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))  # writes beyond fail
    try:
        with pytest.raises(
            CheckpointError,
            match=r"step 2, about 0.0168 GB, .*File too large\); the last good one is step 1",
        ):
            checkpoints.save(2, big_state(2), {})
            checkpoints.save(3, big_state(3), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert latest_valid(tmp_path) == 1
    checkpoints.save(3, make_state(3), {})  # the disk has room again
    checkpoints.save(3, make_state(3), {})  # the last step may also be a regular one
    checkpoints.close()
    assert latest_valid(tmp_path) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]


def test_a_save_that_fails_half_way_prints_nothing_else(tmp_path):
    """TensorStore's other writes told a closed event loop of their ends, a traceback for each."""
    result = run_file(__file__, "save_beyond_the_limit", tmp_path)
    assert "step 1, about 0.0671 GB" in result.stdout and "File too large" in result.stdout
    assert "Event loop is closed" not in result.stderr, result.stderr[-1000:]


def save_beyond_the_limit(folder: Path) -> None:
    with Checkpoints(folder, every_steps=1, keep=2) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
        state = {
            f"w{i}": jnp.asarray(np.random.default_rng(i).random(1 << 19, np.float32))
            for i in range(32)
        }
        try:
            checkpoints.save(1, state, {})
            checkpoints.wait()
        except CheckpointError as error:
            print(error)


def test_a_full_or_unwritable_disk_is_told_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints", every_steps=1, keep=1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", every_steps=1, keep=1)
    checkpoints.probe(state_bytes(ABSTRACT))
    with pytest.raises(OSError, match="one checkpoint takes about 1e\\+09 GB"):
        checkpoints.probe(10**18)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(OSError, match="cannot write checkpoints"):
        checkpoints.probe(1)


def test_a_disk_that_fills_while_training_is_told_before_the_save(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, every_steps=1, keep=2)
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(CheckpointError, match=r"step 2, .*only 1e-07 GB .*the last good .* step 1"):
        checkpoints.save(2, make_state(2), {})
    assert [p.name for p in tmp_path.iterdir()] == ["1"]  # orbax has written nothing
    checkpoints.close()


def test_state_bytes_counts_every_leaf():
    abstract = jax.eval_shape(lambda: {"a": jnp.zeros((3, 5)), "b": jnp.zeros(7, jnp.bfloat16)})
    assert state_bytes(abstract) == 3 * 5 * 4 + 7 * 2


if __name__ == "__main__":
    run_named({"save_and_die": save_and_die, "save_beyond_the_limit": save_beyond_the_limit})
