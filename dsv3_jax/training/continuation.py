"""Whether a run may go on from a checkpoint, and from where: decided before anything is touched.

What makes a run the run that it is must be the same: data, tokenizer, seed, architecture. Another
one is refused with the way out. Everything else may change, and is told line by line. The position
in the data goes on behind the rows that were read, whatever the batch; a learning rate that would
jump has to be asked for.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dsv3_jax.config import Config, UserError, by_name, config_from_dict
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.training.restore import (
    PyTree,
    architecture_differences,
    latest_valid,
    valid_step,
)
from dsv3_jax.training.saved import CheckpointError, read_saved
from dsv3_jax.training.saved_plan import check_rate, saved_place, schedule_from
from dsv3_jax.training.schedule import Schedule

log = logging.getLogger(__name__)

WAYS_OUT = (
    "Nothing was changed. Use the options that the run was made with (its config.json), another "
    "--run-dir (with --init-from RUN it begins with this run's weights), or --resume never, which "
    "keeps the older run beside the new one as *.old-N."
)
# Where and how long, not what: not worth a line.
_UNTOLD = (
    "run_dir",
    "resume",
    "devices",
    "dry_run",
    "tensorboard",
    "wandb",
    "distributed",
    "watchdog",
)


class Continuation(NamedTuple):
    """Where a run goes on."""

    step: int | None  # of the checkpoint; None: a new run
    schedule: Schedule
    losses: list[float]  # the ordinary ones before it, newest last


def identity(corpus: Corpus) -> dict[str, str]:
    """What a checkpoint holds of the data, besides the seed and architecture in its config."""
    return {
        "data_sha256": corpus.sha256("train"),
        "val_sha256": corpus.sha256("val"),
        "tokenizer_sha256": corpus.tokenizer.fingerprint,
    }


def checkpoint_meta(
    config: Config,
    corpus: Corpus,
    schedule: Schedule,
    step: int,
    losses: Iterable[float] = (),
) -> dict[str, Any]:
    """What is saved beside the state after `step` steps, as JSON; `losses`: its ordinary ones."""
    return {
        "config": dataclasses.asdict(config),
        **identity(corpus),
        "backend": jax.default_backend(),
        "position": schedule.position(step)._asdict(),
        "plan": schedule.begun._asdict(),
        "learning_rate": float(schedule.settings(step - 1).learning_rate) if step else None,
        "losses": list(losses),
    }


def find_continuation(
    run_dir: str | Path, config: Config, corpus: Corpus, abstract_state: PyTree
) -> Continuation:
    """Where `config` goes on in this folder.

    Changes nothing on disk. `config.resume` is "auto", "never" or a step's number. Raises
    UserError, with the ways out, for another run's folder and for a learning rate that would jump;
    and as `restore` does.
    """
    if config.resume == "never":
        return Continuation(None, Schedule(config), [])
    folder = Path(run_dir).absolute() / "checkpoints"
    if config.resume == "auto":
        step = latest_valid(folder)
    else:
        step = valid_step(folder, config.resume)
    if step is None:
        return Continuation(None, Schedule(config), [])
    saved = read_saved(folder / str(step))  # on every process: orbax waits for all
    path, meta = folder / str(step), saved["meta"]
    old = _saved_config(meta)
    refuse_another_run(path, saved, config, identity(corpus), abstract_state)
    if step <= config.train.steps:  # past them nothing goes on
        tell_differences(path, saved, config, identity(corpus), old)
    if old is None:
        log.warning("%s does not say its options: its plan is taken to be this run's", path)
    place = saved_place(path, step, meta, old or config)
    schedule = schedule_from(place, config, old or config)
    if schedule.tokens_per_row != place.tokens_per_row:
        log.warning(
            "rows now have %d tokens: the run goes on at row %d, after as many tokens as were "
            "read; some text of this epoch may be read again",
            *(schedule.tokens_per_row, schedule.first_row(step)),
        )
    if step < config.train.steps and old is not None:
        check_rate(path, place, config, old)
    losses = meta.get("losses")
    ordinary = isinstance(losses, list) and all(isinstance(loss, float) for loss in losses)
    return Continuation(step, schedule, losses if ordinary else [])


def refusal(path: Path, config: Config, abstract_state: PyTree) -> str | None:
    """Why `config` would not go on from a step's folder by what `abstract_state` names, or None."""
    try:
        saved = read_saved(path)
        meta, old = saved["meta"], _saved_config(saved["meta"])
        same = {name: meta.get(name) for name in ("data_sha256", "tokenizer_sha256")}  # not opened
        refuse_another_run(path, saved, config, same, abstract_state, partial=True)
        step = int(path.name)
        if step < config.train.steps and old is not None:
            check_rate(path, saved_place(path, step, meta, old), config, old)
    except (UserError, CheckpointError) as error:
        return str(error)
    return None


def refuse_another_run(
    path: Path,
    saved: dict[str, Any],
    config: Config,
    ours: dict[str, Any],
    abstract_state: PyTree,
    *,
    partial: bool = False,
) -> None:
    """Raises UserError, with every difference and the ways out, unless this is the same run's."""
    meta, different = saved["meta"], []
    theirs = by_name(meta.get("config") or {})
    asked = by_name(dataclasses.asdict(config))
    for what, key, option in (
        ("data", "data_sha256", "data.path"),
        ("tokenizer", "tokenizer_sha256", "data.tokenizer"),
    ):
        was = meta.get(key)
        if was is None:
            log.warning("%s does not say its %s: not compared", path, what)
        elif was != ours[key]:
            different.append(
                f"{what}: sha256 {str(was)[:12]}... ({option} {theirs.get(option, 'not known')}) "
                f"in the checkpoint, {ours[key][:12]}... ({option} {asked[option]}) in this run"
            )
    if "seed" not in theirs:
        log.warning("%s does not say its seed: not compared", path)
    elif theirs["seed"] != config.seed:
        different.append(f"seed: {theirs['seed']} in the checkpoint, {config.seed} in this run")
    different += architecture_differences(path, saved, abstract_state, config, partial)
    if different:
        raise UserError(f"{path} is of another run:\n  " + "\n  ".join(different) + f"\n{WAYS_OUT}")


def tell_differences(
    path: Path, saved: dict[str, Any], config: Config, ours: dict[str, str], old: Config | None
) -> None:
    """Logs, a line each, what is not as it was and may change the result, as old -> new."""
    meta = saved["meta"]
    lines, unknown = [], []
    theirs = by_name(meta.get("config") or {})
    for name, now in by_name(json.loads(json.dumps(dataclasses.asdict(config)))).items():
        if name.split(".")[0] in _UNTOLD or name in ("seed", "schedule.accept_rate_jump"):
            continue
        if name not in theirs:
            unknown.append(name)
        elif theirs[name] != now and not name.startswith("model."):  # architecture tells its own
            lines.append(f"{name}: {theirs[name]} -> {now}")
    if old is not None and old.micro_batch_size != config.micro_batch_size:
        lines.append(f"sequences a pass: {old.micro_batch_size} -> {config.micro_batch_size}")
    facts = {"jax": (saved.get("jax"), jax.__version__)}
    facts["backend"] = (meta.get("backend"), jax.default_backend())
    facts["validation text, sha256"] = (meta.get("val_sha256"), ours["val_sha256"])
    for name, (was, now) in facts.items():
        if was is None:
            unknown.append(name)
        elif was != now:
            lines.append(f"{name}: {was} -> {now}")
    if lines:
        log.warning("%s was made with other options than this run's, old -> new:", path)
    for line in lines:
        log.warning("  %s", line)
    if unknown:
        log.warning("%s, of an earlier version, does not say: %s", path, ", ".join(unknown))


def _saved_config(meta: dict[str, Any]) -> Config | None:
    """The options of the run that made the checkpoint, those of today's that it knew; or None."""
    saved = meta.get("config")
    if not isinstance(saved, dict):
        return None
    known = dataclasses.asdict(Config())
    try:
        values = {
            name: {k: v for k, v in value.items() if k in known[name]}
            if isinstance(known[name], dict)
            else value
            for name, value in saved.items()
            if name in known
        }
        return config_from_dict(values).validate()
    except (UserError, TypeError, ValueError, AttributeError):
        return None
