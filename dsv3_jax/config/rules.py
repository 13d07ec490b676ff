"""What configs share: the two kinds of errors that people see, and the rules of their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal


class UserError(ValueError):
    """The user's mistake: command lines show it in one message and exit with code 2."""


class RunError(RuntimeError):
    """The run or its environment failed: command lines show it in one message, exit code 1."""


# The dtypes by name, as config.json spells them.
DType = Literal["bfloat16", "float32"]


def require_positive(found: list[str], group: Any, names: Sequence[str]) -> None:
    """Adds to what was found each of these fields of the group that is not positive."""
    found += [f"{n}={getattr(group, n)} must be positive" for n in names if getattr(group, n) <= 0]


def require_not_negative(found: list[str], group: Any, names: Sequence[str]) -> None:
    """Adds to what was found each of these fields of the group that is negative."""
    values = {name: getattr(group, name) for name in names}
    found += [f"{name}={value} must not be negative" for name, value in values.items() if value < 0]


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below the value."""
    return -(-value // multiple) * multiple
