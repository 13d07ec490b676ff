"""A run that diverges keeps the newest state that an ordinary step has followed, and names it."""

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.divergence import LossGuard, NonFiniteLoss, is_ordinary
from dsv3_jax.training.manifest import steps_in
from tests.training.test_checkpoint import flip_a_bit


def test_what_an_ordinary_loss_is():
    assert is_ordinary(1e6, []) and not is_ordinary(float("inf"), [])
    recent = [2.0, 2.1, 1.9, 2.0]
    assert is_ordinary(4.9, recent) and not is_ordinary(5.1, recent)
    assert not is_ordinary(float("nan"), recent)
    assert is_ordinary(0.9, [0.01]), "a hard batch of a model that knows its text"


class Run:
    """A run whose losses are given; every step is to be saved, and its state is its step."""

    def __init__(self, folder, keep=3, limit=3, recent=()):
        self.checkpoints = Checkpoints(folder, every_steps=1, keep=keep)
        self.guard = LossGuard(self.checkpoints, limit, recent)
        self.skipped = 0

    def steps(self, start, losses, *, ready=False, last=False):
        for step, loss in enumerate(losses, start):
            self.skipped = 0 if jnp.isfinite(loss) else self.skipped + 1
            metrics = SimpleNamespace(loss=loss, skipped_in_row=self.skipped)
            self.guard.see(step, metrics, ready=ready)
            is_last = last and step == start + len(losses) - 1
            if self.guard.may_save(step + 1, due=True, last=is_last):
                self.checkpoints.save(step + 1, {"step": jnp.int32(step + 1)}, {})
        self.checkpoints.wait()
        return self


INF = float("inf")


def test_a_ruinous_update_leaves_the_state_before_it(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    run = Run(folder).steps(0, [2.0] * 5)
    assert steps_in(folder) == [3, 4, 5]
    # Step 6's loss is that of good weights; what it does to them shows in the steps after it.
    with caplog.at_level(logging.WARNING), pytest.raises(NonFiniteLoss) as error:
        run.steps(5, [2.0, INF, INF, INF])
    assert "step 5 was verified and lies before the damage" in str(error.value)
    assert steps_in(folder) == [4, 5]
    assert steps_in(tmp_path / "checkpoints.old-1") == [6]
    assert "step 7 was skipped: its state is not saved" in caplog.text
    step, state, _ = run.checkpoints.resume("auto", {"step": jax.ShapeDtypeStruct((), jnp.int32)})
    assert step == state["step"] == 5


def test_the_step_named_is_one_whose_files_are_good(tmp_path):
    run = Run(tmp_path / "checkpoints").steps(0, [2.0] * 4)
    flip_a_bit(tmp_path / "checkpoints" / "3")
    with pytest.raises(NonFiniteLoss, match=r"step 2 was verified"):
        run.steps(4, [INF] * 3)


def test_a_finite_but_ruinous_loss_does_not_push_out_the_good_state(tmp_path, caplog):
    run = Run(tmp_path / "checkpoints").steps(0, [2.0] * 4)
    with caplog.at_level(logging.WARNING):
        run.steps(4, [2.0, *[900.0] * 6])
    assert steps_in(tmp_path / "checkpoints") == [4, 9, 10, 11]
    assert "far above the usual one of 2" in caplog.text
    run.steps(11, [2.0, 2.0])  # it recovers
    assert steps_in(tmp_path / "checkpoints") == [11, 12, 13]


def test_with_keep_1_the_state_before_the_newest_stays(tmp_path):
    run = Run(tmp_path / "checkpoints", keep=1).steps(0, [2.0] * 4)
    assert steps_in(tmp_path / "checkpoints") == [3, 4]
    with pytest.raises(NonFiniteLoss, match="step 3 was verified"):
        run.steps(4, [INF] * 3)
    assert steps_in(tmp_path / "checkpoints") == [3]


def test_a_save_that_had_to_wait_is_made_up_for(tmp_path):
    run = Run(tmp_path / "checkpoints").steps(0, [2.0, 2.0, INF, INF])
    assert steps_in(tmp_path / "checkpoints") == [1, 2]
    metrics = SimpleNamespace(loss=2.0, skipped_in_row=0)
    run.guard.see(4, metrics, ready=False)
    assert run.guard.may_save(5, due=False, last=False)
    assert not run.guard.may_save(5, due=False, last=False)


def test_a_run_that_ends_in_a_skipped_step_says_so(tmp_path):
    run = Run(tmp_path / "checkpoints").steps(0, [2.0, 2.0])
    with pytest.raises(NonFiniteLoss, match=r"in 1 steps in a row.*step 1 was verified"):
        run.steps(2, [INF], last=True)


def test_without_an_ordinary_step_nothing_is_moved(tmp_path):
    Run(tmp_path / "checkpoints").steps(0, [2.0] * 3).checkpoints.close()
    again = Run(tmp_path / "checkpoints", recent=[2.0])
    with pytest.raises(NonFiniteLoss, match=r"from the first step on, after .* step 3: .*1, 2, 3"):
        again.steps(3, [INF] * 3)
    assert steps_in(tmp_path / "checkpoints") == [1, 2, 3]
    empty = Run(tmp_path / "new")
    with pytest.raises(NonFiniteLoss, match="There is no checkpoint"):
        empty.steps(0, [INF] * 3)


@pytest.mark.parametrize("ready", [True, False])
def test_ordinary_losses_are_remembered_for_the_next_process(tmp_path, ready):
    run = Run(tmp_path / "checkpoints", recent=[2.0]).steps(0, [2.5, 50.0, 3.0], ready=ready)
    assert list(run.guard.recent) == [2.0, 2.5, 3.0]
