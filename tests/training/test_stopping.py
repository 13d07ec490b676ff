"""Signals are heard at once, also while the main thread is inside XLA; a second one ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.training.clock import Clock
from dsv3_jax.training.stopping import Stopped, StopRequest

# A call into C that no Python handler interrupts, as a compilation is.
BUSY = """
import ctypes, sys
from dsv3_jax.training.clock import Clock
from dsv3_jax.training.run_log import set_up_logging
from dsv3_jax.training.stopping import StopRequest
set_up_logging()
sleep = ctypes.CDLL(None).usleep
clock = Clock()
with StopRequest(clock) as stop, stop.requests(), clock("compile"):
    print("compiling", flush=True)
    for _ in range({calls}):
        sleep(900_000)
    print("requested", stop.requested, flush=True)
"""


def start(program: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_while_compiling_is_told_at_once_and_a_second_ends(number):
    with start(BUSY.format(calls=100)) as process:
        assert process.stdout.readline() == "compiling\n"
        process.send_signal(number)
        said = process.stdout.readline()
        assert f"{number.name} heard: a step is being compiled" in said
        assert "A second signal ends it at once" in said
        assert process.poll() is None
        process.send_signal(number)
        assert f"{number.name} again" in process.stdout.read()
        assert process.wait(timeout=20) == 128 + number


def test_one_signal_lets_the_step_end():
    with start(BUSY.format(calls=2)) as process:
        assert process.stdout.readline() == "compiling\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read().endswith("requested True\n")
        assert process.wait(timeout=20) == 0


def test_with_nothing_to_save_a_signal_stops_at_once(caplog):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped, StopRequest(Clock()):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(10**6):
            pass
    assert stopped.value.code == 143
    assert "SIGTERM heard: nothing is left to save" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == before


READING = """
import asyncio
from dsv3_jax.training.clock import Clock
from dsv3_jax.training.run_log import set_up_logging
from dsv3_jax.training.stopping import StopRequest
set_up_logging()

async def read():
    print("reading", flush=True)
    while True:
        await asyncio.sleep(0)

with StopRequest(Clock()):
    asyncio.run(read())
"""


def test_a_signal_while_a_checkpoint_is_read_leaves_one_line():
    with start(READING) as process:
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
        assert said == "warning: SIGTERM heard: nothing is left to save, the run ends\n"
        assert process.wait(timeout=20) == 143


ENDING = """
import atexit, os, time
from dsv3_jax.cli import run_command
atexit.register(time.sleep, 0.5)
atexit.register(print, "ending", flush=True)
run_command(lambda argv: 0)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_end_leaves_the_exit_code(number):
    with start(ENDING) as process:
        assert process.stdout.readline() == "ending\n"
        process.send_signal(number)
        assert process.stdout.read() == ""
        assert process.wait(timeout=20) == 0


COLLECTING = """
import gc
from dsv3_jax.training.clock import Clock
from dsv3_jax.training.run_log import set_up_logging
from dsv3_jax.training.stopping import StopRequest
set_up_logging()

def forever(*_):
    print("collecting", flush=True)
    while True:
        pass

class Finalized:
    def __del__(self):
        forever()

with StopRequest(Clock()):
    {begin}
"""


@pytest.mark.parametrize(
    "begin", ["gc.callbacks.append(forever); gc.collect()", "Finalized()"], ids=["gc", "del"]
)
def test_a_signal_that_python_would_forget_ends_the_run_too(begin):
    with start(COLLECTING.format(begin=begin)) as process:
        assert process.stdout.readline() == "collecting\n"
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
        assert said == "warning: SIGTERM heard: nothing is left to save, the run ends\n"
        assert process.wait(timeout=20) == 143
