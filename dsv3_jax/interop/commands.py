"""What `python -m dsv3_jax import-hf`, `export-hf` and `logits` do; cli parses their options.

A run's own checkpoints belong to the trainer's room, so whoever calls passes `open_run`, which
takes a run directory and a step and returns an OpenedRun.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dsv3_jax.config import ModelConfig, UserError
from dsv3_jax.config.files import check_folder_of

# The rest is imported where it is used, so that parsing these options does not wait for JAX.
if TYPE_CHECKING:
    from dsv3_jax.interop.checkpoint import Checkpoint
    from dsv3_jax.interop.companions import RunFacts


class OpenedRun(NamedTuple):
    """A run's verified checkpoint, its tokenizer's file where it has one, its numbers, and the FP8
    scales of the weights that it began with.

    `read` returns its variables in f32, those of a LoRA run with the adapters added to their base;
    `read_average` the same with the moving average of its weights, None where it has none.
    """

    config: ModelConfig
    read: Callable[[], dict[str, Any]]
    tokenizer: Path | None
    facts: RunFacts | None = None
    published_scales: Path | None = None
    adapters: Adapters | None = None
    read_average: Callable[[], dict[str, Any]] | None = None


class Adapters(NamedTuple):
    """Those of a LoRA run; `base` is where the weights lie that they belong to, `read_average`
    returns their moving average, None where there is none."""

    tree: dict[str, Any]
    base: str
    read_average: Callable[[], dict[str, Any]] | None = None


OpenRun = Callable[[Path, str], OpenedRun]


@dataclass(frozen=True)
class ImportOptions:
    """Import a Hugging Face checkpoint folder."""

    src: Path  # config.json and safetensors files
    dst: Path  # the folder to write
    dtype: Literal["stored", "bf16", "f32"] = "stored"  # stored: every byte kept, FP8 included
    overwrite: bool = False
    allow_non_finite: bool = False  # NaN and infinite weights are named, but imported


@dataclass(frozen=True)
class ExportOptions:
    """Write a Hugging Face checkpoint folder for transformers, vLLM, SGLang and llama.cpp."""

    src: Path  # a run directory, an import, or another Hugging Face folder
    dst: Path  # the folder to write
    dtype: Literal["stored", "bf16", "f32", "fp8"] = "stored"  # stored: as it is, f32 for a run
    step: str = "auto"  # of a run: the newest valid one, or its number
    overwrite: bool = False
    adapter: bool = False  # of a LoRA run: its adapters alone, in the form of peft
    merge: bool = False  # of a LoRA run: the weights with its adapters added to them
    ema: bool = False  # of a run with optimizer.average_decay: the moving average of its weights


@dataclass(frozen=True)
class LogitsOptions:
    """Write logits, MTP logits, hidden states and expert choices for given token ids."""

    checkpoint: Path  # a run directory, an import, or a Hugging Face folder
    tokens: Path  # a .npy file of token ids, [T] or [B, T]
    out: Path  # the .npz file to write
    dtype: Literal["bf16", "f32"] = "f32"  # of weights and arithmetic
    step: str = "auto"  # of a run: the newest valid one, or its number


def run_import(options: ImportOptions) -> None:
    """python -m dsv3_jax import-hf SRC DST"""
    from dsv3_jax.interop.folder import check_apart
    from dsv3_jax.interop.importing import import_hf

    start = time.monotonic()
    check_apart(options.src, options.dst)
    if (options.src / "checkpoints").is_dir():
        raise UserError(f"{options.src} is a run: export-hf writes it in the published form")
    import_hf(
        options.src,
        options.dst,
        options.dtype,
        overwrite=options.overwrite,
        allow_non_finite=options.allow_non_finite,
    )
    _say("imported", options.dst, start)


def run_export(options: ExportOptions, open_run: OpenRun) -> None:
    """python -m dsv3_jax export-hf SRC DST"""
    from dsv3_jax.interop.exporting import export_hf
    from dsv3_jax.interop.folder import check_apart

    start = time.monotonic()
    check_apart(options.src, options.dst)
    if options.adapter:
        for name, default in {"merge": False, "dtype": "stored"}.items():
            if getattr(options, name) != default:
                raise UserError(f"--adapter writes adapters alone, in f32: leave out --{name}")
        _export_adapter(options, open_run)
        _say("exported", options.dst, start)
        return
    source, run = open_source(
        options.src, options.step, open_run, merge=options.merge, ema=options.ema
    )
    export_hf(
        source,
        options.dst,
        options.dtype,
        overwrite=options.overwrite,
        tokenizer=run and run.tokenizer,
        facts=run and run.facts,
    )
    _say("exported", options.dst, start)
    if run and run.tokenizer is None:
        print(
            "no tokenizer to export: the run was trained on bytes (ids 0 to 255, bos "
            f"{source.config.bos_token_id}); infer.py reads the export with --tokenizer byte"
            if run.facts is None or run.facts.config.data.tokenizer == "byte"
            else f"no tokenizer exported: {options.src} has no tokenizer.json (it was trained with "
            f"{run.facts.config.data.tokenizer})"
        )


def _export_adapter(options: ExportOptions, open_run: OpenRun) -> None:
    from dsv3_jax.interop.checkpoint import is_weights_folder
    from dsv3_jax.interop.peft_adapter import export_adapter

    run = None if is_weights_folder(options.src) else open_run(options.src, options.step)
    if run is None or run.adapters is None or run.facts is None:
        raise UserError(f"--adapter: {options.src} is no LoRA run")
    tree = run.adapters.tree
    if options.ema:
        tree = _average(run.adapters.read_average, options.src)()
    export_adapter(
        tree,
        run.config,
        run.facts.config.lora,
        run.adapters.base,
        options.dst,
        overwrite=options.overwrite,
        files_from=options.src,
    )


def run_logits(options: LogitsOptions, open_run: OpenRun) -> None:
    """python -m dsv3_jax logits --checkpoint DIR --tokens FILE --out FILE"""
    import jax.numpy as jnp
    import numpy as np

    from dsv3_jax.interop.load import load
    from dsv3_jax.interop.trace import read_tokens, trace

    source, _ = open_source(options.checkpoint, options.step, open_run)
    dtype = {"bf16": "bfloat16", "f32": "float32"}[options.dtype]
    config = dataclasses.replace(source.config, dtype=dtype)
    tokens = read_tokens(options.tokens, config)
    check_folder_of(options.out, "--out")
    found = trace(load(source, dtype=options.dtype), jnp.asarray(tokens), config)
    with open(options.out, "wb") as file:
        np.savez(file, allow_pickle=False, tokens=tokens, **found)
    for name, array in found.items():
        print(f"{name:16} {array.dtype} {list(array.shape)}")
    print(f"wrote {options.out}")


def _average(read: Callable[[], Any] | None, folder: Path) -> Callable[[], Any]:
    """What reads a run's moving average; UserError where it has none."""
    if read is None:
        raise UserError(f"--ema: {folder} was trained without optimizer.average_decay")
    return read


def open_source(
    folder: Path, step: str, open_run: OpenRun, *, merge: bool | None = None, ema: bool = False
) -> tuple[Checkpoint, OpenedRun | None]:
    """The checkpoint of a run, an import or a Hugging Face folder; and the run, if it is one.

    With `ema` the weights are a run's moving average. `merge` says whether a LoRA run's adapters
    may be added to their base; None: where there are any. UserError when there is no such folder,
    step or average, and for what is to be merged and cannot, or cannot be left out.
    """
    from dsv3_jax.interop.checkpoint import from_variables, is_weights_folder, open_checkpoint
    from dsv3_jax.interop.published_scales import with_published_scales

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if is_weights_folder(folder):
        asked = {"ema": ema, "merge": merge, f"step {step}": step != "auto"}
        if options := [f"--{name}" for name, given in asked.items() if given]:
            raise UserError(f"{' '.join(options)}: {folder} is no run")
        return open_checkpoint(folder), None
    run = open_run(folder, step)
    read = _average(run.read_average, folder) if ema else run.read
    if run.adapters is None and merge:
        raise UserError(f"--merge: {folder} is no LoRA run")
    if run.adapters is not None and merge is False:
        raise UserError(
            f"{folder} is a LoRA run: --adapter exports its adapters, --merge the weights with "
            "them added"
        )
    checkpoint = from_variables(read(), run.config)
    if run.published_scales is not None:
        checkpoint = with_published_scales(checkpoint, run.published_scales)
    return checkpoint, run


def _say(what: str, folder: Path, start: float) -> None:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    seconds = time.monotonic() - start
    print(f"{what} {size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s)")
    print(f"wrote {folder}")
