"""How busy each expert was while serving: counted by `generate`, and kept for plans of replicas."""

import json
from pathlib import Path

import numpy as np
from jaxtyping import Array, Int

from dsv3_jax.config import ModelConfig


class ExpertLoad:
    """The choices that each expert of each MoE layer of the main model has received so far.

    `count_LE` is int64 [L, E]; `generate(expert_load=...)` adds to it.
    """

    def __init__(self, config: ModelConfig):
        self.count_LE = np.zeros((config.num_moe_layers, config.n_routed_experts), np.int64)

    def add(self, load_LE: Int[Array | np.ndarray, "L E"]) -> None:
        """Adds the counts of one step."""
        self.count_LE += np.asarray(load_LE, np.int64)

    def write(self, path: Path) -> None:
        """Appends a line to a file that `load_balancer.logged_load` reads, as training's metrics.

        `expert_load` holds fractions of each layer's choices, and null for a layer that had none.
        """
        total_L1 = self.count_LE.sum(-1, keepdims=True)
        fractions = self.count_LE / np.maximum(total_L1, 1)
        rows = [row if n else [None] * len(row) for row, n in zip(fractions.tolist(), total_L1)]
        line = {"expert_load": rows, "choices": int(total_L1.max(initial=0))}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
