"""Where a run's log goes: the console in short form, and RUN/log.txt once the folder is its own.

What is said before that is held back for the file, so that a run that is refused leaves another
run's log as it was.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

import rich


def set_up_logging(run_dir: str | Path | None = None, *, process: int = 0) -> None:
    """Sends log records to the console, and to RUN/log.txt now or once `keep_log` is called.

    Of several processes, process N shows warnings only, and its file is log.N.txt.
    """
    root = logging.getLogger()
    for old in list(root.handlers):
        # A library's stray logging.info() before this installs a plain handler: lines would double.
        if getattr(old, "dsv3_jax", False) or type(old) is logging.StreamHandler:
            root.removeHandler(old)
            old.close()
    _add(_ConsoleHandler(logging.WARNING if process else logging.INFO))
    _add(_Held())
    root.setLevel(logging.WARNING)
    logging.getLogger("dsv3_jax").setLevel(logging.INFO)
    # Orbax tells each save in some forty INFO lines, through absl.
    logging.getLogger("absl").setLevel(logging.WARNING)
    if run_dir is not None:
        keep_log(run_dir, process=process)


def keep_log(run_dir: str | Path, *, process: int = 0) -> None:
    """Appends to RUN/log.txt (log.N.txt) from here on, and first what was said since the set-up."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    name = f"log.{process}.txt" if process else "log.txt"
    file = _LogFile(Path(run_dir) / name, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for held in [handler for handler in root.handlers if isinstance(handler, _Held)]:
        root.removeHandler(held)
        for record in held.records:
            file.handle(record)
    _add(file)


def _add(handler: logging.Handler) -> None:
    handler.dsv3_jax = True  # type: ignore[attr-defined]
    logging.getLogger().addHandler(handler)


class _Held(logging.Handler):
    """Keeps records for the file that they may go to."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _LogFile(logging.FileHandler):
    """A file whose disk may be full: that is said once, and the run goes on."""

    told = False

    def close(self) -> None:
        # What could not be written is lost, and was told.
        with contextlib.suppress(OSError):
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            print(
                f"warning: {self.baseFilename} cannot be written: {error.strerror}",
                file=sys.stderr,
                flush=True,
            )


class _ConsoleHandler(logging.Handler):
    """Prints records to rich's console, above a progress line; MetricsLog shows its own."""

    def emit(self, record: logging.LogRecord) -> None:
        # Orbax logs each failure as pages of tracebacks through absl; CheckpointError says it in a
        # line, and log.txt has the rest.
        if getattr(record, "progress", False) or record.name == "absl":
            return
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        console = rich.get_console()
        console.print(level + self.format(record), highlight=False, markup=False, soft_wrap=True)
