"""A worker goes: what people are told, and how service returns."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import pytest

from coordinator.engine import ServiceState
from potluck import errors
from potluck.replies import AnswerOptions

GREEDY = AnswerOptions(max_tokens=8, temperature=0)
LONG = AnswerOptions(max_tokens=60, temperature=0)
SPANS = ["[0, 2)", "[2, 4)", "[4, 6)"]


async def running(service: Any, fake: Any, n_steps: int = 1) -> asyncio.Task[Any]:
    """An answer that is under way, with a step held in the last stage."""
    last = service.workers[-1]
    last.may_pass.clear()
    before = len(last.steps)
    task = asyncio.create_task(service.ask([5, 6], LONG))
    await fake.until(lambda: len(last.steps) >= before + n_steps, "a step is inside")
    return task


@pytest.mark.parametrize("i", [0, 1, 2])
async def test_a_lost_worker_ends_streams_with_its_layers_named_and_returns(
    start_service: Any, fake: Any, i: int
) -> None:
    service = await start_service(workers=3)
    task = await running(service, fake)
    lost = service.workers[i]
    lost.may_pass.set()
    await lost.die()
    said = rf"layers \[{2 * i}, {2 * i + 2}\) are unserved: worker w{i + 1} was lost"
    with pytest.raises(errors.Unreachable, match=said):
        await task
    await fake.until(lambda: service.engine.state is ServiceState.UNSERVED, "unserved")
    with pytest.raises(errors.Unreachable, match=said):
        await service.ask([5], GREEDY)
    report = await service.client.status()
    assert (report.state, report.workers[i].state) == ("unserved", "lost")
    assert SPANS[i] in report.detail
    assert "2 of 3 workers are here" in report.detail

    for worker in service.workers:
        worker.may_pass.set()
    service.workers.remove(lost)
    await service.add(f"w{i + 1}")
    await service.serving()
    assert (await service.ask([5, 6], GREEDY)).ids == fake.answer_to([5, 6], 8)
    assert (await service.client.status()).epoch == 2
    assert {worker.loads[-1].epoch for worker in service.workers} == {2}
    assert (await service.client.status()).figures.coordinator_activation_bytes == 0


async def test_a_spare_takes_the_place_of_a_lost_worker(start_service: Any, fake: Any) -> None:
    service = await start_service(workers=2)
    spare = await service.add("spare")
    await fake.until(lambda: len(service.engine.membership.fleet.usable()) == 3, "three are here")
    await service.workers[0].die()
    await fake.until(lambda: spare.loads != [], "the spare is planned")
    await service.serving()
    assert (await service.ask([5], GREEDY)).ids == fake.answer_to([5], 8)
    assert len(spare.loads) == 1


async def test_a_link_that_breaks_once_costs_nothing(start_service: Any, fake: Any) -> None:
    service = await start_service(workers=2)
    task = await running(service, fake)
    await service.workers[0].break_link()
    service.workers[1].may_pass.set()
    assert (await task).ids == fake.answer_to([5, 6], 60)
    assert service.engine.epoch == 1


async def test_the_results_link_may_break_once_too(start_service: Any, fake: Any) -> None:
    service = await start_service(workers=1)
    assert (await service.ask([5], GREEDY)).done.answer_tokens == 8
    pipeline = service.engine.pipeline
    pipeline.results_closed()
    pipeline.results_opened()
    assert (await service.ask([5], GREEDY)).done.answer_tokens == 8


async def test_a_last_stage_that_sends_no_more_results_is_lost(
    start_service: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potluck.rpc.options.CONNECT_SECONDS", 0.05)
    service = await start_service(workers=1)
    await service.ask([5], GREEDY)
    service.engine.pipeline.results_closed()
    await fake.until(lambda: service.engine.epoch == 2, "the pipeline is given up")
    await service.serving()  # it was alive, so it registered again


async def test_a_silent_worker_is_lost_and_comes_back(
    start_service: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potluck.rpc.options.LOST_SECONDS", 0.6)
    service = await start_service(workers=2)
    silent = service.workers[1]
    silent.heart.cancel()
    await fake.until(lambda: service.engine.state is ServiceState.UNSERVED, "lost")
    assert "no heartbeat" in service.engine.membership.fleet.workers()[1].lost_why
    silent.heart = asyncio.create_task(silent._beat())
    await service.serving()
    assert (await service.ask([5], GREEDY)).ids == fake.answer_to([5], 8)


async def test_an_overdue_step_blames_the_engine_that_stands_still(
    start_service: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potluck.rpc.options.STEP_FLOOR_SECONDS", 0.2)
    monkeypatch.setattr("potluck.rpc.options.STILL_SECONDS", 1.5)
    service = await start_service(workers=2)
    task = await running(service, fake)
    with pytest.raises(errors.Unreachable, match="unserved"):
        await task
    service.workers[1].may_pass.set()


async def test_a_slow_step_is_no_loss_while_the_engine_moves(
    start_service: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potluck.rpc.options.STEP_FLOOR_SECONDS", 0.2)
    service = await start_service(workers=2)
    task = await running(service, fake)
    monkeypatch.setattr("potluck.rpc.options.LOST_SECONDS", 0.6)
    await asyncio.sleep(1.5)  # overdue, but one phase of a large model on a slow machine takes long
    assert service.engine.state is ServiceState.SERVING
    service.workers[1].may_pass.set()
    assert (await task).done.answer_tokens == 60


async def test_a_worker_that_leaves_ends_service_until_it_is_replaced(
    start_service: Any, fake: Any
) -> None:
    service = await start_service(workers=2)
    leaving = service.workers[0]
    leaving.heart.cancel()
    service.engine.membership.leave(leaving.name, leaving.instance)
    await fake.until(lambda: service.engine.state is ServiceState.UNSERVED, "unserved")
    assert [w.info.id for w in service.engine.membership.fleet.workers()] == ["w2"]
    await service.add("new")
    await service.serving()


async def test_a_worker_that_started_again_is_loaded_again(start_service: Any, fake: Any) -> None:
    service = await start_service(workers=2)
    old = service.workers.pop(0)
    port = int(old.address.rpartition(":")[2])
    await old.die()
    again = await service.add("w1", port=port)
    await fake.until(lambda: again.loads != [], "it is loaded")
    await service.serving()
    assert (await service.ask([5], GREEDY)).ids == fake.answer_to([5], 8)


async def test_a_loss_while_loading_is_told_and_tried_again(start_service: Any, fake: Any) -> None:
    service = await start_service(workers=1, wait=False)
    bad = await service.add("w1", refuse=(grpc.StatusCode.UNAVAILABLE, "going down"))
    await fake.until(lambda: "w1 was lost" in service.engine.detail(), "told")
    assert service.engine.state is not ServiceState.SERVING
    bad.refuse = None
    await service.serving()


async def test_a_worker_that_falls_silent_while_it_loads_is_no_stage(
    start_service: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potluck.rpc.options.LOST_SECONDS", 0.6)
    service = await start_service(workers=1, wait=False)
    worker = await service.add("w1")
    worker.may_load.clear()
    await fake.until(lambda: worker.loads != [], "it loads")
    worker.heart.cancel()
    await fake.until(lambda: not service.engine.membership.fleet.usable(), "it is lost")
    worker.may_load.set()
    await fake.until(lambda: service.engine.epoch == 2, "the plan is given up")
    worker.heart = asyncio.create_task(worker._beat())
    await service.serving()


async def test_people_are_told_that_workers_are_loading(start_service: Any, fake: Any) -> None:
    service = await start_service(workers=1)
    worker = service.workers[0]
    worker.may_load.clear()
    service.engine.membership.lose(worker.name, "for the test")
    await fake.until(lambda: len(worker.loads) == 2, "it loads again")
    report = await service.client.status()
    assert (report.state, report.detail) == ("loading", "the workers are loading their layers")
    assert report.workers[0].load_done_bytes in (50, 100)
    worker.may_load.set()
    await service.serving()


async def test_a_first_plan_that_a_worker_refuses_ends_the_program_with_its_words(
    start_service: Any,
) -> None:
    service = await start_service(workers=1, wait=False)
    words = "the model is not here\nrun `potluck pull`"
    await service.add("w1", refuse=(grpc.StatusCode.FAILED_PRECONDITION, words))
    with pytest.raises(errors.PlanError, match=r"^worker w1: the model is not here$") as refused:
        await service.running
    assert refused.value.remedy == "run `potluck pull`"


async def test_a_later_plan_that_is_refused_leaves_the_service_waiting(
    start_service: Any, fake: Any, caplog: pytest.LogCaptureFixture
) -> None:
    service = await start_service(workers=1)
    await service.workers.pop().die()
    refusal = (grpc.StatusCode.RESOURCE_EXHAUSTED, "needs 5 GiB, has 1")
    small = await service.add("small", refuse=refusal)
    await fake.until(lambda: "needs 5 GiB" in service.engine.detail(), "told")
    assert (await service.client.status()).state == "unserved"
    assert [r for r in caplog.records if r.levelno == logging.ERROR]
    await small.die()
    service.workers.remove(small)
    service.engine.membership.leave(small.name, small.instance)
    await service.add("large")
    await service.serving()


async def test_without_enough_workers_requests_are_refused_with_the_count(
    start_service: Any, fake: Any
) -> None:
    service = await start_service(workers=2, wait=False)
    await service.add("w1")
    await fake.until(lambda: "1 of 2" in service.engine.detail(), "one is here")
    with pytest.raises(errors.Unreachable, match="1 of 2 workers are here"):
        await service.ask([5], GREEDY)
    report = await service.client.status()
    assert (report.state, report.plan, report.expected_workers) == ("waiting", (), 2)


async def test_a_coordinator_that_was_stopped_blames_nobody(start_service: Any) -> None:
    service = await start_service(workers=1)
    membership = service.engine.membership
    membership._swept_at -= 60.0
    for record in membership.fleet.workers():
        record.last_heard -= 60.0
    membership.sweep()
    assert service.engine.state is ServiceState.SERVING
