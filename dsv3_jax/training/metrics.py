"""What a run tells people: metrics.jsonl and a progress line.

metrics.jsonl holds one JSON object a log step and one history: each line is written whole, in one
call, and reaches the disk before training goes on; opening the file again repairs a torn last line
and cuts what a resumed run is about to write anew. A number that is not finite becomes null.

This file knows no JAX: arrays come in as anything NumPy can read.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rich
from jaxtyping import Float, Num
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from dsv3_jax.config import UserError
from dsv3_jax.config.records import records_in
from dsv3_jax.training.sinks import Sink

log = logging.getLogger(__name__)

# What the console shows, in this order, as (key, name, format).
_SHOWN = (
    ("loss", "loss", ".4f"),
    ("ce", "ce", ".4f"),
    ("mtp", "mtp", ".4f"),
    ("lr", "lr", ".2e"),
    ("grad_norm", "grad_norm", ".3f"),
    ("tokens_per_s", "tok/s", ",.0f"),
    ("mfu", "mfu", ".1%"),
    ("val_loss", "val_loss", ".4f"),
    ("val_bits_per_byte", "val_bits_per_byte", ".4f"),
)


class MetricsLog:
    """Writes metrics.jsonl and shows progress; a context manager, or call `close()`."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        steps: int,
        resumed_from: int | None = None,
        primary: bool = True,
        sinks: Sequence[Sink] = (),
    ):
        """Opens RUN/metrics.jsonl for a run of `steps` steps.

        `resumed_from`: the step restored, whose later lines are cut; None for a new run, which
        moves an older metrics.jsonl to metrics.old-N.jsonl. With `primary=False` (processes other
        than the first) nothing is written or shown. `sinks` are given the same numbers, and closed
        with it. Raises OSError when the folder is unwritable.
        """
        self.path = Path(run_dir) / "metrics.jsonl"
        self._steps, self._primary = steps, primary
        self._first: tuple[int, float] | None = None  # step and time of this process's first line
        self._progress: Progress | None = None
        self._sinks = list(sinks)
        self._file = -1
        if not primary:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _repair(self.path, resumed_from)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        console = rich.get_console()
        if console.is_terminal:
            progress = self._progress = Progress(*_columns(), console=console, expand=True)
            self._task = progress.add_task("", total=steps, completed=resumed_from or 0)
            progress.start()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line for `step`, and shows its main numbers.

        `values` maps keys (`loss ce mtp balance lr grad_norm tokens_per_s val_loss
        val_bits_per_byte`, what `expert_stats` returns, and any other) to numbers, arrays, or
        dicts and lists of these.
        """
        self.record(step, values)
        if not self._primary:
            return
        now = time.monotonic()
        self._first = self._first or (step, now)
        shown = _shown(values)
        line = f"step {step}/{self._steps} {shown}"
        log.info(line, extra={"progress": True})
        if self._progress is None:
            done = step - self._first[0]
            eta = (now - self._first[1]) / done * (self._steps - step) if done > 0 else None
            print(line + (f" eta {_duration(eta)}" if eta else ""), flush=True)
            return
        brief = _shown({k: v for k, v in values.items() if k in ("loss", "lr", "tokens_per_s")})
        self._progress.update(self._task, completed=step, description=brief)
        if "val_loss" in values:
            self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line for `step` without showing it."""
        if not self._primary:
            return
        record = {"step": int(step), **_plain(dict(values))}
        line = _json_line(record).encode()
        try:
            # One write of the whole line: a killed process leaves all of it or nothing.
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            reason = f"{error.strerror}; a line of {len(line):,} bytes is wanted"
            raise OSError(error.errno, reason, str(self.path)) from error
        numbers = {
            key: value
            for key, value in record.items()
            if key != "step" and isinstance(value, int | float)
        }
        for sink in self._sinks if numbers else ():
            sink.add(step, numbers)

    def close(self) -> None:
        """Ends the progress line and closes the files; harmless when repeated."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        while self._sinks:
            self._sinks.pop().close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def expert_stats(
    load: Num[np.ndarray, "L E"], bias: Float[np.ndarray, "L E"] | None = None
) -> dict[str, list[Any]]:
    """Per-layer router statistics, as metrics.jsonl holds them, from tokens routed to each expert.

    `expert_load`: each expert's fraction of the layer's assignments (balanced: 1/E), to 3 digits.
    `max_vio`: max(load) / mean(load) - 1, 0 when balanced (Wang et al. 2024, "Auxiliary-Loss-Free
    Load Balancing", section 2.1). `dead_experts`: how many got nothing. `bias_range`: least and
    largest router bias, when given. A layer without any token has null.
    """
    load = np.asarray(load, np.float64)
    if load.ndim != 2:
        raise ValueError(f"load has shape {load.shape}; it must be [layers, experts]")
    total = load.sum(axis=1)
    fraction = load / np.where(total > 0, total, np.nan)[:, None]
    stats: dict[str, list[Any]] = {
        "expert_load": [[_rounded(f) for f in layer] for layer in fraction],
        "max_vio": [_rounded(f) for f in fraction.max(axis=1) * load.shape[1] - 1],
        "dead_experts": [int(n) for n in (load == 0).sum(axis=1)],
    }
    if bias is not None:
        bias = np.asarray(bias, np.float64)
        stats["bias_range"] = [[_rounded(b.min()), _rounded(b.max())] for b in bias]
    return stats


def newest_numbers(path: Path, step: int) -> dict[str, Any]:
    """Each key's newest number in a metrics.jsonl up to a step; {} where there is no such file."""
    found: dict[str, Any] = {}
    for _, record in records_in(path) if path.exists() else ():
        if record is not None and record["step"] <= step:
            found |= {key: value for key, value in record.items() if value is not None}
    return found


def _repair(path: Path, resumed_from: int | None) -> None:
    """Makes metrics.jsonl end where the run goes on."""
    if not path.exists():
        return
    if resumed_from is None:
        n = 1
        while (old := path.with_name(f"metrics.old-{n}.jsonl")).exists():
            n += 1
        path.rename(old)
        log.warning("a new run starts here: moved the metrics of an older one to %s", old)
        return
    temporary = path.with_suffix(".tmp")
    torn = later = 0
    try:
        with temporary.open("wb") as file:
            for line, record in records_in(path):
                if record is None:
                    torn += 1
                elif record["step"] > resumed_from:
                    later += 1
                else:
                    file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, UserError):
        temporary.unlink(missing_ok=True)
        raise
    if torn:
        log.warning("%s: left out %d line(s) torn by a crash", path, torn)
    if later:
        log.info("%s: cut %d line(s) after step %d", path, later, resumed_from)
    if torn or later:
        temporary.replace(path)
    else:
        temporary.unlink()


def _json_line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"


def _plain(value: Any) -> Any:
    """A value as JSON can hold it, with None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _plain(np.asarray(value).tolist())


def _rounded(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _shown(values: Mapping[str, Any]) -> str:
    known = [(name, values[key], form) for key, name, form in _SHOWN if values.get(key) is not None]
    return " ".join(f"{name} {format(float(value), form)}" for name, value, form in known)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _NumbersColumn(ProgressColumn):
    """The numbers of a step: what a narrow terminal cuts off first."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


def _columns() -> list[ProgressColumn]:
    """The progress line's parts. A table narrows those first that may wrap: only the numbers."""
    whole = partial(Column, no_wrap=True)
    return [
        TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=whole()),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        _NumbersColumn(table_column=Column()),
        TextColumn("[dim]eta", table_column=whole()),
        TimeRemainingColumn(compact=True, table_column=whole()),
    ]
