"""What an import is besides its numbers: its manifest, and what each of its files may hold."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dsv3_jax.config import ModelConfig, UserError
from dsv3_jax.config.files import build, file_inside, read_json
from dsv3_jax.interop.name_map import Leaf, scale_shape
from dsv3_jax.interop.safetensors import StoredTensor
from dsv3_jax.interop.stored import SCALE_DTYPES

MANIFEST = "dsv3_jax_weights.json"
# Model config, and a sha256 for each file.
MAX_MANIFEST_BYTES = 64 << 20
FP8 = "F8_E4M3"


@dataclass(frozen=True)
class ImportManifest:
    """What `import_hf` writes beside the weights, as dsv3_jax_weights.json."""

    format: int
    model: ModelConfig
    scale_fmt: Literal["ue8m0"] | None
    sha256: dict[str, str]  # of every published matrix, scales among them, by name
    files: dict[str, str] = field(default_factory=dict)  # sha256 of config.json, tokenizer and such
    seal: str | None = None  # sha256 of all the other fields; imports of before have neither

    def sealed(self) -> ImportManifest:
        """The same manifest with its seal."""
        values = dataclasses.asdict(dataclasses.replace(self, seal=None))
        text = json.dumps(values, sort_keys=True)
        return dataclasses.replace(self, seal=hashlib.sha256(text.encode()).hexdigest())


def read_manifest(folder: str | Path) -> ImportManifest:
    """The manifest of an import, every field checked; UserError names the file."""
    path = file_inside(Path(folder), MANIFEST)
    manifest = build(ImportManifest, read_json(path, MAX_MANIFEST_BYTES), path)
    if manifest.format != 1:
        raise UserError(f"{path}: format {manifest.format} is not 1")
    if manifest.seal is not None and manifest.seal != manifest.sealed().seal:
        raise UserError(f"{path}: does not hold what was written: import it again")
    if found := manifest.model.problems():
        raise UserError(f"{path}: model.{'; model.'.join(found)}")
    return manifest


def leaf_file(path: tuple[str, ...]) -> str:
    """Where an import keeps a leaf, relative to its folder."""
    return f"weights/{'.'.join(path)}.safetensors"


def leaf_problem(leaf: Leaf, stored: Mapping[str, StoredTensor]) -> str | None:
    """What is wrong with the file of a leaf, or None.

    It holds "values", and "scales" if those are FP8, or matrices of several dtypes by their
    published names, which are checked with those of all files.
    """
    values, scales = stored.get("values"), stored.get("scales")
    if values is None:
        return None
    if math.prod(values.shape) != math.prod(leaf.lead + leaf.shape):
        return f"is not {leaf.lead + leaf.dims} values"
    if values.dtype not in ("BF16", "F32", FP8) or len(stored) > (2 if values.dtype == FP8 else 1):
        return f"holds {values.dtype} values and {len(stored) - 1} tensors more"
    if values.dtype == FP8 and (
        scales is None
        or scales.dtype not in SCALE_DTYPES
        or scales.shape != leaf.lead + scale_shape(leaf.shape)
    ):
        return f"has no scales {list(leaf.lead + scale_shape(leaf.shape))} of its FP8 values"
    return None
