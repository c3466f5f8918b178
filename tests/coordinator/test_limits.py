"""What people allow workers to be used for."""

from __future__ import annotations

import pytest

from coordinator.limits import WorkerLimits, layer_range, usable
from coordinator.planner import Asked, ModelSizes, plan
from potluck.errors import PlanError
from potluck.plan import WorkerId, WorkerInfo

MB = 1_000_000
SIZES = ModelSizes((10 * MB,) * 12, 0, 0, 1000, 0)


def worker(name: str, speed: float = 10e9, room: int | None = None) -> WorkerInfo:
    memory = 1000 * MB
    return WorkerInfo(
        WorkerId(name), "127.0.0.1:1", "avx2", 2, memory, memory, speed, room_bytes=room
    )


def layers(limits: dict[str, WorkerLimits], *, every_worker: bool = False) -> dict[str, int]:
    fleet = [worker("a", 40e9), worker("b", 20e9), worker("c", 10e9)]
    asked = Asked(64, slowest_weight=0.0, every_worker=every_worker)
    found = plan(
        SIZES, fleet, asked, limits={WorkerId(name): limit for name, limit in limits.items()}
    )
    return {stage.worker: stage.span.n_layers for stage in found.plan.stages}


def test_without_limits_the_fastest_has_everything() -> None:
    assert layers({}) == {"a": 12}


def test_an_excluded_worker_is_in_no_plan() -> None:
    assert layers({"a": WorkerLimits(exclude=True)}) == {"b": 12}
    assert layers({"a": WorkerLimits(exclude=True)}, every_worker=True).keys() == {"b", "c"}
    assert layers({"a": WorkerLimits(layers=(0, 0))}) == {"b": 12}


def test_no_more_layers_than_the_most_go_to_a_worker() -> None:
    assert layers({"a": WorkerLimits(layers=(0, 5))}) in ({"b": 12}, {"a": 5, "b": 7})
    found = layers({"a": WorkerLimits(layers=(0, 5))}, every_worker=True)
    assert found["a"] <= 5
    assert sum(found.values()) == 12


def test_a_least_number_of_layers_makes_a_worker_a_stage() -> None:
    assert layers({"c": WorkerLimits(layers=(2, 12))}) == {"a": 10, "c": 2}
    assert layers({"c": WorkerLimits(layers=(7, 7))}, every_worker=True)["c"] == 7


def test_no_more_memory_than_the_limit_is_planned() -> None:
    found = layers({"a": WorkerLimits(memory_bytes=45 * MB)})
    assert found.get("a", 0) <= 4
    [limited] = usable([worker("a", room=500)], {WorkerId("a"): WorkerLimits(memory_bytes=100)})
    assert (limited.memory_free_bytes, limited.room_bytes) == (100, 100)
    [wide] = usable([worker("a", room=500)], {WorkerId("a"): WorkerLimits(memory_bytes=10**12)})
    assert (wide.memory_free_bytes, wide.room_bytes) == (1000 * MB, 500)  # it never widens


def test_a_limit_of_someone_who_is_not_here_waits() -> None:
    assert layers({"nobody": WorkerLimits(exclude=True)}) == {"a": 12}
    assert layer_range({}, WorkerId("a")) == (1, None)


@pytest.mark.parametrize("wrong", [{"memory_bytes": -1}, {"layers": (5, 4)}, {"layers": (-1, 4)}])
def test_limits_that_nothing_meets_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(PlanError):
        WorkerLimits(**wrong)  # type: ignore[arg-type]  # by field name
