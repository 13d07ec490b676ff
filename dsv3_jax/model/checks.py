"""What a caller of the model may get wrong, said before anything is computed.

All of it is looked at when a function is called or traced; nothing of it is in a compiled program.
"""

import functools
import sys
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from dsv3_jax.config import ModelConfig


def check_tokens(tokens: Any, config: ModelConfig, *, whole_rows: bool = True) -> None:
    """Raises ValueError unless tokens are integers [B, T] of the vocabulary.

    With whole_rows, no more than max_position_embeddings of them. Ids are looked at where they have
    values here: not while a function is traced, and not when other processes hold some.
    """
    shape, dtype = getattr(tokens, "shape", None), getattr(tokens, "dtype", None)
    if shape is None or len(shape) != 2:
        what = type(tokens).__name__ if shape is None else list(shape)
        raise ValueError(f"tokens must be an array [B, T], not {what}: one row is tokens[None]")
    if dtype is None or not np.issubdtype(dtype, np.integer):
        raise ValueError(f"tokens must be integers, not {dtype}")
    if whole_rows and shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"rows of {shape[1]} tokens exceed {config.max_position_embeddings=}: cut them, or "
            "raise it (with rope_scaling, if the weights were trained on shorter ones)"
        )
    if isinstance(tokens, Tracer):
        return
    if isinstance(tokens, jax.Array) and not tokens.is_fully_addressable:
        return
    ids = np.asarray(tokens)
    if ids.size and not 0 <= ids.min() <= ids.max() < config.vocab_size:
        raise ValueError(
            f"token ids from {ids.min()} to {ids.max()}: they must lie in [0, {config.vocab_size=})"
        )


def check_nothing_is_replaced() -> None:
    """Raises ValueError where a function that the model calls was replaced since the first Pass.

    Its modules import functions by name, and programs keep what they were traced with: both would
    go on with the old one, and nothing would say so.
    """
    for home, name, user, value in _imported_by_name():
        for module in (home, user):
            if vars(sys.modules[module]).get(name) is not value:
                raise ValueError(
                    f"{module}.{name} was replaced, but programs traced before, and "
                    f"{user if module == home else home}, still use the old one. Give your own "
                    "function to Pass, where it has a field for it; or replace the name in both "
                    "modules before the first Pass is made"
                )


@functools.cache
def _imported_by_name() -> tuple[tuple[str, str, str, Any], ...]:
    """(module where a function is defined, its name, module of the model that imports it, it)."""
    found = []
    for user, module in list(sys.modules.items()):
        if not user.startswith("dsv3_jax.model."):
            continue
        for name, value in vars(module).items():
            home = getattr(value, "__module__", None)
            if callable(value) and isinstance(home, str) and home.startswith("dsv3_jax."):
                there = vars(sys.modules[home]).get(name) if home in sys.modules else None
                if home != user and there is value:
                    found.append((home, name, user, value))
    return tuple(found)
