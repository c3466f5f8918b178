"""Measured against predicted: a verdict after a hundred steps, and one stage to blame."""

from __future__ import annotations

import pytest

from coordinator import planner
from coordinator.drift import STEPS, Drift, compute_seconds
from coordinator.figures import StageSeconds
from coordinator.forecast import Forecast
from coordinator.planner import Asked, ModelSizes
from potluck.plan import WorkerId, WorkerInfo

MB = 10**6


@pytest.fixture(scope="module")
def forecast() -> Forecast:
    """Two stages of 100 ms each and KV that takes a millisecond a thousand positions."""
    sizes = ModelSizes((100 * MB,) * 20, MB, MB, 1000, MB)
    workers = [WorkerInfo(WorkerId(name), "", "", 1, 10**10, 10**10, 1e10) for name in ("a", "b")]
    return planner.plan(sizes, workers, Asked(1024, every_worker=True)).forecast


def drift_after(forecast: Forecast, factors: tuple[float, ...], *, rows: int = 1) -> Drift:
    drift = Drift(forecast)
    stages = [
        compute_seconds(stage, rows) * f for stage, f in zip(forecast.stages, factors, strict=True)
    ]
    timings = [StageSeconds(compute=seconds) for seconds in stages]
    positions = rows * forecast.stages[0].positions
    judged = [drift.note_step(timings, rows, positions) for _ in range(STEPS)]
    assert judged == [False] * (STEPS - 1) + [True]
    assert not drift.note_step(timings, rows, positions), "one verdict a plan"
    return drift


def test_a_plan_that_keeps_its_word_gives_no_advice(forecast: Forecast) -> None:
    drift = drift_after(forecast, (1.1, 0.9))
    assert [stage.is_off for stage in drift.verdict] == [False, False]
    assert drift.advice() == ()


def test_the_slower_stage_is_to_blame(forecast: Forecast) -> None:
    (line,) = drift_after(forecast, (1.25, 1.5)).advice()
    worker = forecast.stages[1].worker
    assert line.startswith(f"{worker} is 50% slower than predicted (")
    assert "ms a step instead of" in line


def test_a_stage_faster_than_its_probe_is_told_too(forecast: Forecast) -> None:
    (line,) = drift_after(forecast, (0.5, 1.01)).advice()
    assert line.startswith(f"{forecast.stages[0].worker} is 50% faster than predicted")


def test_a_pipeline_that_is_faster_throughout_is_no_complaint(forecast: Forecast) -> None:
    assert drift_after(forecast, (0.5, 0.7)).advice() == ()


def test_steps_of_many_rows_are_compared_with_steps_of_many_rows(forecast: Forecast) -> None:
    assert compute_seconds(forecast.stages[0], 8) > 1.5 * compute_seconds(forecast.stages[0], 1)
    assert drift_after(forecast, (1.0, 1.0), rows=8).advice() == ()


def test_long_sessions_are_expected_to_take_longer(forecast: Forecast) -> None:
    drift = Drift(forecast)
    timings = [StageSeconds(compute=compute_seconds(s, 1)) for s in forecast.stages]
    for _ in range(STEPS):
        drift.note_step(timings, 1, 10**6)
    predicted = [stage.predicted_seconds for stage in drift.verdict]
    assert all(p > t.compute for p, t in zip(predicted, timings, strict=True))


def test_steps_that_do_not_name_every_stage_count_for_nothing(forecast: Forecast) -> None:
    drift = Drift(forecast)
    assert not any(drift.note_step([StageSeconds()], 1, 10) for _ in range(2 * STEPS))
    assert drift.verdict == ()
