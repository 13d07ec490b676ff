"""Several corpora by weight, as `data.path` spells them."""

from __future__ import annotations

import re

from dsv3_jax.config import UserError

BLOCK = 4096  # rows, in each of which a corpus has a fixed number of places (mixture.py)
_PART = re.compile(r"(?P<path>.+):(?P<weight>[-+0-9.eE]+)")


def split_path(path: str) -> list[tuple[str, float]]:
    """(path, weight) of each corpus of "A:0.7,B:0.3", weights of sum 1; [(path, 1)] otherwise.

    UserError for weights that are negative, not finite, below 1/4096 of all or sum up to zero.
    """
    parts = [_PART.fullmatch(part) for part in path.split(",")]
    if not all(parts):
        return [(path, 1.0)]
    named = [(part["path"], part["weight"]) for part in parts if part is not None]
    try:
        weights = [float(weight) for _, weight in named]
    except ValueError:
        raise UserError(f"data.path={path!r}: weights are numbers, as in A:0.7,B:0.3") from None
    if not all(0 <= weight < float("inf") for weight in weights):
        raise UserError(f"data.path={path!r}: weights must be finite and not negative")
    if not (total := sum(weights)):
        raise UserError(f"data.path={path!r}: the weights sum up to zero")
    if len({name for name, _ in named}) < len(named):
        raise UserError(f"data.path={path!r}: a corpus is named twice")
    found = [(name, weight / total) for (name, _), weight in zip(named, weights)]
    for name, weight in found:
        if round(weight * BLOCK) == 0:
            raise UserError(
                f"data.path={path!r}: {name} would have {weight:.2g} of the rows, less than "
                f"1/{BLOCK}: leave it out or raise its weight"
            )
    return found
