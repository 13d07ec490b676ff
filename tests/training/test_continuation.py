"""Where a run goes on: behind the rows that were read, at a rate that does not jump unasked."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config import Config, UserError
from dsv3_jax.training.continuation import refuse_another_run, tell_differences
from dsv3_jax.training.saved_plan import check_rate, saved_place, schedule_from
from dsv3_jax.training.schedule import START, Position, Schedule
from tests.helpers import tiny_config

PATH = Path("runs/x/checkpoints/12")
OURS = {"data_sha256": "d" * 64, "val_sha256": "v" * 64, "tokenizer_sha256": "t" * 64}
CONFIG = tiny_config(steps=100, batch_size=8, seq_len=16)


def changed(config: Config, **groups) -> Config:
    """The config with fields of its groups replaced: changed(c, train={"steps": 3})."""
    new = {
        name: dataclasses.replace(getattr(config, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in groups.items()
    }
    return dataclasses.replace(config, **new)


def meta_of(config: Config, schedule: Schedule, step: int) -> dict:
    made = {"config": dataclasses.asdict(config), **OURS, "backend": "cpu"}
    made |= {"position": schedule.position(step)._asdict(), "plan": schedule.begun._asdict()}
    made["learning_rate"] = float(schedule.settings(step - 1).learning_rate)
    return json.loads(json.dumps(made))


def resumed(config: Config, asked: Config, step: int, schedule: Schedule | None = None) -> Schedule:
    meta = meta_of(config, schedule or Schedule(config), step)
    return schedule_from(saved_place(PATH, step, meta, config), asked, config)


def rates(schedule: Schedule, steps: range) -> list[float]:
    return [float(schedule.settings(step).learning_rate) for step in steps]


def test_the_same_options_go_on_with_the_same_plan():
    ramp = {"batch_start_ratio": 0.25, "batch_ramp_end": 0.5}
    config = changed(CONFIG, schedule=ramp, train={"micro_batch_size": 1})
    whole = Schedule(config)
    assert whole.rows(0) == 2 and whole.rows(99) == 8
    for step in (1, 13, 60, 99):
        again = resumed(config, config, step)
        for at in range(step, 100):
            assert again.settings(at) == whole.settings(at)
            assert again.position(at) == whole.position(at)


CHANGES = {
    "smaller batch": {"train": {"batch_size": 4}},
    "larger batch": {"train": {"batch_size": 24}},
    "more steps": {"train": {"steps": 300}},
    "micro-batches": {"train": {"micro_batch_size": 4}},
    "ramp": {"schedule": {"batch_start_ratio": 0.25, "batch_ramp_end": 0.9}},
    "no ramp": {"schedule": {"batch_start_ratio": 1.0}},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ramp", [1.0, 0.25])
def test_other_batches_go_on_behind_the_rows_that_were_read(change, ramp):
    config = changed(CONFIG, schedule={"batch_start_ratio": ramp, "batch_ramp_end": 0.5})
    read = Schedule(config).position(30)
    asked = changed(config, **CHANGES[change])
    again = resumed(config, asked, 30)
    assert again.position(30) == read
    assert again.rows(asked.train.steps - 1) == asked.train.batch_size
    # And once more: the second plan is found again, not made anew.
    once_more = resumed(asked, asked, 41, again)
    assert [once_more.position(s) for s in range(41, 100)] == [
        again.position(s) for s in range(41, 100)
    ]
    assert rates(once_more, range(41, 100)) == rates(again, range(41, 100))


@pytest.mark.parametrize("seq_len, row", [(32, 120), (12, 320), (17, 226)])
def test_other_rows_go_on_after_as_many_tokens(seq_len, row):
    again = resumed(CONFIG, changed(CONFIG, train={"seq_len": seq_len}), 30)
    assert again.position(30) == Position(30, row, 30 * 8 * 16)
    assert again.tokens(31) == 30 * 8 * 16 + 8 * seq_len


def test_a_checkpoint_of_an_earlier_version_counts_steps_and_says_so(caplog):
    # Those took the default ramp, without micro-batches, for full batches.
    config = changed(CONFIG, schedule={"batch_start_ratio": 0.2})
    meta = {"config": json.loads(json.dumps(dataclasses.asdict(config)))}
    with caplog.at_level(logging.WARNING):
        place = saved_place(PATH, 30, meta, config)
    assert place.position == Position(30, 240, 240 * 16)
    assert place.learning_rate == pytest.approx(1e-2)
    assert "does not hold its position" in caplog.text and "row 240" in caplog.text
    again = schedule_from(place, config, config)
    assert again.position(30) == place.position and again.rows(30) == 8


@pytest.mark.parametrize(
    "position",
    [{"step": 29, "row": 1, "tokens": 1}, {"step": 30, "row": -1, "tokens": 1}],
)
def test_a_position_that_cannot_be_is_refused(position):
    meta = meta_of(CONFIG, Schedule(CONFIG), 30) | {"position": position}
    with pytest.raises(UserError, match="is not one of step 30"):
        saved_place(PATH, 30, meta, CONFIG)


def refusal(config: Config, asked: Config, step: int) -> str | None:
    place = saved_place(PATH, step, meta_of(config, Schedule(config), step), config)
    try:
        check_rate(PATH, place, asked, config)
    except UserError as error:
        return str(error)
    return None


def test_more_steps_than_planned_must_say_which_rate():
    asked = changed(CONFIG, train={"steps": 200})
    said = refusal(CONFIG, asked, 100)
    assert said is not None
    assert "from 0.000332 (step 100) to 0.01 (step 101)" in said
    assert "--schedule.steps 100" in said and "--schedule.accept-rate-jump" in said
    kept = changed(asked, schedule={"steps": 100})
    assert refusal(CONFIG, kept, 100) is None
    again = resumed(CONFIG, kept, 100)
    np.testing.assert_allclose(rates(again, range(100, 200)), 1e-2 * 7.3 / 220, rtol=1e-6)
    accepted = changed(asked, schedule={"accept_rate_jump": True})
    assert refusal(CONFIG, accepted, 100) is None
    assert rates(resumed(CONFIG, accepted, 100), range(100, 101)) == [pytest.approx(1e-2)]


def test_what_does_not_move_the_rate_is_not_asked_about():
    # On the plateau neither the length nor the batch changes anything.
    for change in (*CHANGES.values(), {"train": {"seq_len": 32}}):
        assert refusal(CONFIG, changed(CONFIG, **change), 30) is None
    # Steps of the plan's own are no jumps: warm-up, cosine, the last drop.
    for step in (1, 2, 70, 80, 97, 98, 99):
        assert refusal(CONFIG, CONFIG, step) is None


def test_another_peak_rate_has_to_be_asked_for():
    ruin = changed(CONFIG, optimizer={"learning_rate": 1e30})
    for step in (1, 30, 80, 99):
        said = refusal(CONFIG, ruin, step)
        assert said is not None and "--schedule.steps" not in said, "which would not help"


def saved(**meta) -> dict:
    made = meta_of(CONFIG, Schedule(CONFIG), 12) | meta
    return {"meta": made, "arrays": {}, "jax": "0.0.1"}


DIFFERENT = {
    "data": ({"data_sha256": "e" * 64}, "data: sha256 eeeeeeeeeeee... (data.path stdlib)"),
    "tokenizer": ({"tokenizer_sha256": "u" * 64}, "tokenizer: sha256 uuuuuuuuuuuu..."),
    "seed": (
        {"config": dataclasses.asdict(CONFIG) | {"seed": 3}},
        "seed: 3 in the checkpoint, 0 in this run",
    ),
    "model": (
        {"config": dataclasses.asdict(changed(CONFIG, model={"routed_scaling_factor": 1.5}))},
        "model.routed_scaling_factor: 1.5 in the checkpoint, 2.5 in this run",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_run_is_refused_with_the_ways_out(what):
    meta, line = DIFFERENT[what]
    with pytest.raises(UserError) as error:
        refuse_another_run(PATH, saved(**meta), CONFIG, OURS, {})
    assert line in str(error.value)
    for way in ("Nothing was changed", "--run-dir", "--resume never"):
        assert way in str(error.value)


def test_everything_that_differs_is_in_one_refusal():
    meta = {key: value for mine, _ in DIFFERENT.values() for key, value in mine.items()}
    with pytest.raises(UserError) as error:
        refuse_another_run(PATH, saved(**meta), CONFIG, OURS, {})
    for word in ("data", "tokenizer", "routed_scaling_factor"):
        assert f"\n  {word}" in str(error.value) or f"\n  model.{word}" in str(error.value)


def test_what_may_change_is_told_old_and_new(caplog):
    asked = changed(
        CONFIG,
        train={"batch_size": 4, "steps": 50},
        optimizer={"b2": 0.9},
        quant={"preset": "fp8_paper"},
        mesh={"data": 2},
        expert_parallel={"combine_format": "bf16"},
        data={"mask_documents": True, "fim_rate": 0.5},
        run_dir="elsewhere",
    )
    with caplog.at_level(logging.WARNING):
        refuse_another_run(PATH, saved(), asked, OURS, {})
        tell_differences(PATH, saved(), asked, OURS, CONFIG)
    for line in [
        "train.batch_size: 8 -> 4",
        "train.steps: 100 -> 50",
        "optimizer.b2: 0.95 -> 0.9",
        "quant.preset: bf16 -> fp8_paper",
        "mesh.data: 1 -> 2",
        "expert_parallel.combine_format: none -> bf16",
        "data.mask_documents: False -> True",
        "data.fim_rate: 0.1 -> 0.5",
        "jax: 0.0.1 -> ",
    ]:
        assert sum(line in message for message in caplog.messages) == 1, line
    assert "elsewhere" not in caplog.text


def test_what_an_earlier_version_did_not_keep_is_said(caplog):
    old = dataclasses.asdict(CONFIG)
    del old["schedule"]["steps"]
    bare = {"meta": {"config": old}, "arrays": {}}
    with caplog.at_level(logging.WARNING):
        refuse_another_run(PATH, bare, CONFIG, OURS, {})
        tell_differences(PATH, bare, CONFIG, OURS, CONFIG)
    assert "does not say its data: not compared" in caplog.text
    assert "does not say its tokenizer: not compared" in caplog.text
    assert "does not say: schedule.steps, jax, backend" in caplog.text


def test_the_same_run_is_told_nothing(caplog):
    same = saved() | {"jax": __import__("jax").__version__}
    with caplog.at_level(logging.WARNING):
        refuse_another_run(PATH, same, CONFIG, OURS, {})
        tell_differences(PATH, same, CONFIG, OURS, CONFIG)
    assert caplog.messages == []
    assert Schedule(CONFIG).begun == START
