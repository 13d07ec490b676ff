"""The traced window is told, and begins earlier when a run is short."""

import logging

import jax
import pytest

from dsv3_jax.training.profiling import ProfileWindow

# start, end, steps asked for: the steps traced, counted from 0
WINDOWS = [
    (0, 100, 3, [10, 11, 12]),
    (50, 100, 3, [60, 61, 62]),
    (0, 8, 3, [5, 6, 7]),
    (0, 8, 30, [1, 2, 3, 4, 5, 6, 7]),
    (0, 1, 3, []),
    (0, 100, 0, []),
]


@pytest.mark.parametrize("start, end, steps, wanted", WINDOWS)
def test_steps_traced(start, end, steps, wanted, tmp_path, monkeypatch, caplog):
    tracing, traced = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: tracing.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: tracing.clear())
    with caplog.at_level(logging.INFO):
        window = ProfileWindow(tmp_path, start, end, steps)
    for step in range(start, end):
        window.before(step)
        if tracing:
            traced.append(step)
    window.close()
    assert traced == wanted and not tracing
    told = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert bool(told) == (len(wanted) < steps)
    assert bool(caplog.records) == bool(steps)
