"""Over how many steps the rows of sessions are spread: from the forecast to the scheduler."""

from __future__ import annotations

from typing import Any

from coordinator.planner import Asked, plan
from coordinator.sizes import ModelSizes
from potluck.plan import WorkerId, WorkerInfo

SIZES = ModelSizes((450_000_000,) * 80, 150_000_000, 220_000_000, 32_768, 100_000_000, 32_768)


def worker(name: str, gb_per_second: float, gib: int) -> WorkerInfo:
    size = gib * 2**30
    return WorkerInfo(WorkerId(name), "", "", 1, size, size, gb_per_second * 1e9)


def test_equal_stages_have_a_step_each_and_a_long_one_has_fewer() -> None:
    equal = [worker(name, 50, 10) for name in "abcd"]
    asked = Asked(256, max_sessions=4, sessions=4, positions=0)
    forecast = plan(SIZES, equal, asked).forecast
    assert [len(forecast.stages), forecast.spread(8)[-1]] == [4, 4]
    unlike = [worker("fast", 60, 28), worker("slow", 50, 13)]
    forecast = plan(SIZES, unlike, asked).forecast
    assert forecast.spread(8)[2] == 1 < len(forecast.stages)
    one_step = max(forecast.sweep_seconds(3), forecast.slot_seconds(3))
    a_step_each = max(forecast.sweep_seconds(2), 2 * forecast.slot_seconds(2))
    assert one_step < a_step_each


def test_spreads_are_counted_for_64_sessions_at_most() -> None:
    forecast = plan(SIZES, [worker("all", 60, 60)], Asked(256)).forecast
    assert forecast.spread(200) == (1,) * 64
    assert forecast.spread(3) == (1,) * 3


async def test_a_service_spreads_rows_as_its_forecast_says(start_service: Any) -> None:
    service = await start_service(workers=2)
    engine = service.engine
    assert engine._scheduler.limits.spread == engine.planned.forecast.spread(
        engine.settings.max_sessions
    )
