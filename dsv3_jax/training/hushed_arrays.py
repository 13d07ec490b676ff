"""What orbax's reads and writes of arrays print when they outlast one that failed: nothing."""

import functools
import logging
import re
import sys
from pathlib import Path
from typing import Any


@functools.cache
def hush_other_arrays() -> None:
    """From now on, shows no traceback of arrays' reads and writes that outlast one that failed.

    TensorStore's threads tell their ends to orbax's event loop, which is closed by then: a
    RuntimeError, or the cause of another error. Those that end before it is closed fail unheard:
    asyncio logs them.
    """
    shown, shown_unraisable = sys.excepthook, sys.unraisablehook

    def excepthook(kind: Any, error: BaseException, trace: Any) -> None:
        if not _of_closed_loop(error):
            shown(kind, error, trace)

    def unraisablehook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = "orbax" in Path(getattr(code, "co_filename", "")).parts
        if not of_orbax and not _of_closed_loop(unraisable.exc_value):
            shown_unraisable(unraisable)

    sys.excepthook, sys.unraisablehook = excepthook, unraisablehook
    logging.getLogger("asyncio").addFilter(_is_no_unheard_array)


def _is_no_unheard_array(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    unheard = message.startswith("Task exception was never retrieved")
    return not (unheard and re.search(r"defined at [^>]*/orbax/", message))


def _of_closed_loop(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, RuntimeError) and str(error) == "Event loop is closed":
            return True
        error = error.__cause__ or error.__context__
    return False
