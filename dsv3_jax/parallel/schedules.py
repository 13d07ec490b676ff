"""Pipeline schedules as data.

A schedule is one list of actions a rank; nothing here runs a model. The executor turns the lists
into ticks, `timeline.py` counts their bubbles, the planner turns them into seconds, and the tests
read them without a device. Knows no JAX. Six schedules: 1F1B and interleaved 1F1B (Narayanan et
al., arXiv 2104.04473), eager 1F1B (Zhuang et al., arXiv 2211.05322), ZB1P (ZB-H1 of Qi et al.,
arXiv 2401.10241), and DualPipe and DualPipeV. The last two are our own re-statement of the eight
steps of DeepSeek's MIT-licensed github.com/deepseek-ai/DualPipe (V3 report, section 3.2.1).

By simulation the published bubbles are exact where W <= F and W <= I (1F1B always), and
DualPipe's needs F = I besides: (PP/2 - 1)(F&B + B - 3W) is 21 for F, I, W = 2, 3, 1 and 8 ranks,
where the schedule itself idles 19.

Letters of an action: F forward, I gradient of the input, W gradient of the weights, B = I then W
in one piece, FB = the forward of one micro-batch overlapped with the backward of another.
"""

from __future__ import annotations

import difflib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

Op = Literal["F", "I", "W", "B", "FB"]


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of work of a rank: `op` on (stage, microbatch).

    An FB action forwards (stage, microbatch) while it back-propagates
    (backward_stage, backward_microbatch); the last two are None otherwise.
    """

    op: Op
    stage: int
    microbatch: int
    backward_stage: int | None = None
    backward_microbatch: int | None = None

    @property
    def parts(self) -> tuple[Action, ...]:
        """The F, I and W actions this one is made of, in the order a rank would run them."""
        if self.op == "B":
            return Action("I", self.stage, self.microbatch), Action(
                "W", self.stage, self.microbatch
            )
        if self.op == "FB":
            assert self.backward_stage is not None and self.backward_microbatch is not None
            backward = Action("B", self.backward_stage, self.backward_microbatch)
            return Action("F", self.stage, self.microbatch), *backward.parts
        return (self,)


@dataclass(frozen=True)
class PipelineSchedule:
    """The actions of every rank, and where each stage lives.

    `parameter_copies` counts how often the model is held by the ranks together. Under
    `placement` "straight" stage s lives on rank s; under "bidirectional" on ranks s (for the first
    half of the micro-batches) and num_ranks-1-s (for the second); under "v" a rank holds stages r
    and 2*num_ranks-1-r; under "looped" stage s lives on rank s % num_ranks. Ranks that meet
    after each action all do the same kind at a time, if it is `in_turn`.
    """

    name: str
    placement: Literal["straight", "bidirectional", "v", "looped"]
    num_ranks: int
    num_stages: int
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]
    in_turn: bool = False

    @property
    def parameter_copies(self) -> int:
        """How many ranks hold each stage's parameters."""
        return 2 if self.placement == "bidirectional" else 1

    def rank_of(self, stage: int, microbatch: int) -> int:
        """The rank that runs `stage` for `microbatch`."""
        if self.placement == "v":
            return stage if stage < self.num_ranks else self.num_stages - 1 - stage
        if self.placement == "bidirectional" and microbatch >= self.num_microbatches // 2:
            return self.num_ranks - 1 - stage
        return stage % self.num_ranks

    def in_units(self, whole: bool = False) -> PipelineSchedule:
        """The same schedule with every B and FB taken apart into F, I and W; B stay if `whole`.

        For an executor whose ticks are all one unit long: there a fused FB tick makes every other
        rank wait for the longest branch.
        """
        rows = tuple(
            tuple(p for a in row for p in ((a,) if whole and a.op == "B" else a.parts))
            for row in self.actions
        )
        return replace(self, actions=rows)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """1F1B: a warm-up of forwards, then one forward and one backward in turn."""
    rows = _alternating(num_ranks, num_microbatches, ahead=1)
    return PipelineSchedule("1f1b", "straight", num_ranks, num_ranks, num_microbatches, rows)


def eager_one_f_one_b(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """Eager 1F1B: twice as many forwards first, so that a rank never waits for what it needs next.

    Where all ranks meet after each action, they do the same kind at a time, and none waits for a
    longer one of another rank: 1F1B's bubble, for 2 (R - r) - 1 micro-batches kept on rank r.
    """
    rows = _alternating(num_ranks, num_microbatches, ahead=2)
    shape = num_ranks, num_ranks, num_microbatches
    return PipelineSchedule("eager_1f1b", "straight", *shape, rows, in_turn=True)


def _alternating(
    num_ranks: int, num_microbatches: int, ahead: int
) -> tuple[tuple[Action, ...], ...]:
    """Each rank's actions: `ahead` forwards for each rank after it, then F and B in turn."""
    _check(num_ranks, num_microbatches, at_least=1)
    rows = []
    for rank in range(num_ranks):
        warm_up = min(ahead * (num_ranks - rank - 1), num_microbatches)
        row = [Action("F", rank, m) for m in range(warm_up)]
        for m in range(num_microbatches):
            if warm_up + m < num_microbatches:
                row.append(Action("F", rank, warm_up + m))
            row.append(Action("B", rank, m))
        rows.append(tuple(row))
    return tuple(rows)


def interleaved(num_ranks: int, num_microbatches: int, chunks: int = 2) -> PipelineSchedule:
    """Interleaved 1F1B: each rank holds `chunks` stages, num_ranks apart, which halves the bubble.

    num_microbatches is a multiple of num_ranks, as micro-batches go through a chunk in groups of
    so many.
    """
    _check(num_ranks, num_microbatches, at_least=1)
    if num_microbatches % num_ranks:
        raise ValueError(
            f"interleaved 1F1B needs num_microbatches={num_microbatches} to be a multiple of "
            f"num_ranks={num_ranks}"
        )
    total = chunks * num_microbatches

    def place(turn: int, rank: int, backward: bool) -> tuple[int, int]:
        group, within = divmod(turn, num_ranks * chunks)
        chunk, m = divmod(within, num_ranks)
        chunk = chunks - 1 - chunk if backward else chunk
        return chunk * num_ranks + rank, group * num_ranks + m

    rows = []
    for rank in range(num_ranks):
        warm_up = min(2 * (num_ranks - rank - 1) + (chunks - 1) * num_ranks, total)
        row = [Action("F", *place(turn, rank, False)) for turn in range(warm_up)]
        for turn in range(total):
            if warm_up + turn < total:
                row.append(Action("F", *place(warm_up + turn, rank, False)))
            row.append(Action("B", *place(turn, rank, True)))
        rows.append(tuple(row))
    name, stages = "interleaved", chunks * num_ranks
    return PipelineSchedule(name, "looped", num_ranks, stages, num_microbatches, tuple(rows))


def zb1p(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """ZB1P: as 1F1B, but rank r puts off its weight gradients by r, to fill the last bubble."""
    _check(num_ranks, num_microbatches, at_least=1)
    rows = []
    for rank in range(num_ranks):
        warm_up = min(num_ranks - rank - 1, num_microbatches)
        row = [Action("F", rank, m) for m in range(warm_up)]
        for m in range(num_microbatches):
            if warm_up + m < num_microbatches:
                row.append(Action("F", rank, warm_up + m))
            row.append(Action("I", rank, m))
            if m >= rank:
                row.append(Action("W", rank, m - rank))
        row += [
            Action("W", rank, m) for m in range(max(num_microbatches - rank, 0), num_microbatches)
        ]
        rows.append(tuple(row))
    return PipelineSchedule("zb1p", "straight", num_ranks, num_ranks, num_microbatches, tuple(rows))


def dualpipe(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """DualPipe: half of the micro-batches enter at each end, so every rank holds two stages.

    `num_microbatches` counts both directions; it and `num_ranks` are even, and it is at least
    twice `num_ranks`. Micro-batches 0..M/2-1 go down the ranks, the others up.
    """
    _check(num_ranks, num_microbatches, at_least=2 * num_ranks, even=True)
    half = num_ranks // 2
    rows = []
    for rank in range(num_ranks):
        mirrored = min(rank, num_ranks - 1 - rank)
        inner = half - mirrored - 1
        second = rank >= half

        # Phase 0 is the direction that enters at this rank's own end.
        def place(
            phase: int, index: int, rank: int = rank, second: bool = second
        ) -> tuple[int, int]:
            up = bool(phase) != second
            stage = num_ranks - 1 - rank if up else rank
            return stage, index + (num_microbatches // 2 if up else 0)

        main = num_microbatches // 2 - num_ranks + mirrored + 1
        rows.append(_eight_steps(2 * inner, mirrored + 1, inner, main, inner == 0, place))
    return PipelineSchedule(
        "dualpipe", "bidirectional", num_ranks, num_ranks, num_microbatches, tuple(rows)
    )


def dualpipev(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """DualPipeV: DualPipe cut in half, 2*num_ranks stages folded into a V on num_ranks ranks.

    Needs num_microbatches >= 2 * num_ranks. One copy of the parameters, as two stages a rank.
    """
    _check(num_ranks, num_microbatches, at_least=2 * num_ranks)
    rows = []
    for rank in range(num_ranks):
        inner = num_ranks - rank - 1

        def place(phase: int, index: int, rank: int = rank) -> tuple[int, int]:
            return (2 * num_ranks - 1 - rank if phase else rank), index

        main = num_microbatches - 2 * num_ranks + rank + 1
        rows.append(_eight_steps(2 * inner, rank + 1, inner, main, inner == 0, place))
    return PipelineSchedule(
        "dualpipev", "v", num_ranks, 2 * num_ranks, num_microbatches, tuple(rows)
    )


SCHEDULES: dict[str, Callable[[int, int], PipelineSchedule]] = {
    "1f1b": one_f_one_b,
    "eager_1f1b": eager_one_f_one_b,
    "interleaved": interleaved,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}


def make_schedule(name: str, num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """The schedule called `name`; ValueError names the nearest one for an unknown name.

    Source: V3 report, section 3.2.1; arXiv 2401.10241 (ZB1P); deepseek-ai/DualPipe.

    >>> import dsv3_jax as ds
    >>> ds.make_schedule("1f1b", num_ranks=4, num_microbatches=8).num_stages
    4
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name.lower(), SCHEDULES, n=1, cutoff=0.0)
        raise ValueError(f"unknown schedule {name!r}: did you mean {near[0]!r}?")
    return SCHEDULES[name](num_ranks, num_microbatches)


def _eight_steps(
    warm_up: int,
    both: int,
    inner: int,
    main: int,
    middle: bool,
    place: Callable[[int, int], tuple[int, int]],
) -> tuple[Action, ...]:
    """One rank's actions: DualPipe's eight steps (dualpipe.py, `step`), phases 0 and 1.

    `place(phase, index)` gives the (stage, micro-batch) of the index-th micro-batch of a phase.
    """
    row: list[Action] = []
    count: Counter[tuple[str, int]] = Counter()
    pending: deque[tuple[int, int]] = deque()  # weight gradients put off, oldest first

    def take(kind: str, phase: int) -> tuple[int, int]:
        count[kind, phase] += 1
        return place(phase, count[kind, phase] - 1)

    def forward(phase: int) -> None:
        row.append(Action("F", *take("F", phase)))

    def backward(phase: int, put_off_weights: bool = False) -> None:
        target = take("B", phase)
        row.append(Action("I" if put_off_weights else "B", *target))
        if put_off_weights:
            pending.append(target)

    def weights() -> None:
        row.append(Action("W", *pending.popleft()))

    def overlapped(forward_phase: int, backward_phase: int) -> None:
        row.append(Action("FB", *take("F", forward_phase), *take("B", backward_phase)))

    for _ in range(warm_up):  # step 1: nF0
        forward(0)
    for _ in range(both):  # step 2: nF0F1
        forward(0)
        forward(1)
    for _ in range(inner):  # step 3: nI1W1F1
        backward(1, put_off_weights=True)
        weights()
        forward(1)
    for i in range(main):  # step 4, the main one: nF0B1F1B0
        if i == 0 and middle:  # the middle rank has nothing to overlap its first pair with
            forward(0)
            backward(1)
        else:
            overlapped(0, 1)
        overlapped(1, 0)
    for _ in range(inner):  # step 5: nB1F1B0
        backward(1)
        overlapped(1, 0)
    put_off = False
    for i in range(both):  # step 6: nB1B0, the second half puts its weight gradients off
        put_off = put_off or (i == both // 2 and both % 2 == 0)
        backward(1, put_off)
        put_off = put_off or (i == both // 2 and both % 2 == 1)
        backward(0, put_off)
    for _ in range(inner):  # step 7: nW I0
        weights()
        backward(0, put_off_weights=True)
    for _ in range(both):  # step 8: nW
        weights()
    assert not pending, "a weight gradient was never computed"
    return tuple(row)


def _check(num_ranks: int, num_microbatches: int, at_least: int, even: bool = False) -> None:
    if num_ranks < 1:
        raise ValueError(f"{num_ranks=} must be positive")
    if num_microbatches < at_least:
        raise ValueError(f"{num_microbatches=} must be at least {at_least} for {num_ranks=}")
    if even and (num_ranks % 2 or num_microbatches % 2):
        raise ValueError(f"{num_ranks=} and {num_microbatches=} must both be even")
