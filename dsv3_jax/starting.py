"""Where a run begins: its seed, or weights of a Hugging Face folder, an import or another run.

The model is then the folder's, and so is its tokenizer. Weights become f32 masters where the run
holds its state; each device reads its own part. What the run keeps of the folder lies in its own:
the tokenizer's files and chat template, FP8 scales as they were published, and origin.json.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.config import Config, ModelConfig, UserError
from dsv3_jax.config.files import read_config
from dsv3_jax.config.run import config_of_run
from dsv3_jax.data.chat import CHAT_TEMPLATE_FILE
from dsv3_jax.data.tokenizer import (
    BESIDE_TOKENIZER,
    KEPT_WITH_WEIGHTS,
    TOKENIZER_FILES,
    load_tokenizer,
    tokenizer_file,
)
from dsv3_jax.interop.checkpoint import (
    Checkpoint,
    is_weights_folder,
    open_checkpoint,
    refuse_copies_that_differ,
)
from dsv3_jax.interop.import_manifest import MANIFEST as IMPORT_MANIFEST
from dsv3_jax.interop.load import load as load_checkpoint
from dsv3_jax.interop.published_scales import SCALES_FILE, save_published_scales
from dsv3_jax.interop.stream import carried_files
from dsv3_jax.training.extensions import NONE, Extensions
from dsv3_jax.training.manifest import MANIFEST as STEP_MANIFEST
from dsv3_jax.training.restore import read_state, valid_step
from dsv3_jax.training.run_folder import write_whole
from dsv3_jax.training.state import (
    TrainState,
    create_state,
    fresh_variables,
    state_from,
)

log = logging.getLogger(__name__)

ORIGIN_FILE = "origin.json"
# A run may differ from the weights it begins with in these: how to compute, and how far.
MAY_DIFFER = (
    "dtype",
    "initializer_range",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "num_nextn_predict_layers",
)
_ENDS = 1 << 16  # bytes of each file's beginning and end that tell weights apart


@dataclass(frozen=True)
class Weights:
    """A folder of weights, opened but not read; of a run when there is no checkpoint."""

    folder: Path
    model: ModelConfig
    tokenizer: str | None  # what data.tokenizer would name; None: the folder has none
    checkpoint: Checkpoint | None

    @functools.cached_property
    def step(self) -> int:
        """Of a run: its newest step that matches its manifest, for which it is hashed once."""
        return valid_step(self.folder / "checkpoints", "auto")


def open_weights(folder: str | Path) -> Weights:
    """The weights in a Hugging Face folder, an import or a run directory.

    Reads headers only, and none of JAX's backend. UserError for a folder that is none of these, or
    of another architecture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--init-from {folder}: no such folder")
    own = None if tokenizer_file(folder) is None else str(folder)
    if is_weights_folder(folder):
        checkpoint = open_checkpoint(folder)
        return Weights(folder, checkpoint.config, own, checkpoint)
    if not ((folder / "config.json").is_file() and (folder / "checkpoints").is_dir()):
        raise UserError(f"--init-from {folder}: neither published weights nor a run lie there")
    config = config_of_run(folder)
    if own is None and config.data.tokenizer == "byte":
        own = "byte"
    return Weights(folder, config.model, own, None)


def with_model_of(config: Config, weights: Weights) -> Config:
    """The config with the model and the tokenizer of the weights that it is to begin with.

    Where the config names init_from itself, its model stays as it says.
    """
    model = config.model if config.init_from else weights.model
    data = dataclasses.replace(config.data, tokenizer=weights.tokenizer or config.data.tokenizer)
    return dataclasses.replace(config, model=model, data=data, init_from=str(weights.folder))


def check_model(config: Config, weights: Weights) -> None:
    """Raises UserError for each field of the model that contradicts the weights to begin with."""
    wrong = [
        f"model.{name}={ours} contradicts {config.init_from}, where it is {theirs}"
        for name, ours, theirs in _differences(config.model, weights.model)
        if name not in MAY_DIFFER
    ]
    if wrong:
        raise UserError("the model is that of --init-from:\n  - " + "\n  - ".join(wrong))


@dataclass(frozen=True)
class Origin:
    """Where a new run begins; without weights, at its seed."""

    config: Config
    weights: Weights | None
    sha256: str | None = None  # of the weights, where they are to be read

    def create_state(self, abstract: TrainState, extensions: Extensions = NONE) -> TrainState:
        """The state before the first step, each leaf where the abstract one lies.

        What the run needs of the weights' folder besides is put into its own.
        """
        if self.weights is None:
            return create_state(self.config, abstract, extensions)
        self._keep_files()
        for line in self._told():
            log.info("%s", line)
        if self.config.lora.rank:
            return create_state(self.config, abstract, extensions)
        wanted = {"params": abstract.params, "router": abstract.router}
        there = _parts(self.weights.model)
        kept = _pick(wanted, lambda name: name in there or not name.startswith("mtp_"))
        if (checkpoint := self.weights.checkpoint) is None:
            variables = read_run(self.weights, kept)
        else:
            places = jax.tree.map(lambda leaf: leaf.sharding, kept)
            wanted = with_depths_of(self.config.model, checkpoint)
            variables = load_checkpoint(wanted, dtype="f32", shardings=places)
        if missing := _parts(self.config.model) - there:
            made = fresh_variables(self.config, abstract, missing)
            variables = {kind: tree | made[kind] for kind, tree in variables.items()}
        trees = variables["params"], variables["router"]
        return state_from(*trees, self.config, abstract, extensions)

    def _keep_files(self) -> None:
        assert self.weights is not None
        origin = {"folder": str(self.weights.folder.resolve()), "sha256": self.sha256}
        if jax.process_index():
            return
        run_dir, skipped = Path(self.config.run_dir), set(TOKENIZER_FILES)
        if not self._has_tokenizer_of_weights:
            skipped |= {*BESIDE_TOKENIZER} - {CHAT_TEMPLATE_FILE}
        for path in carried_files(self.weights.folder):
            if path.name not in KEPT_WITH_WEIGHTS or path.name in skipped:
                continue
            if path.name != CHAT_TEMPLATE_FILE or not (run_dir / path.name).exists():
                write_whole(run_dir / path.name, path.read_bytes())
        scales = self.weights.folder / SCALES_FILE
        if self.weights.checkpoint is not None:
            save_published_scales(self.weights.checkpoint, run_dir / SCALES_FILE)
        elif scales.is_file():
            write_whole(run_dir / SCALES_FILE, scales.read_bytes())
        write_whole(run_dir / ORIGIN_FILE, (json.dumps(origin, indent=2) + "\n").encode())

    def _told(self) -> list[str]:
        """What the run begins with, and what of it is not as in the folder."""
        assert self.weights is not None
        folder, ours, theirs = self.weights.folder, self.config.model, self.weights.model
        lines = [f"begins with the weights of {folder}"]
        for name, here, there in _differences(ours, theirs):
            if name != "num_nextn_predict_layers":
                lines.append(f"model.{name}: {there} in {folder} -> {here}")
        wanted, has = ours.num_nextn_predict_layers, theirs.num_nextn_predict_layers
        if wanted > has:
            lines.append(f"MTP: {folder} has {has} modules of {wanted}: the others are made anew")
        if wanted < has:
            lines.append(f"MTP: {has - wanted} of the {has} modules in {folder} are left out")
        return lines + self._told_of_tokenizer()

    @functools.cached_property
    def _has_tokenizer_of_weights(self) -> bool:
        assert self.weights is not None
        own = self.weights.tokenizer
        if own is None or own == self.config.data.tokenizer:
            return own is not None
        used = tokenizer_file(self.config.run_dir) or "byte"  # as `RunFolder.claim` left it
        return load_tokenizer(own).fingerprint == load_tokenizer(used).fingerprint

    def _told_of_tokenizer(self) -> list[str]:
        assert self.weights is not None
        own, used = self.weights.tokenizer, self.config.data.tokenizer
        if own is None:
            return [f"{self.weights.folder} has no tokenizer: data.tokenizer={used} is taken"]
        if self._has_tokenizer_of_weights:
            return []
        return [f"data.tokenizer={used} is not the tokenizer of {self.weights.folder}"]


def open_origin(config: Config, weights: Weights | None, start: int | None) -> Origin:
    """Where the run begins; `start` is the step of its own checkpoint that it goes on from.

    `weights` are those of config.init_from, opened. UserError where the run goes on in a folder
    that was begun from other weights, and for MTP's copies that differ; CheckpointError where the
    weights are a run's and none of its checkpoints is good.
    """
    if weights is None:
        return Origin(config, None)
    if start is not None:
        _check_record(Path(config.run_dir), weights, moved=not config.lora.rank)
        if not config.lora.rank:
            return Origin(config, weights)
    if weights.checkpoint is not None:
        refuse_copies_that_differ(with_depths_of(config.model, weights.checkpoint))
    return Origin(config, weights, fingerprint(weights))


def open_base(run_dir: Path, config: Config) -> Weights:
    """The weights that a LoRA run's adapters belong to; UserError where others lie there now.

    A relative init_from counts from where the run was started.
    """
    assert config.init_from is not None
    folder = config.init_from
    if not Path(folder).is_dir() and (run_dir / ORIGIN_FILE).is_file():
        folder = str(read_config(run_dir, ORIGIN_FILE).get("folder", folder))
    weights = open_weights(folder)
    _check_record(run_dir, weights, moved=False)
    return weights


def fingerprint(weights: Weights) -> str:
    """A sha256 that tells weights apart: of the checksums that lie with them, or of their files'
    sizes, beginnings and ends."""
    digest, folder = hashlib.sha256(), weights.folder
    if weights.checkpoint is None:
        step = folder / "checkpoints" / str(weights.step)
        digest.update((step / STEP_MANIFEST).read_bytes())
        return digest.hexdigest()
    if (folder / IMPORT_MANIFEST).exists():
        return hashlib.sha256((folder / IMPORT_MANIFEST).read_bytes()).hexdigest()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(size - _ENDS, 0))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()


def _check_record(run_dir: Path, weights: Weights, moved: bool = True) -> None:
    """Raises UserError unless the run was begun with these weights: with `moved` the same folder
    is enough, whatever has become of it, as the run has its own weights by now."""
    record = run_dir / ORIGIN_FILE
    try:
        was = json.loads(record.read_bytes())
        same_place = moved and was["folder"] == str(weights.folder.resolve())
        if same_place or was["sha256"] == fingerprint(weights):
            return
        begun = f"with other weights, those of {was['folder']}"
    except (OSError, ValueError, KeyError, TypeError):
        begun = f"without --init-from (there is no {ORIGIN_FILE})"
    raise UserError(
        f"{run_dir} was begun {begun}: its checkpoint does not go on from {weights.folder}. "
        "Nothing was changed. Leave --init-from as it was, or use another --run-dir, or --resume "
        "never"
    )


def with_depths_of(model: ModelConfig, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with no more MTP modules than the model has."""
    depths = min(checkpoint.config.num_nextn_predict_layers, model.num_nextn_predict_layers)
    config = dataclasses.replace(checkpoint.config, num_nextn_predict_layers=depths)
    return dataclasses.replace(checkpoint, config=config)


def read_run(weights: Weights, wanted: Any) -> Any:
    """What is wanted, an abstract tree, of a run's checkpoint."""
    return read_state(weights.folder / "checkpoints", weights.step, wanted, partial=True)[0]


def _parts(model: ModelConfig) -> set[str]:
    """Names of the MTP modules."""
    return {f"mtp_{depth}" for depth in range(model.num_nextn_predict_layers)}


def _pick(variables: Any, keep: Any) -> Any:
    return {
        kind: {name: part for name, part in tree.items() if keep(name)}
        for kind, tree in variables.items()
    }


def _differences(ours: ModelConfig, theirs: ModelConfig) -> list[tuple[str, Any, Any]]:
    """(field, our value, theirs) of each field that differs."""
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in names]
    return [(name, here, there) for name, here, there in pairs if here != there]
