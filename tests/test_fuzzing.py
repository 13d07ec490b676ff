"""Some cases of every kind of file from strangers, each kind in a process of its own."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzzing import MEGABYTES, TARGETS

ROOT = Path(__file__).parent.parent
# About a minute in all, alone on a core; a few seconds.
MANY = {"headers": 20_000, "configs": 10_000, "published": 150, "imports": 700, "shards": 1500}
MANY |= {"runs": 1000, "states": 150, "tokenizers": 3000, "documents": 3000}
FEW = {"headers": 1500, "configs": 600, "shards": 60, "tokenizers": 150, "documents": 100}


def fuzzed(target, count, seed):
    command = [sys.executable, "-m", "tests.fuzzing", target, str(count), "--seed", str(seed)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["MB"] < MEGABYTES, told
    assert told["cases"] == count == told.get("read", 0) + told.get("refused", 0)
    return told


@pytest.mark.parametrize("target", FEW)
def test_some_spoilt_files_are_read_or_refused_in_a_line(target):
    assert fuzzed(target, FEW[target], seed=0)["refused"] > FEW[target] // 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
def test_many_spoilt_files_are_read_or_refused_in_a_line(target):
    fuzzed(target, MANY[target], seed=1)


def test_the_fuzzer_sees_what_goes_wrong(monkeypatch, request):
    from tests import fuzzing

    # It is meant for a process of its own: what it changes of this one is put back.
    monkeypatch.setenv("XDG_CACHE_HOME", "elsewhere")
    request.addfinalizer(lambda: logging.disable(logging.NOTSET))

    def wrong(folder, rng):
        yield from ((lambda: None), (lambda: {}["no error of ours"]))

    def outside(folder, rng):
        yield lambda: (folder.parent / "outside/secret").write_text("changed")
        yield lambda: None

    for target, message in ((wrong, "KeyError"), (outside, "written outside")):
        monkeypatch.setitem(fuzzing.TARGETS, "wrong", target)
        with pytest.raises(AssertionError, match=message):
            fuzzing.fuzz("wrong", 1 if target is outside else 2, 0)
    monkeypatch.undo()
