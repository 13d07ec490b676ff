"""The matrix products of DeepSeek-V3's layers, once, for every benchmark and sweep.

Names are the layers'; m counts tokens, n and k are the weight's [n, k]. 4096 tokens a device is the
training step of the V3 report's infrastructure section, 64 and 128 are decode batches. Grouped
rows are those of one device: 4 experts of 8192 rows under EP64, 32 of 1024 under EP8.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["dense", "grouped", "masked", "wgrad"]


@dataclass(frozen=True)
class Product:
    """One product: `groups` times [m, k] by [n, k]; of a weight gradient, k counts tokens."""

    name: str
    kind: Kind
    m: int
    n: int
    k: int
    groups: int = 1
    dtype: Literal["fp8", "bf16"] = "fp8"

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.groups * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """Bytes that must move: each operand and scale read once, the result written once."""
        size = 1 if self.dtype == "fp8" else 2
        weights = self.n * self.k * size
        rows = self.m * self.k * size
        scales = 0
        if self.dtype == "fp8":
            tile = 128 if self.kind != "wgrad" else 1
            scales = 4 * (self.m * self.k // 128 + self.n * self.k // (128 * tile))
        out = self.m * self.n * (4 if self.kind == "wgrad" else 2)
        return self.groups * (weights + rows + scales + out)

    @property
    def label(self) -> str:
        """The row's name in tables: layer, groups and sizes."""
        groups = f"{self.groups} x " if self.groups > 1 else ""
        suffix = " bf16" if self.dtype == "bf16" else ""
        return f"{self.name} {groups}{self.m} x {self.n} x {self.k}{suffix}"


_LAYERS = {
    "q_a + kv_a": (2112, 7168),
    "q_b": (24576, 1536),
    "kv_b": (32768, 512),
    "o": (7168, 16384),
    "gate_up": (4096, 7168),
    "down": (7168, 2048),
}

TRAINING = tuple(Product(name, "dense", 4096, n, k) for name, (n, k) in _LAYERS.items())
DECODING = tuple(
    Product(name, "dense", m, n, k) for m in (64, 128) for name, (n, k) in _LAYERS.items()
)
DENSE = TRAINING + DECODING
GROUPED = tuple(
    Product(name, "grouped", rows, *_LAYERS[name], groups=experts)
    for name in ("gate_up", "down")
    for experts, rows in ((4, 8192), (32, 1024))
)
GROUPED_BF16 = tuple(
    Product(name, "grouped", 8192, *_LAYERS[name], groups=4, dtype="bf16")
    for name in ("gate_up", "down")
)
MASKED = tuple(
    Product(name, "masked", rows, *_LAYERS[name], groups=32)
    for rows in (128, 64)
    for name in ("gate_up", "down")
)
WGRAD = (
    Product("gate_up", "wgrad", 4096, 7168, 8192, groups=4),
    Product("down", "wgrad", 7168, 2048, 8192, groups=4),
    Product("gate_up", "wgrad", 4096, 7168, 2048, groups=16),
    Product("down", "wgrad", 7168, 2048, 2048, groups=16),
    Product("o", "wgrad", 7168, 16384, 4096),
    Product("gate_up", "wgrad", 4096, 7168, 8192, groups=4, dtype="bf16"),
)
ALL = TRAINING + GROUPED + GROUPED_BF16 + WGRAD + MASKED + DECODING
