"""Rows of a table, compiled side by side, a process each, then measured one after the other.

A benchmark's rows take seconds each to compile, on one core, and milliseconds to measure, on a
quiet GPU. Its module answers `--row NUMBER` by `answer`, and iterates over `rows`.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]


def rows(module: str, labels: Sequence[str], numbers: Sequence[int]) -> Iterator[Row]:
    """The rows of these numbers, in order; one that fails is named and left out."""
    command = [sys.executable, "-m", module, "--row"]
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([*command, str(number)], **pipes) for number in numbers]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for number, process in zip(numbers, processes):
        out, _ = process.communicate("go\n")
        if process.returncode:
            print(f"{labels[number]}: failed with exit code {process.returncode}", flush=True)
        else:
            yield json.loads(out.splitlines()[-1])


def answer(prepare: Callable[[], Callable[[], Row]]) -> None:
    """What the process of a row does: prepares, and measures when it is told to."""
    measure = prepare()
    print("ready", flush=True)
    input()
    print(json.dumps(measure()))
