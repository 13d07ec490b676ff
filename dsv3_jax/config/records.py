"""metrics.jsonl read back a line at a time: whole records of a run, and how many lines are none.

Reports, resumed runs and plans of redundant experts read it, also from folders of strangers: a line
is bounded before it is parsed, and what they look at in it has the form that a run gives it.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3_jax.config.files import MAX_VALUES
from dsv3_jax.config.rules import UserError

# V3's line, with 256 experts in each of 59 layers, has some 150 kB.
MAX_LINE_BYTES = 16 << 20
# What f32 can hold, and all counts.
_LARGEST = 1e40
_NUMBERS = (
    *("loss", "ce", "mtp", "balance", "lr", "grad_norm", "tokens_per_s", "mfu", "peak_memory_gib"),
    *("val_loss", "val_bits_per_byte", "batch_size", "tokens", "skipped", "host_memory_gib"),
)
_DIMS = {"expert_load": 2, "bias_range": 2, "max_vio": 1, "dead_experts": 1}


def records_in(
    path: Path, *, of_steps: bool = True
) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of a metrics.jsonl and its record; None for one that no run wrote whole.

    A record has numbers or null under the names that are read, and a `step` unless `of_steps` is
    False: what was counted while generating belongs to none. Raises UserError for a
    line of more than 16 MiB and for what is no regular file, OSError.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path}: not a regular file")
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{path}:{number}: a line of more than {MAX_LINE_BYTES} bytes")
            yield line, _record(line, of_steps)


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a metrics.jsonl, in order, and how many lines are none; errors as above."""
    records, torn = [], 0
    for _, record in records_in(path):
        if record is None:
            torn += 1
        else:
            records.append(record)
    return records, torn


def _record(line: bytes, of_steps: bool) -> dict[str, Any] | None:
    if not line.endswith(b"\n") or sum(map(line.count, (b",", b"[", b"{"))) > MAX_VALUES:
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _fits(record, of_steps) else None


def _fits(record: dict[str, Any], of_steps: bool) -> bool:
    step = record.get("step", None if of_steps else 0)
    if type(step) is not int or not 0 <= step < 1 << 62:
        return False
    if not all(_is_number(record.get(name)) for name in _NUMBERS):
        return False
    for name, dims in _DIMS.items():
        if (value := record.get(name)) is not None and len(_shape(value) or ()) != dims:
            return False
    seconds = record.get("seconds")
    return seconds is None or (
        isinstance(seconds, dict)
        and all(k.isidentifier() and len(k) < 40 and _is_number(v) for k, v in seconds.items())
    )


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) < _LARGEST)


def _shape(value: Any) -> tuple[int, ...] | None:
    """The shape of lists of numbers, all of one length; None for anything else."""
    if not isinstance(value, list):
        return () if _is_number(value) else None
    shapes = {_shape(item) for item in value}
    if len(shapes) != 1 or None in shapes:
        return None
    return (len(value), *(shapes.pop() or ()))
