"""Layers stay with the workers that have them when a plan is made anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coordinator.every_worker import in_their_places
from coordinator.held import HeldLayers
from potluck.plan import Plan, Span, Stage, WorkerId, WorkerInfo

if TYPE_CHECKING:
    from tests.coordinator.conftest import Service, StartService


def worker(name: str, machine: str = "m") -> WorkerInfo:
    return WorkerInfo(WorkerId(name), "127.0.0.1:1", "isa", 1, 2**30, 2**30, 1e9, machine)


def plan(**spans: tuple[int, int]) -> Plan:
    stages = [
        Stage(WorkerId(name), Span(*span), span[0] == 0, span[1] == 6, 0, 0)
        for name, span in spans.items()
    ]
    return Plan(6, tuple(stages))


def test_what_a_worker_has_loaded_before_is_kept_by_name_and_machine() -> None:
    held = HeldLayers()
    workers = [worker("w1"), worker("w2")]
    held.note(plan(w1=(0, 4), w2=(4, 6)), workers)
    held.note(plan(w2=(0, 3), w1=(3, 6)), workers)
    assert held.of(workers) == {"w1": {0, 1, 2, 3, 4, 5}, "w2": {0, 1, 2, 4, 5}}
    assert held.of([worker("w1", "another"), worker("w3")]) == {}


def test_who_holds_nothing_stands_where_nobody_holds_anything() -> None:
    workers = [worker(f"w{i}") for i in range(1, 6)]
    stored = {"w5": {0, 1}, "w3": {4, 5}, "w1": {8, 9}}
    held = {WorkerId(name): frozenset(layers) for name, layers in stored.items()}

    def placed(n_layers: int = 10) -> list[str]:
        return [w.id for w in in_their_places(workers, held, n_layers)]

    assert placed() == ["w5", "w2", "w3", "w4", "w1"]
    del held[WorkerId("w1")]
    assert placed() == ["w5", "w1", "w3", "w2", "w4"]
    held.clear()
    assert placed() == ["w1", "w2", "w3", "w4", "w5"]
    held |= {w.id: frozenset(range(10)) for w in workers}
    assert placed() == ["w1", "w2", "w3", "w4", "w5"]


async def spans(service: Service) -> dict[str, tuple[int, int]]:
    return {s.worker: s.span for s in (await service.client.status()).plan}


async def test_a_worker_that_comes_back_last_gets_its_layers(
    start_service: StartService, fake: Any
) -> None:
    service = await start_service(3)
    before = await spans(service)
    assert before == {"w1": (0, 2), "w2": (2, 4), "w3": (4, 6)}
    gone = service.workers[0]
    await gone.die()
    service.engine.membership.leave(WorkerId("w1"), gone.instance)
    service.workers.remove(gone)
    await fake.until(lambda: service.engine.epoch == 2, "a new epoch")
    await service.add("w1")
    await service.serving()
    assert await spans(service) == before


async def test_a_spare_gets_the_layers_of_the_lost_and_others_keep_theirs(
    start_service: StartService, fake: Any
) -> None:
    service = await start_service(3)
    await (await service.add("w4")).registered.wait()
    await service.workers[1].die()
    await fake.until(lambda: service.engine.epoch == 2, "a new epoch")
    await service.serving()
    assert await spans(service) == {"w1": (0, 2), "w4": (2, 4), "w3": (4, 6)}
