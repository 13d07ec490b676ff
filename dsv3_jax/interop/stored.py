"""What is stored where another form is looked for: scales of other dtypes, experts in one tensor.

DeepSeek-V3 stores a matrix a tensor and F32 scales. Newer files of the family keep scales as powers
of two of one byte (F8_E8M0) or in BF16, and transformers 5 may write all experts of a layer as one
tensor. Each of them holds the same numbers, so they are read as they lie, without a copy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.name_map import scale_name, scale_shape
from dsv3_jax.interop.safetensors import StoredTensor

# Every number of these is one of F32, so that scales of any are read exactly.
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_FUSED = re.compile(
    r"(model\.layers\.\d{1,6}\.mlp\.experts)\.(gate_up_proj|down_proj)(\.weight)?(_scale_inv)?"
)


def common_dtype(dtypes: set[str]) -> str:
    """The narrowest dtype that a stack of matrices stored in these can have without FP8's rounding.

    FP8 weights beside others are dequantised, as they are when everything is.
    """
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "BF16" if dtypes <= {"BF16", "F8_E4M3"} else "F32"


def count_non_finite(rows: np.ndarray) -> int:
    """How many numbers of an array of a stored dtype are NaN or infinite."""
    if rows.dtype.itemsize == 1:  # all ones but the sign: E4M3's NaN; all ones: E8M0's
        codes = rows.reshape(-1).view(np.uint8)
        bad = codes == 0xFF if rows.dtype.name == "float8_e8m0fnu" else (codes & 0x7F) == 0x7F
    elif rows.dtype.name == "bfloat16":  # ml_dtypes' isfinite takes ten times as long
        bad = (rows.reshape(-1).view(np.uint16) & 0x7F80) == 0x7F80
    else:
        bad = ~np.isfinite(rows)
    return int(np.count_nonzero(bad))


def split_experts(
    config: ModelConfig, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """(tensors with those of all experts of a layer taken apart by expert, what is wrong).

    The form is that of transformers 5's modules: `experts.gate_up_proj` [E, 2F, D], gate before up,
    and `experts.down_proj` [E, D, F], with scales of their blocks where they are FP8.
    """
    experts, width, dim = (
        config.n_routed_experts,
        config.moe_intermediate_size,
        config.hidden_size,
    )
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        fused = _FUSED.fullmatch(name)
        if fused is None:
            found[name] = tensor
            continue
        layer, kind, _, scale = fused.groups()
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        shape = (width, dim) if len(parts) == 2 else (dim, width)
        if scale and len(parts) == 2 and width % 128:
            problems.append(f"{name} has blocks that lie across gate and up, {width} rows each")
            continue
        part = scale_shape(shape) if scale else shape
        whole = (experts, len(parts) * part[0], part[1])
        if tensor.shape != whole:
            problems.append(f"{name} has shape {list(tensor.shape)} instead of {list(whole)}")
            continue
        for position in range(experts * len(parts)):
            expert, half = divmod(position, len(parts))
            published = f"{layer}.{expert}.{parts[half]}.weight"
            published = scale_name(published) if scale else published
            if published in tensors:
                problems.append(f"{published} is stored twice, alone and in {name}")
            found[published] = tensor.at(position, part)
    return found, problems
