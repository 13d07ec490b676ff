"""A model loaded for inference, wherever it lies: a run, an import, or a Hugging Face folder.

    model = load("runs/tiny")
    tokens = generate(model.variables, [[256, 105]], model.config.model, max_new_tokens=20)

It joins rooms that do not see each other: `training` reads a run's checkpoints, `interop` published
weights, and `inference` places redundant experts.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.config import (
    Config,
    DataConfig,
    ExpertParallelConfig,
    ModelConfig,
    ParallelConfig,
    RunError,
    ShardingConfig,
    UserError,
    config_from_dict,
)
from dsv3_jax.config.files import read_config
from dsv3_jax.data.tokenizer import TOKENIZER_FILE, load_tokenizer, tokenizer_file
from dsv3_jax.data.tokens import Tokenizer
from dsv3_jax.frozen import load_frozen, merged_variables, read_adapters
from dsv3_jax.inference.redundant_experts import measure_load, plan_places, replicate_experts
from dsv3_jax.interop.checkpoint import GENERATION, is_weights_folder, open_checkpoint
from dsv3_jax.interop.commands import Adapters, OpenedRun
from dsv3_jax.interop.companions import RunFacts
from dsv3_jax.interop.hf_keys import unread_generation_settings
from dsv3_jax.interop.load import LoadDType, abstract_leaves
from dsv3_jax.interop.load import load as load_checkpoint
from dsv3_jax.interop.published_scales import SCALES_FILE
from dsv3_jax.model.fp8_weights import to_fp8_weights
from dsv3_jax.model.placement import shardings
from dsv3_jax.model.transformer import Variables, abstract_variables
from dsv3_jax.parallel.load_balancer import logged_load
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import Layout, make_layout
from dsv3_jax.starting import open_base
from dsv3_jax.training.manifest import steps_in
from dsv3_jax.training.metrics import newest_numbers
from dsv3_jax.training.restore import read_meta, read_state
from dsv3_jax.training.saved import read_saved
from dsv3_jax.training.state import averaged_variables, variables_of

log = logging.getLogger(__name__)


class Model(NamedTuple):
    """What `load` returns: what `forward` and `generate` need, and `save` and `export` write.

    Fields:
        config: its whole run's; `config.model` is the architecture.
        layout: how the variables lie on the mesh.
        variables: {"params": ..., "router": ...}; docs/architecture.md has the tree with shapes.

    Source: this project (docs/checkpoints.md).
    """

    config: Config
    layout: Layout
    variables: Variables


def load(
    folder: str | Path,
    *,
    mesh: ParallelConfig | None = None,
    sharding: ShardingConfig | None = None,
    expert_parallel: ExpertParallelConfig | None = None,
    step: str = "auto",
    fp8: bool = False,
) -> Model:
    """The model in a run directory, an import, or a Hugging Face folder, on the devices of a mesh.

    Each device is given its own part only. A run's weights are f32, without the optimizer's state,
    of its newest valid checkpoint or of the `step` asked for; published ones become BF16. With fp8
    projections are held as FP8, a published FP8 checkpoint's as they are stored. Raises UserError
    for a folder that is none of these or is damaged, and for a mesh that does not fit the model.
    Source: this project (docs/checkpoints.md).

    >>> import dsv3_jax as ds
    >>> ds.load("nowhere")
    Traceback (most recent call last):
    dsv3_jax.config.rules.UserError: nowhere: no such folder
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    how = (mesh or ParallelConfig(), sharding or ShardingConfig(), expert_parallel)
    published = is_weights_folder(folder)
    if published and step != "auto":
        raise UserError(f"--step {step}: {folder} is no run")
    if not published and not (folder / "checkpoints").is_dir():
        why = ": give the folder of the run, above it" if steps_in(folder) else ""
        raise UserError(f"{folder} is neither a run nor published weights{why}")
    make = _published if published else _of_run
    model = make(folder, how, step, fp8)
    if not fp8:
        return model
    held = to_fp8_weights(model.variables, model.config.model)
    # Whole tiles on every device.
    return model._replace(variables=jax.device_put(held, shardings(held, model.layout)))


def _published(folder: Path, how: tuple, step: str, fp8: bool) -> Model:
    checkpoint = open_checkpoint(folder)
    tokenizer = DataConfig(tokenizer=str(folder))
    config = Config(model=checkpoint.config_to_generate, data=tokenizer)
    layout = layout_for(config.model, *how)
    dtype: LoadDType = "fp8" if fp8 else "bf16"
    places = shardings(abstract_leaves(checkpoint, dtype), layout)
    return Model(config, layout, load_checkpoint(checkpoint, dtype=dtype, shardings=places))


def _of_run(folder: Path, how: tuple, step: str, fp8: bool) -> Model:
    number, config = _step_and_config(folder, step)
    layout = layout_for(config.model, *how)
    if config.lora.rank:
        return _with_adapters(folder, number, config, layout, fp8)
    abstract = abstract_variables(config.model, layout)
    return Model(config, layout, _variables(folder / "checkpoints", number, abstract))


def _step_and_config(run_dir: Path, step: str) -> tuple[int, Config]:
    """The step that "auto" or a number means, and the config that its checkpoint was saved with."""
    found, meta = read_meta(run_dir / "checkpoints", step)
    return found, config_from_dict(meta.get("config"), run_dir / "checkpoints" / str(found))


def _with_adapters(folder: Path, step: int, config: Config, layout: Layout, fp8: bool) -> Model:
    if fp8:
        raise UserError(f"--fp8: {folder} is a LoRA run, whose base is held as lora.base says")
    base = load_frozen(config, open_base(folder, config), layout)
    adapters = read_adapters(folder, step, config, layout)
    return Model(config, layout, variables_of(adapters, {}, base, config))


def open_run(run_dir: Path, step: str) -> OpenedRun:
    """A run's checkpoint, its files hashed; its tokenizer's file and its numbers then."""
    folder = run_dir / "checkpoints"
    found, config = _step_and_config(run_dir, step)
    adapters, read_average = None, None
    if config.lora.rank:
        weights, tree = open_base(run_dir, config), read_adapters(run_dir, found, config)
        read = partial(merged_variables, weights, tree, config)
        adapters = Adapters(tree, str(weights.folder))
    else:
        read = partial(_variables, folder, found, abstract_variables(config.model))
    if config.optimizer.average_decay:
        read_average = average = partial(averaged_variables, folder, found, config)
        if adapters is not None:
            adapters = adapters._replace(read_average=lambda: average()["params"])
            read_average = lambda: merged_variables(weights, average()["params"], config)  # noqa: E731
    facts = RunFacts(found, config, newest_numbers(run_dir / "metrics.jsonl", found))
    scales = run_dir / SCALES_FILE
    return OpenedRun(
        *(config.model, read, tokenizer_file(run_dir), facts),
        *(scales if scales.exists() else None, adapters, read_average),
    )


def _variables(folder: Path, step: int, abstract: Any) -> Variables:
    """Those of a run's valid checkpoint, where the abstract ones lie."""
    return read_state(folder, step, abstract, partial=True)[0]


def layout_for(
    model: ModelConfig,
    mesh: ParallelConfig,
    sharding: ShardingConfig,
    expert_parallel: ExpertParallelConfig | None,
) -> Layout:
    """The layout of the mesh asked for; UserError when it does not fit the model."""
    mesh.check_model(model)
    # Where one device is asked for there is no word of the others.
    alone = mesh.num_devices == jax.process_count() == 1
    devices = make_mesh(mesh, jax.devices()[:1] if alone else None)
    return make_layout(devices, sharding, expert_parallel or ExpertParallelConfig())


def find_tokenizer(folder: Path, asked_for: str | None = None) -> Tokenizer:
    """The tokenizer asked for (a path, or "byte"), or that of a run or of published weights.

    Raises UserError, with the ways out, for a folder of weights without one that can be read: to
    take another in its place would feed the model other ids. A run without a file of its own was
    trained on bytes, as its config.json says. One that is asked for and is not the folder's own is
    told in a line on the log.
    """
    if asked_for is not None:
        tokenizer = load_tokenizer(asked_for)
        _tell_another(folder, asked_for, tokenizer)
        return tokenizer
    if (
        tokenizer_file(folder) is None
        and not is_weights_folder(folder)
        and _trained_on_bytes(folder)
    ):
        return load_tokenizer("byte")
    try:
        return load_tokenizer(folder)
    except UserError as error:
        if (folder / TOKENIZER_FILE).exists():
            raise
        if is_weights_folder(folder):
            open_checkpoint(folder)  # what is wrong with the weights comes first
        raise UserError(
            f"{folder} has no tokenizer.json: {error}\nConvert its tokenizer to that form, or give "
            "--tokenizer (the path of one, or 'byte'), or --token-ids 1,2,3"
        ) from error


def _tell_another(folder: Path, asked_for: str, tokenizer: Tokenizer) -> None:
    with contextlib.suppress(UserError, RunError, OSError):  # there may be none to compare with
        own = find_tokenizer(folder)
        if own.fingerprint != tokenizer.fingerprint:
            log.warning(
                "--tokenizer %s (%d ids, sha256 %s...) is not the model's own, %s (%d ids, sha256 "
                "%s...): the model may read and write other text than its own would",
                *(asked_for, tokenizer.vocab_size, tokenizer.fingerprint[:12]),
                *(own.path or own.name, own.vocab_size, own.fingerprint[:12]),
            )


def unread_settings(folder: Path) -> list[str]:
    """What a folder's generation_config.json asks for that generation here is told by options."""
    if not is_weights_folder(folder) or not (folder / GENERATION).is_file():
        return []
    return unread_generation_settings(read_config(folder, GENERATION))


def _trained_on_bytes(run_dir: Path) -> bool:
    """Whether a run's config.json, or else its newest checkpoint, names the byte tokenizer.

    True also where there is no checkpoint: that is what loading will say.
    """
    steps = steps_in(run_dir / "checkpoints")
    looks: list[Callable[[], Any]] = [
        lambda: read_config(run_dir),
        lambda: read_saved(run_dir / "checkpoints" / str(steps[-1]))["meta"]["config"],
    ]
    for look in looks:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError, RunError):
            return look()["data"]["tokenizer"] == "byte"
    return not steps


def with_redundant_experts(
    model: Model,
    number: int,
    load_LE: str | Path,
    prompts: Sequence[Sequence[int | np.integer]] = (),
) -> Model:
    """The model with `number` more places for busy experts in every MoE layer.

    Busy by a metrics.jsonl, or as counted on the "prompts". Raises UserError for a number that does
    not divide over the devices, and for a file that does not say.
    """
    config, layout = model.config.model, model.layout
    if load_LE == "prompts":
        load = measure_load(model.variables, prompts, config, layout)
    else:
        load = logged_load(load_LE)
    plan = plan_places(load, number, config, layout)
    return model._replace(variables=replicate_experts(model.variables, plan, config, layout))
