"""What a lowered program moves between devices, by the mesh axes that each collective spans.

Read from StableHLO, before a backend compiles it: XLA:CPU widens narrow types (FP8 travels as F16),
so that bytes counted in its output would be twice what other backends move.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_BITS = re.compile(r"\d+")
_OP = re.compile(
    r"stablehlo\.(?P<op>all_to_all|all_gather|all_reduce|reduce_scatter|collective_permute)\b"
    r"|stablehlo\.custom_call @(?P<custom>ragged_all_to_all)\b"
)
_TENSOR = re.compile(r"tensor<((?:\d+x)*)([a-zA-Z]\w*)>")
_SIGNATURE = re.compile(r": \((?P<operands>[^)]*)\) -> (?P<results>\(?tensor<[^>]*>[^\n]*)")
_DENSE = re.compile(r"replica_groups = dense<(.*?)> : tensor<(\d+)x(\d+)xi64>")
_NAMED = re.compile(r"replica_groups = #stablehlo.replica_group_mesh_axes<.*?axes = \[(.*?)\]")


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Fields:
        op: as StableHLO calls it, or "ragged_all_to_all".
        axes: the mesh axes, larger than 1, along which the devices of a group differ.
        group: devices in a group.
        shape, dtype: of its first operand, as StableHLO writes them.
    """

    op: str
    axes: tuple[str, ...]
    group: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def payload(self) -> int:
        """Bytes of the first operand on each device."""
        return math.prod(self.shape) * _itemsize(self.dtype)

    @property
    def sent(self) -> float:
        """Bytes that a device sends to others; of a ragged one, the most that it can send."""
        others = (self.group - 1) / self.group
        if self.op == "all_gather":
            return self.payload * (self.group - 1)
        if self.op == "all_reduce":
            return 2 * self.payload * others
        return self.payload * (1.0 if self.op == "collective_permute" else others)


def collectives_of(stablehlo: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every collective of a program's text, `lowered.as_text()`, in order.

    A loop's body counts once. Devices are those of a mesh of this shape, in its order.
    """
    found = []
    for match in _OP.finditer(stablehlo):
        text = stablehlo[match.start() :]
        signature = _SIGNATURE.search(text)
        assert signature is not None
        head = text[: signature.start()]
        axes, group = _groups(head, mesh_shape)
        if group > 1:
            dims, dtype = _TENSOR.findall(signature["operands"])[0]
            shape = tuple(int(n) for n in dims.split("x") if n)
            op = match["op"] or match["custom"]
            found.append(Collective(op, axes, group, shape, dtype))
    return found


def sent_by_axes(collectives: list[Collective]) -> dict[tuple[str, ...], float]:
    """Bytes that a device sends to others, by the axes that the collectives span."""
    total: dict[tuple[str, ...], float] = {}
    for collective in collectives:
        total[collective.axes] = total.get(collective.axes, 0.0) + collective.sent
    return total


def _groups(head: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The axes that a collective's groups span, and a group's size."""
    if named := _NAMED.search(head):
        names = re.findall(r'name = "(\w+)"', named[1])
        axes = tuple(name for name in names if mesh_shape[name] > 1)
        return axes, math.prod(mesh_shape[axis] for axis in axes)
    dense = _DENSE.search(head)
    if dense is None:
        return (), 1  # a permute names pairs, not groups
    text, rows, columns = dense[1], int(dense[2]), int(dense[3])
    if text.startswith('"0x'):
        flat = np.frombuffer(bytes.fromhex(text[3:-1]), np.int64)
    else:
        flat = np.array([int(n) for n in re.findall(r"-?\d+", text)])
    if len(flat) == 1:
        flat = np.broadcast_to(flat, rows * columns)
    first = flat.reshape(rows, columns)[0]
    places = np.array(np.unravel_index(first, tuple(mesh_shape.values())))
    varies = (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, v in zip(mesh_shape, varies) if v), columns


def _itemsize(dtype: str) -> int:
    """Bytes of StableHLO's bf16, f8E4M3FN, ui8, i1, ..."""
    bits = int(_BITS.findall(dtype)[0])
    return max(bits // 8, 1)
