"""The plan of a run: the paper's own numbers, from the config of the paper's run."""

import dataclasses
import math

import numpy as np
import pytest

from configs.deepseek_v3 import get_config
from dsv3_jax.config import ParallelConfig, ScheduleConfig
from dsv3_jax.training.schedule import Schedule, plan_batch_sizes
from tests.helpers import tiny_config

CONFIG = get_config()


@pytest.fixture(scope="module")
def schedule():
    return Schedule(CONFIG)


@pytest.fixture(scope="module")
def at(schedule):
    """The first step that starts with at least this many of the 14.8 trillion tokens behind it."""
    tokens = np.array([schedule.tokens(s) for s in range(CONFIG.train.steps)])
    share = tokens / schedule.tokens(CONFIG.train.steps)
    return lambda trillion: int(np.searchsorted(share, trillion / 14.8))


def test_the_run_reads_14_8_trillion_tokens(schedule):
    # Known to three digits; phases are fractions of whatever it is.
    assert schedule.tokens(CONFIG.train.steps) == pytest.approx(14.8e12, rel=5e-4)


def test_learning_rate_goes_through_the_paper_s_phases(schedule, at):
    rate = lambda step: float(schedule.settings(step).learning_rate)  # noqa: E731
    assert rate(0) == pytest.approx(2.2e-4 / 2000)
    assert rate(999) == pytest.approx(1.1e-4)  # linear
    assert rate(1999) == rate(2000) == pytest.approx(2.2e-4)
    assert rate(at(9.99)) == pytest.approx(2.2e-4)
    assert rate(at(10.05)) < 2.2e-4
    halfway = (2.2e-4 + 2.2e-5) / 2  # of the cosine
    assert rate(at(10 + 4.3 / 2)) == pytest.approx(halfway, rel=1e-3)
    assert rate(at(14.29)) == pytest.approx(2.2e-5, rel=1e-3)
    assert rate(at(14.31)) == rate(at(14.62)) == pytest.approx(2.2e-5)
    assert rate(at(14.64)) == rate(CONFIG.train.steps - 1) == pytest.approx(7.3e-6)


def test_batch_grows_from_3072_to_15360_over_the_first_469_billion_tokens(schedule, at):
    assert schedule.rows(0) == 3072
    sizes = [schedule.rows(s) for s in range(at(0.6))]
    assert sizes == sorted(sizes)
    assert set(sizes) == set(range(3072, 15360 + 1, 128))  # whole micro-batches of 128
    # Rounded to micro-batches, the last size begins half a micro-batch early.
    assert schedule.rows(at(0.469)) == schedule.rows(CONFIG.train.steps - 1) == 15360
    exact = plan_batch_sizes(CONFIG.schedule, CONFIG.train.steps, 15360)
    assert np.abs(np.array(sizes) - exact[: len(sizes)]).max() <= 64
    full = int(np.argmax(exact >= 15360 * (1 - 1e-9)))
    assert exact[:full].sum() * 4096 == pytest.approx(469e9, rel=2e-3)
    # Linear in tokens: half-way through them, half-way between the sizes.
    seen = np.cumsum(exact) * 4096
    assert exact[int(np.searchsorted(seen, 469e9 / 2))] == pytest.approx(9216, rel=2e-3)


def test_gamma_stops_at_14_3_and_lambda_drops_at_10_trillion(schedule, at):
    gamma = lambda step: float(schedule.settings(step).bias_update_speed)  # noqa: E731
    weight = lambda step: float(schedule.settings(step).mtp_loss_weight)  # noqa: E731
    assert gamma(0) == gamma(at(14.3) - 1) == pytest.approx(0.001)
    assert gamma(at(14.3)) == gamma(CONFIG.train.steps - 1) == 0
    assert weight(0) == weight(at(10) - 1) == pytest.approx(0.3)
    assert weight(at(10)) == weight(CONFIG.train.steps - 1) == pytest.approx(0.1)


def test_rows_of_steps_follow_each_other_without_gaps(schedule):
    for step in (0, 1, 7000, 7001, 200_000):
        assert schedule.first_row(step + 1) == schedule.first_row(step) + schedule.rows(step)
        assert schedule.rows(step) == 128 * int(schedule.settings(step).num_micro_batches)


def test_a_short_run_goes_through_the_same_phases():
    schedule = Schedule(tiny_config(steps=1000, batch_size=4))
    settings = [schedule.settings(s) for s in range(1000)]
    rates = np.array([s.learning_rate for s in settings], np.float64)
    assert rates[2] == rates[675] == pytest.approx(1e-2)
    assert rates[970] == pytest.approx(1e-3) and rates[-1] == pytest.approx(1e-2 * 7.3 / 220)
    assert (np.diff(rates[2:]) <= 0).all()
    assert settings[967].bias_update_speed == 0 < settings[966].bias_update_speed  # 14.3 / 14.8
    assert {int(s.num_micro_batches) for s in settings} == {1}


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_a_plan(steps):
    schedule = Schedule(tiny_config(steps=steps))
    for step in range(steps):
        assert math.isfinite(schedule.settings(step).learning_rate)
        assert schedule.rows(step) == 4


def test_no_ramp_means_the_full_batch_from_the_start():
    for plan in (ScheduleConfig(batch_start_ratio=1.0), ScheduleConfig(batch_ramp_end=0.0)):
        np.testing.assert_array_equal(plan_batch_sizes(plan, 5, 12), 12.0)


def test_a_ramp_without_micro_batches_gets_some():
    config = tiny_config(steps=1000, batch_size=64)
    ramp = dataclasses.replace(config.schedule, batch_start_ratio=0.2, batch_ramp_end=0.2)
    schedule = Schedule(dataclasses.replace(config, schedule=ramp))
    sizes = [schedule.rows(step) for step in range(1000)]
    assert sizes[0] == 12 and sizes[-1] == 64 and sizes == sorted(sizes)
    assert len(set(sizes)) == 14  # 12, 16, ... 64


# batch, ratio, devices that share the batch: the micro-batch
DERIVED = [
    ((64, 0.2, 1), 4),
    ((15360, 0.2, 1), 3072),
    ((16, 0.25, 1), 4),
    ((16, 0.25, 8), 8),
    ((16, 0.2, 16), 16),
    ((7, 0.2, 1), 1),
    ((64, 1.0, 1), 64),
]


@pytest.mark.parametrize("asked, micro", DERIVED)
def test_the_micro_batch_of_a_ramp_fits_batch_and_mesh(asked, micro):
    batch, ratio, devices = asked
    config = tiny_config(batch_size=batch)
    config = dataclasses.replace(
        config,
        mesh=ParallelConfig(data=devices),
        schedule=dataclasses.replace(config.schedule, batch_start_ratio=ratio),
    )
    assert config.micro_batch_size == micro
    assert batch % micro == 0 and micro % devices == 0


def test_past_its_end_the_plan_s_last_phase_goes_on():
    config = tiny_config(steps=30)
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, steps=20))
    planned, longer = Schedule(tiny_config(steps=20)), Schedule(config)
    for step in range(20):
        assert longer.settings(step) == planned.settings(step)
    for step in (20, 25, 29):
        told = longer.settings(step)
        assert told.learning_rate == pytest.approx(1e-2 * 7.3 / 220)
        assert (told.bias_update_speed, told.num_micro_batches) == (0, 1)
        assert told.mtp_loss_weight == pytest.approx(0.1)
