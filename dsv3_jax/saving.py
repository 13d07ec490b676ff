"""A model written down: as a run directory that `load` and infer.py read, or for other runtimes."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from dsv3_jax.config import UserError, to_json
from dsv3_jax.data.tiktoken_model import CODE_FILES
from dsv3_jax.data.tokenizer import (
    BESIDE_TOKENIZER,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    tokenizer_file,
)
from dsv3_jax.interop.checkpoint import from_variables
from dsv3_jax.interop.commands import open_source
from dsv3_jax.interop.exporting import export_hf
from dsv3_jax.interop.stream import StorageDType
from dsv3_jax.loading import Model, open_run
from dsv3_jax.model.transformer import abstract_variables
from dsv3_jax.training.checkpoint import Checkpoints


def save(
    model: Model, folder: str | Path, *, step: int = 0, tokenizer: str | Path | None = None
) -> Path:
    """Writes a model's weights as the checkpoint of a step of a run directory; returns the folder.

    `load(folder)` gives the same numbers back, in f32: BF16 weights are widened, which is exact. On
    a mesh each process writes its part. The tokenizer is the file of one to keep beside them, or
    that of the published folder the model came from, each with what lies beside it; train.py does
    not go on from here, as there is no optimizer's state. Raises UserError for weights that are
    held as FP8, in replicas, or of other shapes than the config's, for a tokenizer that is not
    there, and for a folder of another model; CheckpointError for a step that is there, or a disk
    that is full. Source: this project (docs/checkpoints.md).

    >>> import tempfile
    >>> import jax, dsv3_jax as ds
    >>> config = ds.load_config("tiny")
    >>> model = ds.Model(config, ds.ONE_DEVICE, ds.init(jax.random.key(0), config.model))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ds.load(ds.save(model, folder)).config == config
    True
    """
    folder, config = Path(folder), model.config
    expected = abstract_variables(config.model)
    shapes, wanted = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (model.variables, expected))
    )
    if wrong := sorted(dict(shapes.items() ^ wanted.items())):
        raise UserError(
            f"these variables are not what the config describes ({wrong[0]}; {len(wrong)} such "
            "names): FP8 and redundant experts are made from saved weights when they are loaded"
        )
    text, file = to_json(config), folder / "config.json"
    if file.exists() and file.read_text() != text:
        raise UserError(f"{folder} holds a run with another config.json: choose another folder")
    kept = _tokenizer_files(
        tokenizer_file(config.data.tokenizer) if tokenizer is None else tokenizer
    )
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.variables)
    with Checkpoints(folder / "checkpoints", every_steps=1, keep=1 << 30) as checkpoints:
        checkpoints.save(step, state, {"config": dataclasses.asdict(config)})
    if jax.process_index() == 0:
        file.write_text(text)
        for name, path in kept.items():
            shutil.copyfile(path, folder / name)
    return folder


def _tokenizer_files(tokenizer: str | Path | None) -> dict[str, Path]:
    """The files of a tokenizer, by their names in a run: what lies beside it says what a prompt
    begins with."""
    if tokenizer is None:
        return {}
    if not (path := Path(tokenizer)).is_file():
        raise UserError(f"tokenizer {str(tokenizer)!r}: no such file")
    beside = (path.with_name(name) for name in (*BESIDE_TOKENIZER, *CODE_FILES))
    name = path.name if path.name in TOKENIZER_FILES else TOKENIZER_FILE
    return {name: path} | {file.name: file for file in beside if file.is_file()}


def export(
    source: Model | str | Path,
    folder: str | Path,
    dtype: StorageDType = "stored",
    *,
    step: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Writes a Hugging Face folder for transformers, vLLM, SGLang and llama.cpp; returns its path.

    The source is a Model in memory, a run directory (of a step, by default the newest valid one),
    an import or another Hugging Face folder. dtype: "stored" (f32 for a run), "bf16", "f32", or
    "fp8", which quantises what V3 published in FP8 in blocks of 128x128. Raises UserError for a
    source that is none of these and a folder that exists, OSError for a disk that is full, and then
    leaves nothing behind. As `python -m dsv3_jax export-hf`. Source: names are those of
    deepseek-ai/DeepSeek-V3.

    >>> import tempfile
    >>> import jax, dsv3_jax as ds
    >>> config = ds.load_config("tiny")
    >>> variables = jax.jit(ds.init, static_argnums=1)(jax.random.key(0), config.model)
    >>> model = ds.Model(config, ds.ONE_DEVICE, variables)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(p.name for p in ds.export(model, folder + "/hf", "bf16").iterdir())[:2]
    ['README.md', 'config.json']
    """
    tokenizer = facts = None
    if isinstance(source, Model):
        came_from = Path(source.config.data.tokenizer)  # its tokenizer files go along
        published = came_from if came_from.is_dir() else None
        checkpoint = from_variables(source.variables, source.config.model, published)
    else:
        checkpoint, run = open_source(Path(source), step, open_run)
        if run is not None:
            tokenizer, facts = run.tokenizer, run.facts
    return export_hf(
        checkpoint, folder, dtype, overwrite=overwrite, tokenizer=tokenizer, facts=facts
    )
