"""Workers that a plan leaves out stay registered, and take the place of one that is lost."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from coordinator import planner
from coordinator.config import Use
from coordinator.limits import WorkerLimits
from coordinator.planner import Planned
from coordinator.report import status_of
from potluck.errors import PlanError
from potluck.plan import WorkerId
from potluck.replies import AnswerOptions
from potluck.rpc import echo
from potluck.rpc.messages import service_of

if TYPE_CHECKING:
    from tests.coordinator.conftest import StartService

BEST = {"use": Use.BEST}


@pytest.fixture(autouse=True)
def equal_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured ones differ by chance on a busy machine, and then who is chosen of equal workers."""

    async def no_echo(address: str) -> None:
        return None

    monkeypatch.setattr(echo, "measure", no_echo)


async def test_a_model_that_one_machine_holds_is_not_split_for_one_answer(
    start_service: StartService,
) -> None:
    service = await start_service(3, settings=BEST)
    report = await service.client.status()
    assert [stage.worker for stage in report.plan] == ["w1"]
    assert report.forecast is not None
    assert report.forecast.spares == ("w2", "w3")
    assert report.forecast.tokens_per_second > 0
    assert report.plan[0].predicted_seconds > 0
    assert [worker.id for worker in report.workers] == ["w1", "w2", "w3"]
    assert not service.workers[1].loads


async def test_a_spare_takes_the_place_of_a_lost_worker_at_once(
    start_service: StartService, fake: SimpleNamespace
) -> None:
    service = await start_service(2, settings=BEST)
    await service.workers[0].die()
    await fake.until(lambda: bool(service.workers[1].loads), "a load on the spare", seconds=20)
    await service.serving()
    answer = await service.ask([1, 5, 9], AnswerOptions(max_tokens=4, temperature=0.0))
    assert answer.ids == fake.answer_to([1, 5, 9], 4)
    report = await service.client.status()
    assert [stage.worker for stage in report.plan] == ["w2"]
    assert report.forecast is not None
    assert report.forecast.spares == ()


async def test_a_spare_that_leaves_disturbs_nobody(
    start_service: StartService, fake: SimpleNamespace
) -> None:
    service = await start_service(2, settings=BEST)
    epoch = service.engine.epoch
    await service.workers[1].die()
    service.engine.membership.lose(WorkerId("w2"), "it died")
    answer = await service.ask([1, 5, 9], AnswerOptions(max_tokens=4, temperature=0.0))
    assert answer.ids == fake.answer_to([1, 5, 9], 4)
    assert service.engine.epoch == epoch
    assert service_of(status_of(service.engine)).forecast.spares == ()  # type: ignore[union-attr]  # it serves


async def test_a_worker_that_comes_later_is_a_spare(start_service: StartService) -> None:
    service = await start_service(1, settings=BEST)
    late = await service.add("late")
    await late.registered.wait()
    report = await service.client.status()
    assert report.forecast is not None
    assert report.forecast.spares == ("late",)


async def test_limits_of_people_hold_in_a_service(
    start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {
        WorkerId("w1"): WorkerLimits(exclude=True),
        WorkerId("w2"): WorkerLimits(None, (2, 2)),
    }
    service = await start_service(3, settings=BEST, limits=limits)
    report = await service.client.status()
    assert "w1" not in [stage.worker for stage in report.plan]


async def test_what_was_measured_is_compared_after_a_hundred_steps(
    start_service: StartService, fake: SimpleNamespace
) -> None:
    service = await start_service(1, settings=BEST)
    for prompt in ([1, 5, 9], [1, 5, 8], [1, 5, 7]):
        await service.ask(prompt, AnswerOptions(max_tokens=40, temperature=0.0, ignore_end=True))
    drift = service.engine.drift
    assert drift is not None
    (stage,) = drift.verdict
    assert stage.measured_seconds == pytest.approx(0.001)  # what the fake worker says
    (line,) = (await service.client.status()).forecast.advice[-1:]  # type: ignore[union-attr]  # it serves
    assert line.startswith("w1 is ")
    assert "slower than predicted (1.0 ms a step" in line


@pytest.mark.parametrize("use", [Use.BEST, Use.ALL])
async def test_who_was_lost_is_taken_again_if_the_steady_ones_can_not_do_it(
    start_service: StartService, fake: SimpleNamespace, use: Use
) -> None:
    """Two hold the model, the third only a layer: it is steady, and no help."""
    most = {"w1": 3, "w2": 3, "w3": 1}
    limits = {WorkerId(id): WorkerLimits(None, (0, n)) for id, n in most.items()}
    service = await start_service(2, settings={"use": use}, limits=limits)
    await (await service.add()).registered.wait()
    epoch = service.engine.epoch
    assert service.engine.spares() == ["w3"]
    service.engine.membership.lose(WorkerId("w2"), "its cable")  # and it registers again
    await fake.until(lambda: service.engine.epoch > epoch, "the end of the epoch")
    await service.serving()
    assert service.engine.spares() == (["w3"] if use is Use.BEST else [])


async def test_who_comes_while_a_plan_is_made_that_fails_is_in_the_next_one(
    start_service: StartService, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await start_service(2, settings=BEST)
    is_here, is_asked = threading.Event(), threading.Event()
    real = planner.plan

    def plan(*args: Any, **others: Any) -> Planned:
        if not is_asked.is_set():
            is_asked.set()
            is_here.wait(10)
            raise PlanError("too little")
        return real(*args, **others)

    monkeypatch.setattr(planner, "plan", plan)
    await service.workers[0].die()
    await fake.until(is_asked.is_set, "a plan")
    late = await service.add("late")
    await late.registered.wait()
    is_here.set()
    await service.serving()
