"""When each action of a pipeline schedule runs: a schedule's lists played through, without devices.

The paper's bubbles and peaks of activations come out of this; the lists are those of schedules.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_jax.parallel.schedules import Action, Op, PipelineSchedule


@dataclass(frozen=True)
class Durations:
    """Seconds (or any unit) of one action; W is part of B: B = input + weight backward."""

    forward: float = 1.0
    input_backward: float = 1.0
    weight_backward: float = 1.0
    overlapped: float | None = None  # an FB pair; None: forward + backward, nothing gained
    transfer: float = 0.0  # from one rank to the next, not hidden

    @property
    def backward(self) -> float:
        """A whole backward: input and weights."""
        return self.input_backward + self.weight_backward

    def of(self, op: Op) -> float:
        """How long one action of kind `op` takes."""
        pair = self.forward + self.backward if self.overlapped is None else self.overlapped
        return {
            "F": self.forward,
            "I": self.input_backward,
            "W": self.weight_backward,
            "B": self.backward,
            "FB": pair,
        }[op]


@dataclass(frozen=True)
class Timeline:
    """When each action ran: `spans[rank]` is a list of (action, start, end)."""

    makespan: float
    spans: tuple[tuple[tuple[Action, float, float], ...], ...]

    @property
    def bubbles(self) -> tuple[float, ...]:
        """Idle time of each rank, from 0 to the end of the last action anywhere."""
        busy = (sum(end - start for _, start, end in row) for row in self.spans)
        return tuple(self.makespan - b for b in busy)

    @property
    def peak_activations(self) -> tuple[int, ...]:
        """The most (stage, micro-batch) activations each rank holds at once.

        One is held from the start of its forward to the end of its weight gradient.
        """
        return tuple(_peak(row) for row in self.spans)


def simulate(schedule: PipelineSchedule, durations: Durations = Durations()) -> Timeline:
    """When every action runs if each starts as soon as its rank and its inputs are free.

    Each rank keeps its own order. Raises ValueError on a schedule whose actions wait for each other
    (a deadlock) or never get their inputs. Source: as for `make_schedule`. Times are in the unit of
    `durations`.

    >>> import dsv3_jax as ds
    >>> ds.simulate(ds.make_schedule("1f1b", 4, 8)).makespan
    33.0
    """
    last = schedule.num_stages - 1
    done: dict[tuple[str, int, int], float] = {}  # ("F" | "I", stage, microbatch) -> end

    def ready(action: Action) -> float | None:
        latest = 0.0
        for part in action.parts:
            stage, m = part.stage, part.microbatch
            if part.op == "F":
                needs = [("F", stage - 1, m)] if stage > 0 else []
            elif part.op == "I":
                needs = [("F", stage, m)] + ([("I", stage + 1, m)] if stage < last else [])
            else:  # W of the same action follows its I, which needs no waiting
                needs = [("I", stage, m)] if action.op == "W" else []
            for need in needs:
                if need not in done:
                    return None
                away = schedule.rank_of(need[1], m) != schedule.rank_of(stage, m)
                latest = max(latest, done[need] + (durations.transfer if away else 0.0))
        return latest

    clock = [0.0] * schedule.num_ranks
    position = [0] * schedule.num_ranks
    spans: list[list[tuple[Action, float, float]]] = [[] for _ in range(schedule.num_ranks)]
    progress = True
    while progress:
        progress = False
        for rank, row in enumerate(schedule.actions):
            while position[rank] < len(row):
                action = row[position[rank]]
                start = ready(action)
                if start is None:
                    break
                start = max(start, clock[rank])
                clock[rank] = start + durations.of(action.op)
                spans[rank].append((action, start, clock[rank]))
                for part in action.parts:
                    done[part.op, part.stage, part.microbatch] = clock[rank]
                position[rank] += 1
                progress = True
    stuck = [r for r, row in enumerate(schedule.actions) if position[r] < len(row)]
    if stuck:
        first = schedule.actions[stuck[0]][position[stuck[0]]]
        raise ValueError(f"schedule {schedule.name!r} deadlocks: rank {stuck[0]} waits at {first}")
    return Timeline(max(clock), tuple(tuple(row) for row in spans))


def _peak(row: tuple[tuple[Action, float, float], ...]) -> int:
    events = []
    for action, start, end in row:
        if action.op in ("F", "FB"):
            events.append((start, 1))
        if action.op in ("B", "W", "FB"):
            events.append((end, -1))
    held = most = 0
    for _, change in sorted(events):  # at equal times, release before taking
        held += change
        most = max(most, held)
    return most
