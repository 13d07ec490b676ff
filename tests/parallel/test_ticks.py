"""Tables of ticks against the schedules and the simulator they come from."""

import numpy as np
import pytest

from dsv3_jax.parallel.schedules import make_schedule
from dsv3_jax.parallel.ticks import (
    BACKWARD,
    FORWARD,
    IDLE,
    INPUT_BACKWARD,
    WEIGHT_BACKWARD,
    chunk_of,
    stages_of_rank,
    tick_tables,
    unit_ticks,
)
from dsv3_jax.parallel.timeline import Durations, simulate

CASES = [
    ("1f1b", 2, 4),
    ("1f1b", 4, 3),
    ("1f1b", 8, 16),
    ("interleaved", 2, 4),
    ("interleaved", 4, 8),
    ("zb1p", 2, 4),
    ("zb1p", 4, 8),
    ("dualpipev", 2, 4),
    ("dualpipev", 4, 10),
]


@pytest.mark.parametrize("name, ranks, microbatches", CASES)
def test_idle_ticks_are_the_simulators(name, ranks, microbatches):
    schedule = make_schedule(name, ranks, microbatches)
    timeline = simulate(schedule.in_units(), Durations())
    tables = tick_tables(schedule)
    assert tables.op.shape == (timeline.makespan, ranks)
    assert tables.idle == timeline.bubbles


@pytest.mark.parametrize("name, ranks, microbatches", CASES)
def test_slots_are_as_many_as_the_schedule_holds_at_its_peak(name, ranks, microbatches):
    schedule = make_schedule(name, ranks, microbatches)
    peak = max(simulate(schedule.in_units(), Durations()).peak_activations)
    assert tick_tables(schedule).num_saved == peak
    more = tick_tables(make_schedule(name, ranks, microbatches + 4 * ranks))
    if microbatches >= 2 * ranks:  # full already
        assert more.num_saved == peak
        assert more.num_mail == tick_tables(schedule).num_mail


@pytest.mark.parametrize(
    "name, slots", [("1f1b", 1), ("interleaved", 1), ("zb1p", 4), ("dualpipev", 4)]
)
def test_what_a_gradient_leaves_for_the_weights_is_held_until_they_have_theirs(name, slots):
    """One micro-batch's where the weights' gradient follows at once, else as many as it waits."""
    tables = tick_tables(make_schedule(name, 4, 16))
    assert tables.num_pending == slots < tables.num_saved or name == "zb1p"


@pytest.mark.parametrize("ranks, microbatches", [(2, 8), (4, 16), (8, 8)])
def test_whole_backward_passes_take_fewer_ticks(ranks, microbatches):
    schedule = make_schedule("1f1b", ranks, microbatches)
    apart, whole = tick_tables(schedule), tick_tables(schedule, whole=True)
    assert len(whole.op) == 2 * (microbatches + ranks - 1)
    assert len(whole.op) < 0.8 * len(apart.op)
    assert whole.num_saved == apart.num_saved and whole.num_pending == 1
    # As the schedule is, of forwards and backward passes that take as long.
    alike = simulate(schedule, Durations(1.0, 0.5, 0.5))
    assert whole.idle == alike.bubbles and len(whole.op) == alike.makespan


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("ranks, microbatches", [(2, 8), (4, 16), (8, 8), (4, 3)])
def test_eager_ranks_wait_for_no_longer_act(ranks, microbatches, whole):
    """Ticks of one kind each: together as long as 1F1B without any meeting, whatever acts take."""
    schedule = make_schedule("eager_1f1b", ranks, microbatches)
    times = Durations(1.0, 1.7, 0.4)
    rows = unit_ticks(schedule, whole)
    assert all(len({a.op for a in row if a}) == 1 for row in rows)
    taken = sum(max(times.of(a.op) for a in row if a) for row in rows)
    free = simulate(make_schedule("1f1b", ranks, microbatches), times).makespan
    assert taken == pytest.approx(free) == (microbatches + ranks - 1) * 3.1
    tables = tick_tables(schedule, whole)
    assert tables.num_saved == min(2 * ranks - 1, microbatches)
    assert tables.num_saved == max(simulate(schedule, times).peak_activations)


@pytest.mark.parametrize(
    "name, ranks, microbatches, whole",
    [
        *((*case, False) for case in CASES),
        *((*case, True) for case in CASES[:5]),
        *(("eager_1f1b", *shape) for shape in ((2, 4, False), (4, 3, True), (4, 16, True))),
    ],
)
def test_every_message_is_read_by_the_stage_it_is_for(name, ranks, microbatches, whole):
    """The tables run with names in place of numbers: each act finds what it needs, and no more."""
    schedule = make_schedule(name, ranks, microbatches)
    tables = tick_tables(schedule, whole)
    last = schedule.num_stages - 1
    mail = [["?"] * (tables.num_mail + 1) for _ in range(ranks)]
    saved = [["?"] * tables.num_saved for _ in range(ranks)]
    pending = [["?"] * tables.num_pending for _ in range(ranks)]
    seen = set()
    for t in range(len(tables.op)):
        results = ["?"] * ranks
        for rank in range(ranks):
            op, chunk, m = (int(getattr(tables, n)[t, rank]) for n in ("op", "chunk", "microbatch"))
            if op == IDLE:
                continue
            stage = stages_of_rank(schedule, rank)[chunk]
            assert chunk_of(schedule, stage) == chunk
            received, slot = mail[rank][tables.received[t, rank]], int(tables.saved[t, rank])
            parts = (INPUT_BACKWARD, WEIGHT_BACKWARD) if op == BACKWARD else (op,)
            seen |= {(part, stage, m) for part in parts}
            if op == FORWARD:
                assert stage == 0 or received == ("F", stage - 1, m)
                saved[rank][slot] = (stage, m)
                results[rank] = ("F", stage, m)
            else:
                assert saved[rank][slot] == (stage, m)
            if INPUT_BACKWARD in parts:
                assert received == (("F", stage, m) if stage == last else ("I", stage + 1, m))
                results[rank] = ("I", stage, m)
                pending[rank][tables.pending[t, rank]] = (stage, m)
            if WEIGHT_BACKWARD in parts:
                assert pending[rank][tables.pending[t, rank]] == (stage, m)
        for rank in range(ranks):
            mail[rank][tables.from_above[t, rank]] = results[rank - 1]
            mail[rank][tables.from_below[t, rank]] = results[(rank + 1) % ranks]
            mail[rank][tables.from_self[t, rank]] = results[rank]
            mail[rank][tables.num_mail] = "?"
    assert len(seen) == 3 * schedule.num_stages * microbatches
    assert {op for op, *_ in seen} == {FORWARD, INPUT_BACKWARD, WEIGHT_BACKWARD}


def test_what_the_executor_cannot_run_is_refused():
    with pytest.raises(ValueError, match="use dualpipev"):
        tick_tables(make_schedule("dualpipe", 2, 4))
    with pytest.raises(ValueError, match="num_microbatches=6 to be a multiple of num_ranks=4"):
        make_schedule("interleaved", 4, 6)
    with pytest.raises(ValueError, match="did you mean 'interleaved'"):
        make_schedule("interlaced", 4, 8)
    assert all(
        table.dtype == np.int32
        for table in tick_tables(make_schedule("zb1p", 2, 2)).columns().values()
    )
