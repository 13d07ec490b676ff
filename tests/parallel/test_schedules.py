"""Pipeline schedules: the V3 report's bubble table (section 3.2.1, table 2) by simulation."""

from collections import Counter

import pytest

from dsv3_jax.parallel.schedules import (
    SCHEDULES,
    Action,
    PipelineSchedule,
    dualpipe,
    dualpipev,
    interleaved,
    make_schedule,
    one_f_one_b,
    zb1p,
)
from dsv3_jax.parallel.timeline import Durations, simulate

# (ranks, micro-batches) with an even and an odd half, and the paper's 16 ranks.
SIZES = [(2, 4), (4, 8), (6, 14), (8, 20), (16, 40)]
# The published formulas hold where W <= F = I (the usual assumption); FB pairs may save time.
TIMES = [
    Durations(1, 1, 1),
    Durations(2, 2, 1),
    Durations(2, 2, 1.5, overlapped=4.75),
]


@pytest.mark.parametrize("ranks, microbatches", SIZES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_stage_runs_each_microbatch_once_on_its_own_rank(name, ranks, microbatches):
    if name == "interleaved":  # in whole groups
        microbatches = -(-microbatches // ranks) * ranks
    schedule = make_schedule(name, ranks, microbatches)
    ran = Counter()
    for rank, row in enumerate(schedule.actions):
        for part in (part for action in row for part in action.parts):
            assert schedule.rank_of(part.stage, part.microbatch) == rank
            ran[part] += 1
    wanted = {
        Action(op, s, m)
        for op in ("F", "I", "W")
        for s in range(schedule.num_stages)
        for m in range(microbatches)
    }
    assert set(ran) == wanted and set(ran.values()) == {1}


@pytest.mark.parametrize("ranks, microbatches", SIZES)
@pytest.mark.parametrize("times", TIMES)
def test_bubbles_equal_the_published_formulas(ranks, microbatches, times):
    F, B, W, FB = times.forward, times.backward, times.weight_backward, times.of("FB")
    assert set(simulate(one_f_one_b(ranks, microbatches), times).bubbles) == {(ranks - 1) * (F + B)}
    zero_bubble = simulate(zb1p(ranks, microbatches), times).bubbles
    assert set(zero_bubble) == {(ranks - 1) * (F + B - 2 * W)}
    dual = (ranks / 2 - 1) * (FB + B - 3 * W)
    assert max(simulate(dualpipe(ranks, microbatches), times).bubbles) == pytest.approx(dual)
    folded = simulate(dualpipev(ranks // 2, microbatches), times)
    assert max(folded.bubbles) == pytest.approx(dual)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_interleaving_has_the_bubble_of_half_stages(ranks):
    times = Durations(1, 1, 1)
    bubbles = simulate(interleaved(ranks, 4 * ranks), times).bubbles
    assert set(bubbles) == {(ranks - 1) * (times.forward + times.backward)}  # of half a rank's work
    peaks = simulate(interleaved(ranks, 4 * ranks), times).peak_activations
    assert peaks == tuple(3 * ranks - 2 * r - 1 for r in range(ranks))


def test_dualpipe_formula_is_an_approximation_where_input_gradients_outlast_forwards():
    times = Durations(2, 3, 1)
    simulated = max(simulate(dualpipe(8, 20), times).bubbles)
    assert simulated == 19
    assert (8 / 2 - 1) * (times.of("FB") + times.backward - 3 * times.weight_backward) == 21


@pytest.mark.parametrize("ranks, microbatches", SIZES[1:])
def test_activation_peaks_equal_the_published_ones(ranks, microbatches):
    assert max(simulate(one_f_one_b(ranks, microbatches)).peak_activations) == ranks
    assert max(simulate(zb1p(ranks, microbatches)).peak_activations) == ranks
    assert max(simulate(dualpipe(ranks, microbatches)).peak_activations) == ranks + 1
    assert max(simulate(dualpipev(ranks // 2, microbatches)).peak_activations) == ranks + 1


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_dualpipe_bubble_does_not_grow_with_microbatches(name):
    bubbles = [max(simulate(make_schedule(name, 4, m)).bubbles) for m in (8, 16, 40)]
    assert len(set(bubbles)) == 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_units_keep_the_work_and_the_order_of_each_rank(name):
    schedule = make_schedule(name, 4, 12)
    units = schedule.in_units()
    assert {a.op for row in units.actions for a in row} == {"F", "I", "W"}
    for row, unit_row in zip(schedule.actions, units.actions):
        assert list(unit_row) == [part for action in row for part in action.parts]
    assert simulate(units).makespan <= simulate(schedule).makespan


def test_a_slow_transfer_lengthens_the_pipe_once_a_hop():
    plain = simulate(one_f_one_b(4, 1)).makespan
    assert simulate(one_f_one_b(4, 1), Durations(transfer=0.5)).makespan == plain + 6 * 0.5


def test_a_schedule_that_waits_for_itself_is_refused():
    backwards = PipelineSchedule(
        "bad", "straight", 1, 1, 1, ((Action("B", 0, 0), Action("F", 0, 0)),)
    )
    with pytest.raises(ValueError, match="'bad' deadlocks: rank 0 waits"):
        simulate(backwards)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: dualpipe(4, 6), "at least 8"),
        (lambda: dualpipe(3, 8), "even"),
        (lambda: dualpipev(4, 7), "at least 8"),
        (lambda: one_f_one_b(0, 1), "must be positive"),
        (lambda: make_schedule("dualpip", 4, 8), "did you mean 'dualpipe'"),
    ],
)
def test_wrong_sizes_and_names_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
