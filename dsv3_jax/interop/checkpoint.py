"""A checkpoint as a table of published names, wherever its numbers lie.

`open_checkpoint` reads a Hugging Face folder or the result of an import, `from_variables` a tree in
memory; loading, importing, exporting and comparing see no difference. Opening reads headers only,
and names all that differs from what config.json asks for before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsv3_jax.config import ModelConfig, UserError
from dsv3_jax.config.files import file_inside, read_config, read_json, shown
from dsv3_jax.interop.folder import describes_a_model, no_weights, refuse_adapter
from dsv3_jax.interop.hf_config import (
    EosTokenId,
    eos_of_generation_config,
    model_config_from_hf,
    scale_format_of_hf,
)
from dsv3_jax.interop.import_manifest import (
    MANIFEST,
    ImportManifest,
    leaf_file,
    leaf_problem,
    read_manifest,
)
from dsv3_jax.interop.name_map import (
    IGNORED,
    Place,
    leaves,
    num_places,
    places,
    scale_name,
    scale_shape,
)
from dsv3_jax.interop.safetensors import (
    DTYPE_NAMES,
    MAX_TENSORS,
    StoredTensor,
    num_bytes,
    read_header,
)
from dsv3_jax.interop.stored import SCALE_DTYPES, split_experts
from dsv3_jax.quantization.block_scaled import PER_BLOCK, BlockScaled

log = logging.getLogger(__name__)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
GENERATION = "generation_config.json"
MAX_INDEX_BYTES = 32 << 20
FP8 = "F8_E4M3"
_SHOWN = 8  # problems listed before "and N more"


class Tensor(Protocol):
    """A published matrix, readable by rows."""

    @property
    def dtype(self) -> str:
        """As safetensors spells it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        ...

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows first to last - 1, as they are stored."""
        ...


@dataclass(frozen=True)
class ArrayTensor:
    """One published matrix inside an array of ours (NumPy or JAX)."""

    array: Any
    index: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return num_bytes(self.dtype, self.shape)

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """As `StoredTensor.read`."""
        return np.asarray(self.array[self.index]).reshape(self.shape)[first:last]


@dataclass(frozen=True)
class Checkpoint:
    """An architecture and its tensors by published name, FP8 scales among them."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    folder: Path | None = None  # where its other files, such as the tokenizer's, are
    scale_fmt: str | None = None  # "ue8m0" when all FP8 scales are powers of two, as in V3.1
    ends_with: EosTokenId | None = None  # of generation_config.json, where it says so
    # Of what it was trained from (interop/published_scales.py); what has none there was no FP8.
    published_scales: Mapping[str, Tensor] | None = None

    @property
    def config_to_generate(self) -> ModelConfig:
        """The config with the ids that end a text, which generation_config.json may say anew.

        As in transformers the ids of generation_config.json count instead of config.json's; unlike
        there, a generation_config.json without the key leaves config.json's.
        """
        if self.ends_with is None:
            return self.config
        return dataclasses.replace(self.config, eos_token_id=self.ends_with)

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        """The places of the weights that are there; an MTP module's copies may be left out."""
        return {n: p for n, p in places(self.config).items() if n in self.tensors}


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """The checkpoint in a folder: Hugging Face's form or the result of `import_hf`.

    Raises UserError, naming files and tensors, for anything that does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return open_imported(folder) if (folder / MANIFEST).exists() else open_hf(folder)


def is_weights_folder(folder: str | Path) -> bool:
    """Whether `open_checkpoint` is what opens this folder (a run directory is not one).

    It is for a folder that describes a model but has no weights to read, too: it says why.
    """
    folder = Path(folder)
    if any((folder / name).exists() for name in (MANIFEST, INDEX, SINGLE)):
        return True
    return folder.is_dir() and not (folder / "checkpoints").is_dir() and describes_a_model(folder)


def open_hf(folder: str | Path) -> Checkpoint:
    """The checkpoint in a Hugging Face folder: config.json, and one or many safetensors files."""
    folder = Path(folder)
    refuse_adapter(folder)
    values = read_config(folder)
    try:
        config = model_config_from_hf(values)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    tensors = _hf_tensors(folder)
    config, tensors = _checked(folder, config, tensors)
    scale_fmt, ends_with = scale_format_of_hf(values), _ends_with(folder, config)
    return Checkpoint(config, tensors, folder, scale_fmt, ends_with)


def open_imported(folder: str | Path, manifest: ImportManifest | None = None) -> Checkpoint:
    """The checkpoint that `import_hf` wrote: sizes checked here, contents by `verify_imported`.

    `manifest` is the folder's, where it has been read.
    """
    folder = Path(folder)
    manifest = manifest or read_manifest(folder)
    config = manifest.model
    if (count := num_places(config)) > MAX_TENSORS:
        raise UserError(f"{folder / MANIFEST}: describes {count} tensors, over {MAX_TENSORS}")
    stacked: dict[tuple[str, ...], dict[str, StoredTensor]] = {}
    lead = {}
    for path, leaf in leaves(config).items():
        stored, _ = read_header(file_inside(folder, leaf_file(path)))
        lead[path] = leaf.lead
        if problem := leaf_problem(leaf, stored):
            raise UserError(f"{folder / leaf_file(path)}: {problem}")
        stacked[path] = stored
    tensors: dict[str, StoredTensor] = {}
    for name, place in places(config).items():
        stored = stacked[place.path]
        if "values" not in stored:  # matrices of several dtypes, each on its own
            tensors |= {n: stored[n] for n in (name, scale_name(name)) if n in stored}
            continue
        position = position_in(lead[place.path], place.index)
        tensors[name] = stored["values"].at(position, place.shape)
        if "scales" in stored:
            scales = stored["scales"]
            tensors[scale_name(name)] = scales.at(position, scale_shape(place.shape))
    config, tensors = _checked(folder, config, tensors)
    ends_with = _ends_with(folder, config)
    return Checkpoint(config, tensors, folder, manifest.scale_fmt, ends_with)


def from_variables(
    variables: Mapping[str, Any],
    config: ModelConfig,
    folder: Path | None = None,
    scale_fmt: str | None = None,
) -> Checkpoint:
    """The checkpoint of variables in memory, for exporting; BlockScaled leaves stay FP8.

    `folder` may hold tokenizer files to carry along. Raises ValueError for a leaf that is missing,
    left over or of another shape than the config's.
    """
    arrays = dict(_flatten(variables))
    expected = leaves(config)
    if arrays.keys() != expected.keys():
        odd = sorted("/".join(path) for path in arrays.keys() ^ expected.keys())
        raise ValueError(f"variables and config differ in {', '.join(odd[:_SHOWN])}")
    tensors: dict[str, Tensor] = {}
    for name, place in places(config).items():
        leaf, array = expected[place.path], arrays[place.path]
        if math.prod(array.shape) != math.prod(leaf.lead + leaf.dims):
            path = "/".join(place.path)
            raise ValueError(
                f"{path} has shape {array.shape}, the config's is {leaf.lead + leaf.dims}"
            )
        if isinstance(array, BlockScaled):
            assert array.tile == PER_BLOCK, array.tile
            tensors[name] = ArrayTensor(array.values, place.index, FP8, place.shape)
            scales = scale_shape(place.shape)
            tensors[scale_name(name)] = ArrayTensor(array.scales, place.index, "F32", scales)
        else:
            dtype = DTYPE_NAMES[np.dtype(array.dtype)]
            tensors[name] = ArrayTensor(array, place.index, dtype, place.shape)
    return Checkpoint(config, tensors, folder, scale_fmt)


def refuse_copies_that_differ(checkpoint: Checkpoint) -> None:
    """Raises UserError where an MTP copy of the embedding or head differs from it; reads both.

    Our MTP modules share both with the main model, so such a checkpoint would lose numbers.
    """
    originals = {p.path: n for n, p in checkpoint.places.items() if not p.copy}
    for name, place in checkpoint.places.items():
        if place.copy and not same_numbers(checkpoint, name, originals[place.path]):
            raise UserError(
                f"{name} differs from the main model's; MTP modules share its numbers here"
            )


def same_numbers(checkpoint: Checkpoint, name: str, other: str, rows: int = 1024) -> bool:
    """Whether two tensors hold the same bytes, read a few rows at a time."""
    a, b = checkpoint.tensors[name], checkpoint.tensors[other]
    return a.dtype == b.dtype and all(
        a.read(i, min(i + rows, a.shape[0])).tobytes()
        == b.read(i, min(i + rows, a.shape[0])).tobytes()
        for i in range(0, a.shape[0], rows)
    )


def position_in(lead: tuple[int, ...], index: tuple[int, ...]) -> int:
    """The number of leaf[index] when the matrices of a leaf are counted through."""
    position = 0
    for i, size in zip(index, lead):
        position = position * size + i
    return position


def _ends_with(folder: Path, config: ModelConfig) -> EosTokenId | None:
    """What generation_config.json, where there is one, says that texts end with."""
    if not (folder / GENERATION).exists():
        return None
    values = read_config(folder, GENERATION)
    try:
        return eos_of_generation_config(values, config.vocab_size)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def _hf_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files, where the index says it is."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise no_weights(folder, INDEX, SINGLE)
        return read_header(file_inside(folder, SINGLE))[0]
    if (folder / SINGLE).exists():
        raise UserError(f"{folder}: has both {SINGLE} and {INDEX}: remove the one not meant")
    weight_map = read_json(file_inside(folder, INDEX), MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{folder / INDEX}: has no weight_map")
    for name, file in weight_map.items():
        if not _is_bare(file):
            raise UserError(
                f"{folder / INDEX}: puts {shown(name)} in {shown(file)}, which is no file name here"
            )
    tensors: dict[str, StoredTensor] = {}
    found: list[str] = []
    for file in sorted(set(weight_map.values())):
        for name, tensor in read_header(file_inside(folder, file))[0].items():
            listed = weight_map.get(name)
            if listed == file:
                tensors[name] = tensor
            else:
                where = (
                    "the index does not list" if listed is None else f"the index puts in {listed}"
                )
                found.append(f"{name} is in {file}, which {where}")
    found += [
        f"{shown(n)[1:-1]} is not in {f}, where the index puts it"
        for n, f in weight_map.items()
        if n not in tensors
    ]
    _raise_if(found, f"{folder / INDEX} does not describe the files")
    return tensors


def _is_bare(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and name.isprintable()
        and not set(name) & set("/\\")
    )


def _checked(
    folder: Path, config: ModelConfig, tensors: dict[str, StoredTensor]
) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """(config, tensors that belong to it), or UserError with all that is missing or odd.

    A checkpoint whose MTP modules were dropped gets a config without them.
    """
    if (count := num_places(config)) > MAX_TENSORS:
        raise UserError(f"{folder}: config.json describes {count} tensors, over {MAX_TENSORS}")
    tensors, found = split_experts(config, tensors)
    expected = places(config)
    of_mtp = [n for n, p in expected.items() if p.copy or p.path[1].startswith("mtp_")]
    if of_mtp and not any(name in tensors for name in of_mtp):
        log.warning("%s holds none of its %d MTP layers", folder, config.num_nextn_predict_layers)
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
        expected = places(config)
    found += [
        f"{name} is missing"
        for name, place in expected.items()
        if name not in tensors and not place.copy
    ]
    scales = {scale_name(name): name for name in expected}
    kept: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name in expected:
            found += _weight_problems(name, tensor, expected[name], tensors)
            kept[name] = tensor
        elif name in scales:
            found += _scale_problems(name, tensor, scales[name], tensors)
            kept[name] = tensor
        elif IGNORED.fullmatch(name):
            log.info("%s: %s is left out, the config determines it", folder, name)
        else:
            found.append(f"{name} is not part of this architecture")
    _raise_if(found, f"{folder} does not hold what its config.json describes")
    return config, kept


def _weight_problems(
    name: str, tensor: StoredTensor, place: Place, tensors: Mapping[str, StoredTensor]
) -> list[str]:
    if tensor.shape != place.shape:
        return [f"{name} has shape {list(tensor.shape)} instead of {list(place.shape)}"]
    allowed = ("BF16", "F32", FP8) if place.fp8 else ("BF16", "F32")
    if tensor.dtype not in allowed:
        return [f"{name} is {tensor.dtype}; it may be {', '.join(allowed)}"]
    if tensor.dtype == FP8 and scale_name(name) not in tensors:
        return [f"{name} is {FP8} but {scale_name(name)} is missing"]
    return []


def _scale_problems(
    name: str, tensor: StoredTensor, weight: str, tensors: Mapping[str, StoredTensor]
) -> list[str]:
    if weight not in tensors:
        return [f"{name} has no weight: {weight} is missing"]
    if tensors[weight].dtype != FP8:
        return [f"{name} scales {weight}, which is {tensors[weight].dtype}, not {FP8}"]
    shape = scale_shape(tensors[weight].shape)
    if tensor.shape != shape or tensor.dtype not in SCALE_DTYPES:
        allowed = f"{', '.join(SCALE_DTYPES)} {list(shape)}"
        return [f"{name} is {tensor.dtype} {list(tensor.shape)}; it may be {allowed}"]
    return []


def _raise_if(found: list[str], what: str) -> None:
    if found:
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise UserError(f"{what}:\n  - " + "\n  - ".join(found[:_SHOWN] + more))


def _flatten(
    tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], Any]]:
    """(path, leaf) of nested dicts; a BlockScaled is one leaf."""
    found = []
    for key, value in tree.items():
        found += (
            _flatten(value, (*path, key)) if isinstance(value, Mapping) else [((*path, key), value)]
        )
    return found
