"""The Pallas kernels of a compiled program: their names, and FLOPs by the shapes that they read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from dsv3_jax.analysis.hlo import Instruction, shape

_KERNEL_TARGETS = re.compile(r'custom_call_target="(mosaic\w*|tpu_custom_call)"')


def is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction is a Pallas kernel, for a GPU or a TPU."""
    found = _KERNEL_TARGETS.search(instruction.attributes)
    return instruction.op == "custom-call" and found is not None


def kernel_flops(instruction: Instruction, types: Mapping[str, str]) -> float:
    """FLOPs of a Pallas kernel of ours by the shapes of its operands; 0 for one without products.

    A matrix kernel's operands hold the contracted dim last; a result of several groups from plain
    operands contracts each row in one group. Attention's forward is causal; its backward kernels
    are counted by the tiles of scores that they hand on.
    """
    outputs = [shape(part) for part in re.findall(r"\w+\[[\d,]*\]", instruction.type)]
    if "tpu_custom_call" in instruction.attributes:
        if any("quantize" in part for part in instruction.source.split("/")[-2:]):
            return 0.0
        read = [types.get(name, "") for name in instruction.operands]
        return _tpu_kernel_flops(
            instruction.source, [shape(each) for each in read if each[:1] != "s"], outputs
        )
    operands = [shape(types.get(name, "")) for name in instruction.operands]
    if "attention_forward" in instruction.source:
        batch, length, heads, width = operands[0]
        tiles = length * (length + 128) / 2
        return 2.0 * batch * heads * tiles * (width + outputs[0][-1])
    if "attention_key_gradients" in instruction.source:
        return 2.0 * math.prod(outputs[0]) * 2 * (operands[0][-1] + operands[1][-1])
    if "attention_query_products" in instruction.source:
        return 2.0 * math.prod(operands[0]) * outputs[0][-1]
    if "wgrad" in instruction.source and len(operands) > 1:
        # Beside the gradient, or the array for all layers that it is left in: sums of its squares.
        return _weight_gradient_flops(operands, max(outputs, key=math.prod))
    names = ("scaled_matmul", "grouped_matmul", "grouped_dgrad")
    if not any(name in instruction.source for name in names) or len(operands) < 2:
        return 0.0
    return _product_flops(operands, outputs)


def _product_flops(operands: list[tuple[int, ...]], outputs: list[tuple[int, ...]]) -> float:
    groups = math.prod(outputs[0][:-2]) if len(operands[1]) == 2 else 1
    return 2.0 * math.prod(outputs[0]) * operands[0][-1] / groups


def _weight_gradient_flops(operands: list[tuple[int, ...]], result: tuple[int, ...]) -> float:
    """Of [..., E, N, K] from rows [N, M] and [K, M] in FP8, or [M, N] and [M, K] in BF16: each of M
    rows is in one group."""
    features = math.prod(result[-2:])
    rows = math.sqrt(math.prod(operands[0]) * math.prod(operands[1]) / features)
    return 2.0 * features * rows


def _tpu_kernel_flops(
    source: str, operands: list[tuple[int, ...]], outputs: list[tuple[int, ...]]
) -> float:
    """`kernel_flops` for a TPU, by the operands that are no integers.

    Attention has heads before rows, and blocks of 512 rows along the diagonal; its two backward
    kernels both make the scores and their gradient again.
    """
    if len(operands) < 2:
        return 0.0
    if "attention" in source:
        batch, heads, length, width = operands[0]
        value = outputs[0][-1] if "forward" in source else operands[3][-1]
        products = {
            "forward": width + value,
            "key": 2 * (width + value),
            "query": 2 * width + value,
        }
        which = next((name for name in products if f"attention_{name}" in source), None)
        scores = batch * heads * length * (length + min(length, 512)) / 2
        return 2.0 * scores * products[which] if which else 0.0
    if len(operands[0]) != 2 or len(operands[1]) not in (2, 3):
        return 0.0
    return _product_flops(operands, outputs)


def kernel_name(instruction: Instruction) -> str:
    """The name a kernel was given, or else that of the function it was called in."""
    named = re.search(r'kernel_name\s*[=:]\s*\\?"([\w.\-]+)', instruction.attributes)
    if named is not None:
        return named[1]
    parts = [part for part in instruction.source.split("/") if part not in ("", "pallas_call")]
    functions = re.findall(r"jit\((\w+)\)", instruction.source)
    return functions[-1] if functions else (parts[-1] if parts else "kernel")
