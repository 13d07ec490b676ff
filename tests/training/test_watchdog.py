"""The watchdog: silent while steps come, stacks in a file when they do not, exit code 124."""

import subprocess
import sys
import threading
import time

from dsv3_jax.config import WatchdogConfig
from dsv3_jax.training.watchdog import EXIT_STUCK, Watchdog

STUCK = """
import sys, time
from dsv3_jax.config import WatchdogConfig
from dsv3_jax.training.watchdog import Watchdog

def a_step_that_never_ends():
    time.sleep(60)

with Watchdog(WatchdogConfig(min_seconds=0.2, exit=True), sys.argv[1]) as watchdog:
    watchdog.beat()
    a_step_that_never_ends()
"""


def test_a_stuck_step_leaves_its_stack_and_ends_with_124(tmp_path):
    done = subprocess.run([sys.executable, "-c", STUCK, str(tmp_path)], timeout=50)
    assert done.returncode == EXIT_STUCK
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "no step for" in stacks and "a_step_that_never_ends" in stacks


def test_stacks_are_written_once_until_the_next_step(tmp_path):
    file = tmp_path / "stacks.txt"
    with Watchdog(WatchdogConfig(min_seconds=0.1), tmp_path) as watchdog:
        for times in (1, 2):
            deadline = time.monotonic() + 20
            while not file.exists() or file.read_text().count("no step for") < times:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(0.2)
            assert file.read_text().count("no step for") == times
            watchdog.beat()


def test_a_run_of_slow_steps_is_not_stuck(tmp_path):
    """Twenty times the median counts where it is longer than the fixed limit."""
    config = WatchdogConfig(min_seconds=0.4, median_steps=1e4)
    with Watchdog(config, tmp_path) as watchdog:
        for _ in range(4):
            watchdog.beat()
            time.sleep(0.01)
        assert watchdog.limit() >= 1e4 * 0.01
        time.sleep(0.6)
    assert not (tmp_path / "stacks.txt").exists()
    assert not [t for t in threading.enumerate() if t.name == "watchdog"]


def test_zero_seconds_turn_it_off(tmp_path):
    with Watchdog(WatchdogConfig(min_seconds=0.0), tmp_path):
        assert not [t for t in threading.enumerate() if t.name == "watchdog"]
