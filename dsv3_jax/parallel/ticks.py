"""A pipeline schedule as tables of ticks: what the one SPMD program does, rank by rank.

In one program all ranks meet at every hand-over, so time is cut into ticks of one F, I or W each,
or of one F or one whole backward pass (B: I, then W).
The tables say, for every tick and rank, what to do and which slot of which buffer it reads and
writes. A slot is taken when something comes to life and is free when its last reader is done, so
that there are as many as the schedule holds at its peak, however many micro-batches it runs. Knows
no JAX.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Int32

from dsv3_jax.parallel.schedules import Action, PipelineSchedule

IDLE, FORWARD, INPUT_BACKWARD, WEIGHT_BACKWARD, BACKWARD = range(5)
_OPS = {"F": FORWARD, "I": INPUT_BACKWARD, "W": WEIGHT_BACKWARD, "B": BACKWARD}


@dataclass(frozen=True)
class TickTables:
    """Tables of [ticks, ranks] int32 and the sizes of the buffers they point into.

    Fields:
        op: IDLE, FORWARD, INPUT_BACKWARD, WEIGHT_BACKWARD, or BACKWARD for the last two in turn.
        chunk: which of the stages that the rank holds.
        microbatch: whose turn it is.
        saved: slot of what the forward keeps for both backward passes.
        pending: slot of what the gradient of the input leaves for that of the weights.
        received: slot of the mail that is read: a forward's input, or the gradient of its output
            (of the last stage, its own output, from which the loss is taken). A stage without a
            sender reads the slot that nobody writes.
        from_above, from_below, from_self: slot that what comes from rank - 1, from rank + 1 and
            from the rank itself is put into after the tick; the last slot, if nothing comes.
        num_saved, num_pending, num_mail: slots of the three buffers; mail has one more, for what
            nobody reads.
    """

    op: Int32[np.ndarray, "ticks ranks"]
    chunk: Int32[np.ndarray, "ticks ranks"]
    microbatch: Int32[np.ndarray, "ticks ranks"]
    saved: Int32[np.ndarray, "ticks ranks"]
    pending: Int32[np.ndarray, "ticks ranks"]
    received: Int32[np.ndarray, "ticks ranks"]
    from_above: Int32[np.ndarray, "ticks ranks"]
    from_below: Int32[np.ndarray, "ticks ranks"]
    from_self: Int32[np.ndarray, "ticks ranks"]
    num_saved: int
    num_pending: int
    num_mail: int

    @property
    def idle(self) -> tuple[int, ...]:
        """Ticks in which each rank does nothing."""
        return tuple((self.op == IDLE).sum(0).tolist())

    def columns(self) -> dict[str, Int32[np.ndarray, "ticks ranks"]]:
        """The tables by name."""
        return {
            f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), np.ndarray)
        }


def chunk_of(schedule: PipelineSchedule, stage: int) -> int:
    """Which of its rank's stages this is, counted in the order of the model."""
    return stage // schedule.num_ranks


def stages_of_rank(schedule: PipelineSchedule, rank: int) -> list[int]:
    """The stages that a rank holds, by chunk."""
    return [s for s in range(schedule.num_stages) if schedule.rank_of(s, 0) == rank]


def unit_ticks(schedule: PipelineSchedule, whole: bool = False) -> list[list[Action | None]]:
    """What each rank does in each tick: its next action, once all that it needs has been made.

    whole: the schedule's B are one tick each, rather than one for I and one for W. Of a schedule
    that is `in_turn` ticks are of one kind each, and take turns. ValueError for one whose ranks
    wait for each other.
    """
    schedule = schedule.in_units(whole)
    kinds = ("FIWB",) if not schedule.in_turn else ("F", "B") if whole else ("F", "I", "W")
    turn = 0
    done: set[tuple[str, int, int]] = set()
    position = [0] * schedule.num_ranks
    ticks: list[list[Action | None]] = []
    while any(p < len(row) for p, row in zip(position, schedule.actions)):
        ready: list[Action | None] = []
        for rank, actions in enumerate(schedule.actions):
            action = actions[position[rank]] if position[rank] < len(actions) else None
            is_ready = action is not None and all(need in done for need in _needs(schedule, action))
            ready.append(action if is_ready else None)
        row = ready
        for later in range(len(kinds)):  # a turn that nobody can take is passed
            of_turn = kinds[(turn + later) % len(kinds)]
            row = [a if a is not None and a.op in of_turn else None for a in ready]
            if any(row):
                turn += later + 1
                break
        if not any(row):
            waiting = [a[p] for a, p in zip(schedule.actions, position) if p < len(a)]
            raise ValueError(f"schedule {schedule.name!r} deadlocks at {waiting[0]}")
        for rank, action in enumerate(row):
            if action is not None:
                done |= set(_made(action))
                position[rank] += 1
        ticks.append(row)
    return ticks


def made_for_ticks(schedule: PipelineSchedule) -> PipelineSchedule:
    """The schedule itself; ValueError for one that the executor cannot run."""
    if schedule.placement == "bidirectional":
        raise ValueError(
            f"{schedule.name} holds every stage on two ranks, which the executor cannot do: use "
            "dualpipev, which has its bubbles with one copy of the weights"
        )
    return schedule


def forward_tables(schedule: PipelineSchedule, num_microbatches: int) -> TickTables:
    """The tables of the first micro-batches' forwards alone, one after the other in each rank."""
    rows = tuple(
        tuple(
            sorted(
                (a for a in row if a.op == "F" and a.microbatch < num_microbatches),
                key=lambda a: (a.microbatch, a.stage),
            )
        )
        for row in made_for_ticks(schedule).in_units().actions
    )
    return tick_tables(replace(schedule, num_microbatches=num_microbatches, actions=rows))


def tick_tables(schedule: PipelineSchedule, whole: bool = False) -> TickTables:
    """The tables of a schedule whose ranks hold each stage once (not "bidirectional").

    whole: as `unit_ticks` has it.
    """
    ticks = unit_ticks(made_for_ticks(schedule), whole)
    shape = (len(ticks), schedule.num_ranks)
    names = ("op", "chunk", "microbatch", "saved", "pending", "received")
    tables = {name: np.zeros(shape, np.int32) for name in names}
    for t, row in enumerate(ticks):
        for rank, action in enumerate(row):
            if action is not None:
                tables["op"][t, rank] = _OPS[action.op]
                tables["chunk"][t, rank] = chunk_of(schedule, action.stage)
                tables["microbatch"][t, rank] = action.microbatch
    when = {made: t for t, row in enumerate(ticks) for a in row if a for made in _made(a)}
    num_saved = _place_between("FIW", schedule, when, tables["saved"])
    num_pending = _place_between("IW", schedule, when, tables["pending"])
    arrivals = {name: np.full(shape, -1, np.int32) for name in ("above", "below", "self")}
    num_mail = _place_mail(schedule, when, tables["received"], arrivals)
    for table in arrivals.values():
        table[table < 0] = num_mail
    return TickTables(
        **tables,
        **{f"from_{name}": table for name, table in arrivals.items()},
        num_saved=num_saved,
        num_pending=num_pending,
        num_mail=num_mail,
    )


def _needs(schedule: PipelineSchedule, action: Action) -> Iterator[tuple[str, int, int]]:
    stage, m = action.stage, action.microbatch
    if action.op == "F" and stage > 0:
        yield "F", stage - 1, m
    if action.op in "IB":
        yield "F", stage, m
        if stage + 1 < schedule.num_stages:
            yield "I", stage + 1, m
    if action.op == "W":
        yield "I", stage, m


def _made(action: Action) -> Iterator[tuple[str, int, int]]:
    for part in action.parts:
        yield part.op, part.stage, part.microbatch


def _place_between(ops: str, schedule: PipelineSchedule, when, column) -> int:
    """Slots from the first to the last of these acts on a stage and micro-batch, of each rank."""
    lives: list[list] = [[] for _ in range(schedule.num_ranks)]
    for stage in range(schedule.num_stages):
        for m in range(schedule.num_microbatches):
            ticks = tuple(when[op, stage, m] for op in ops if (op, stage, m) in when)
            if len(ticks) < len(ops):
                continue  # forwards alone keep nothing
            lives[schedule.rank_of(stage, m)].append((ticks[0], ticks[-1], ticks))
    return max(_allot(life, column[:, rank]) for rank, life in enumerate(lives))


def _place_mail(schedule: PipelineSchedule, when, received, arrivals) -> int:
    """Slots from the tick after which a message arrives to the tick that reads it."""
    last = schedule.num_stages - 1
    lives: list[list] = [[] for _ in range(schedule.num_ranks)]
    arrival = []  # (tick, rank, direction, place in lives)
    for m in range(schedule.num_microbatches):
        for stage in range(schedule.num_stages):
            routes = [("F", stage, "F", stage + 1) if stage < last else ("F", stage, "I", stage)]
            routes += [("I", stage, "I", stage - 1)] if stage else []
            for op, source, reader, target in routes:
                if (reader, target, m) not in when:
                    continue
                sent, read = when[op, source, m], when[reader, target, m]
                here, there = (schedule.rank_of(s, m) for s in (source, target))
                way = _way(schedule, op, here, there)
                arrival.append((sent, there, way, len(lives[there])))
                lives[there].append((sent, read, (read,)))
    slots: list[list[int]] = []
    num = 0
    for rank, life in enumerate(lives):
        column = received[:, rank]
        taken: list[int] = []
        num = max(num, _allot(life, column, taken))
        slots.append(taken)
    for tick, rank, way, place in arrival:
        arrivals[way][tick, rank] = slots[rank][place]
    return num


def _way(schedule: PipelineSchedule, op: str, here: int, there: int) -> str:
    """Where a message comes from as its receiver sees it: ranks are a ring."""
    if here == there:
        return "self"
    if schedule.placement == "v":
        return "above" if there > here else "below"
    return "above" if op == "F" else "below"


def _allot(lives, column, slots: list[int] | None = None) -> int:
    """Gives each (start, end, ticks) a slot that nobody holds meanwhile; returns their number.

    Writes it to the column at the ticks, and in the order of `lives` to `slots`. What starts in the
    tick another ends in is put away after that one was read, so the slot is free for it.
    """
    order = sorted(range(len(lives)), key=lambda i: lives[i][:2])
    free: list[int] = []
    held: list[tuple[int, int]] = []  # (end, slot)
    given = [0] * len(lives)
    count = 0
    for i in order:
        start, end, ticks = lives[i]
        free += sorted((slot for until, slot in held if until <= start), reverse=True)
        held = [(until, slot) for until, slot in held if until > start]
        if not free:
            free.append(count)
            count += 1
        given[i] = free.pop()
        held.append((end, given[i]))
        for tick in ticks:
            column[tick] = given[i]
    if slots is not None:
        slots += given
    return count
