"""Where a checkpoint's run is in its plan, and whether another plan may go on from there.

A plan (`schedule.py`) is begun once and kept while its length and batches are; a learning rate that
would jump at the checkpoint has to be asked for.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.config import Config, UserError
from dsv3_jax.training.schedule import START, Position, Schedule

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a checkpoint's run is in its plan."""

    position: Position
    begun: Position  # where its plan begins
    tokens_per_row: int
    learning_rate: float  # of the last step


def saved_place(path: Path, step: int, meta: dict[str, Any], old: Config) -> Place:
    """What the checkpoint of `step` says, made with the options `old`.

    One of an earlier version does not hold its position: it is counted in steps of `old`, and told.
    """
    try:
        position, begun = (
            Position(*(int(meta[which][name]) for name in Position._fields))
            for which in ("position", "plan")
        )
        if not position.step == step >= begun.step or not _bounded(*position, *begun):
            raise UserError(f"{path}: its position {tuple(position)} is not one of step {step}")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        # Those versions took a batch-size ramp without micro-batches for no ramp.
        micro = old.train.micro_batch_size or old.train.batch_size
        train = dataclasses.replace(old.train, micro_batch_size=micro)
        schedule = Schedule(dataclasses.replace(old, train=train))
        position, begun = schedule.position(step), START
        log.warning(
            "%s, of an earlier version, does not hold its position in the data: its options make "
            "it row %d, after %s tokens",
            *(path, position.row, f"{position.tokens:,}"),
        )
    rate = meta.get("learning_rate")
    if not step:
        rate = 0.0  # nothing was learnt yet
    elif not isinstance(rate, int | float):
        plan = schedule_from(Place(position, begun, old.train.seq_len, 0.0), old, old)
        rate = plan.settings(max(step - 1, plan.begun.step)).learning_rate
    return Place(position, begun, old.train.seq_len, float(rate))


def _bounded(*counts: int) -> bool:
    return all(0 <= count < 2**62 for count in counts)


def schedule_from(place: Place, config: Config, old: Config) -> Schedule:
    """The schedule of `config` for a run that is at `place`.

    It is the plan begun earlier where that leads here with the same length and batches; otherwise
    a new one begins here.
    """
    position = place.position
    if _rows_of_plan(old) == _rows_of_plan(config):
        schedule = Schedule(config, place.begun)
        if schedule.position(position.step) == position:
            return schedule
    row = -(-position.row * place.tokens_per_row // config.train.seq_len)
    return Schedule(config, position._replace(row=row))


def _rows_of_plan(config: Config) -> tuple[Any, ...]:
    """What decides which rows each step reads."""
    train, plan = config.train, config.schedule
    ramp = (plan.batch_start_ratio, plan.batch_ramp_end)
    length = plan.steps or train.steps
    return length, train.batch_size, config.micro_batch_size, train.seq_len, *ramp


def check_rate(path: Path, place: Place, config: Config, old: Config) -> None:
    """Raises UserError for a learning rate that jumps from the last step's, unless that is asked.

    A jump is a change larger than those that the checkpoint's own plan makes there: to its last
    step, and to the one that would come next.
    """
    step, last = place.position.step, place.learning_rate
    if not step:
        return
    before = schedule_from(place, old, old)

    def rate(plan: Schedule, at: int) -> float:
        return float(plan.settings(at).learning_rate)

    planned = rate(before, step)
    own = abs(planned - last)
    if step - 2 >= before.begun.step:
        own = max(own, abs(last - rate(before, step - 2)))
    own *= 1 + 1e-6
    now = rate(schedule_from(place, config, old), step)
    if now == planned or abs(now - last) <= own:
        return
    what = f"from {last:.3g} (step {step}) to {now:.3g} (step {step + 1})"
    if config.schedule.accept_rate_jump:
        log.warning("the learning rate jumps %s, as asked", what)
        return
    length = old.schedule.steps or old.train.steps
    kept = dataclasses.replace(config.schedule, steps=length)
    keeping = schedule_from(place, dataclasses.replace(config, schedule=kept), old)
    ways = []
    if abs(rate(keeping, step) - last) <= own:
        end = "; past its end the last rate stays" if length < config.train.steps else ""
        ways.append(f"  --schedule.steps {length}: the length that the run was planned for{end}")
    ways.append("  --schedule.accept-rate-jump: the new plan's rate")
    raise UserError(
        f"going on from {path}, the learning rate would jump {what}; the checkpoint's own plan "
        f"changes it by at most {own:.3g} there. Nothing was changed. Say which it should be:\n"
        + "\n".join(ways)
    )
