"""Where else a run's numbers go: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from dsv3_jax.config import Config


class Sink(Protocol):
    """Something that keeps the numbers of a line of metrics.jsonl."""

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Keeps these numbers of `step`."""

    def close(self) -> None:
        """Writes what has not been written."""


def open_sinks(config: Config, resumed_from: int | None) -> list[Sink]:
    """The sinks that a run asks for.

    resumed_from: the step restored, whose later numbers are written anew; None for a new run.
    Raises ImportError, naming the extra, where a library is missing.
    """
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(TensorBoard(Path(config.run_dir) / "tensorboard", resumed_from))
    if config.wandb != "off":
        sinks.append(WeightsAndBiases(config, resumed_from))
    return sinks


class TensorBoard:
    """A folder of events, where a resumed run hides what it is about to write anew."""

    def __init__(self, folder: Path, resumed_from: int | None):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard output needs: pip install 'dsv3_jax[tensorboard]'"
            ) from error
        purge = None if resumed_from is None else resumed_from + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """A scalar each."""
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run named as the run folder; a resumed run goes on in it.

    Offline it lies in RUN/wandb, for `wandb sync`. W&B takes no step twice: of steps that a resumed
    run makes again it keeps the first numbers.
    """

    def __init__(self, config: Config, resumed_from: int | None):
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ImportError("--wandb needs: pip install 'dsv3_jax[wandb]'") from error
        folder = Path(config.run_dir)
        identity = folder / "wandb" / "run_id.txt"
        known = identity.read_text() if resumed_from is not None and identity.exists() else None
        identity.parent.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project="dsv3_jax",
            name=folder.resolve().name,
            dir=str(folder),
            config=dataclasses.asdict(config),
            mode=config.wandb,
            id=known,
            resume="allow" if known else None,
        )
        identity.write_text(self._run.id)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """One row of the run's history."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Ends the W&B run."""
        self._run.finish()
