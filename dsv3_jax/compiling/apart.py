"""A program compiled in a process of its own, so that what XLA aborts at is told and ends no more.

XLA checks its own invariants by ending the process (`Check failed` in its log): nothing of Python
can catch that, and a search over meshes would lose what it has compiled so far.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsv3_jax.config import Config, RunError, UserError

if TYPE_CHECKING:  # they import jax, which the process of a command line that only asks needs not
    from dsv3_jax.compiling.programs import Serving
    from dsv3_jax.compiling.report import Report

_CHECK = re.compile(r"([\w.]+:\d+\] (?:Check failed|CHECK)[^\n]*)")
_FATAL = re.compile(r"^F\S* [^\n]*?([\w.]+:\d+\] [^\n]*)", re.M)


@dataclass(frozen=True)
class Task:
    """A program to compile, as its process is told.

    Fields:
        config, topology: the run, and the devices by the name of `targets.parse_topology`.
        program: "train", or an engine's act.
        serving: of an act, what it is compiled for.
        hlo: where the compiled program's text is kept; None for nowhere.
    """

    config: Config
    topology: str
    program: Literal["train", "prefill", "decode"] = "train"
    serving: Serving | None = None
    hlo: Path | None = None


def compile_apart(task: Task) -> Report:
    """The report of a task's program, compiled by another process of this Python.

    Raises what building or compiling raises there (UserError, RunError, ...), and RunError, in one
    line, where the process ends without an answer, as when XLA aborts or memory runs out.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answer, said = (Path(folder) / name for name in ("task", "answer", "said"))
        asked.write_bytes(pickle.dumps(task))
        package = Path(__file__).parents[2]  # also where that lies beside, and is not installed
        path = os.pathsep.join(p for p in (str(package), os.environ.get("PYTHONPATH")) if p)
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(folder)], env=os.environ | {"PYTHONPATH": path}
        )
        if answer.exists():
            found = pickle.loads(answer.read_bytes())
            if isinstance(found, Exception):
                raise found
            return found
        log = said.read_text(errors="replace") if said.exists() else ""
    raise RunError(f"no program for {task.topology}: {_why(done.returncode, log)}")


def _why(code: int, log: str) -> str:
    """Why a process ended without an answer, by its exit code and what XLA wrote, in one line."""
    check = _CHECK.search(log) or _FATAL.search(log)
    if check is not None:
        return f"XLA aborts, {check[1].strip()[:300]}"
    if code == -signal.SIGKILL:
        return "its compiler was killed (out of memory?)"
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last = [line.strip() for line in log.splitlines() if line.strip()][-1:]
    return f"its compiler ended with {ended}" + (f": {last[0][:300]}" if last else "")


def _compiled(task: Task, said: Path) -> Report:
    from dsv3_jax.compiling import targets

    target = targets.parse_topology(task.topology)
    devices = targets.devices_of(target)
    # The rest imports jax; that must come after the platform was chosen.
    from dsv3_jax.analysis.prediction import predict
    from dsv3_jax.compiling import programs
    from dsv3_jax.compiling.report import compile_program
    from dsv3_jax.starting import open_weights

    config = task.config
    layout = programs.layout_on(config, devices)
    if task.serving is not None:
        built = programs.serving(config, layout, task.serving, task.program == "decode")
        return compile_program(built, target, task.hlo, said)
    weights = open_weights(config.init_from) if config.init_from else None
    built = programs.training(config, layout, weights)
    report = compile_program(built, target, task.hlo, said)
    return dataclasses.replace(report, predicted=predict(config, target.accelerator.name))


def _main(folder: Path) -> None:
    task = pickle.loads((folder / "task").read_bytes())
    answer: Any
    try:
        answer = _compiled(task, folder / "said")
    except Exception as error:
        answer = error
        if not isinstance(error, (UserError, RunError)):
            error.add_note(traceback.format_exc())
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # one of a library, which pickle cannot make again
            answer = RunError(f"{type(error).__name__}: {error}")
    (folder / "unfinished").write_bytes(pickle.dumps(answer))
    (folder / "unfinished").rename(folder / "answer")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
