"""What `python -m dsv3_jax import-hf`, `export-hf` and `logits` do; cli parses the options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.trace import read_tokens, trace


def write_logits(
    variables: dict[str, Any], config: ModelConfig, tokens: str | Path, out: str | Path
) -> dict[str, np.ndarray]:
    """Writes `trace` of the token ids in a .npy file to `out`, a .npz file, and returns it."""
    found = trace(variables, read_tokens(tokens, config), config)
    np.savez(out, **found)
    return found
