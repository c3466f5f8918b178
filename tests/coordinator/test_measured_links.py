"""Links are measured before a plan, only the new ones, and never in the way of service."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import grpc
import grpc.aio
import pytest

from coordinator.links import ALL_PAIRS_WORKERS, MeasuredLinks, evened, pairs
from potluck.plan import COORDINATOR, LinkFigures, Links, WorkerId, WorkerInfo
from potluck.rpc import options
from potluck.rpc.v1 import worker_pb2

StartService = Any


def ids(n: int) -> list[WorkerId]:
    return [WorkerId(f"w{i}") for i in range(n)]


def info(worker: Any) -> WorkerInfo:
    return WorkerInfo(WorkerId(worker.name), worker.address, "fake", 1, 2**32, 2**31, 1e10)


async def measured(service: Any) -> Any:
    """All links of its workers, anew."""
    return (
        await MeasuredLinks(Links()).measure([info(worker) for worker in service.workers])
    ).between


@pytest.mark.parametrize("n", range(ALL_PAIRS_WORKERS + 1))
def test_of_a_few_workers_every_pair_is_measured_both_ways(n: int) -> None:
    everyone = ids(n)
    found = list(pairs(everyone))
    assert len(found) == len(set(found)) == n * (n - 1)
    assert all(a != b for a, b in found)


@pytest.mark.parametrize("n", [13, 14, 50, 200])
def test_of_many_workers_each_one_sends_to_three(n: int) -> None:
    everyone = ids(n)
    found = list(pairs(everyone))
    assert len(found) == len(set(found)) == 3 * n
    assert all(a != b for a, b in found)
    ring = set(zip(everyone, [*everyone[1:], everyone[0]], strict=True))
    assert ring <= set(found)


def test_links_that_differ_by_chance_are_equal_and_others_are_not() -> None:
    rtts = [0.21e-3, 3e-3, 0.2e-3, 0.3e-3, 5e-3, 40e-3]
    rates = [9e8, 2e7, 1.1e9, 8e8, 1e7, 3e6]
    between = {
        (WorkerId(str(i)), COORDINATOR): LinkFigures(rtt, rate)
        for i, (rtt, rate) in enumerate(zip(rtts, rates, strict=True))
    }
    found = evened(between)
    assert list(found) == list(between)
    lan, wifi = LinkFigures(0.21e-3, 9e8), LinkFigures(3e-3, 1e7)
    assert list(found.values()) == [lan, wifi, lan, lan, wifi, LinkFigures(40e-3, 3e6)]
    assert evened({}) == {}


async def test_a_plan_knows_the_links_of_its_workers(start_service: StartService) -> None:
    service = await start_service(3)
    between = service.engine.links.between
    assert set(between) == {
        *(("", f"w{i}") for i in (1, 2, 3)),
        *((f"w{i}", f"w{j}") for i in (1, 2, 3) for j in (1, 2, 3) if i != j),
    }
    assert between["w1", "w2"].bytes_per_second == 1e8  # as the fake says
    assert 0 < between["", "w1"].rtt_seconds < 1  # as it is
    status = await service.client.status()
    links = {(link.start, link.end): link.rtt_seconds for link in status.measured_links}
    assert links["w3", "w1"] == 0.001
    assert links["coordinator", "w2"] > 0


async def test_only_what_is_new_is_measured(start_service: StartService) -> None:
    service = await start_service(3)
    a, b, c = service.workers
    meter = service.engine._meter
    assert [len(worker.asked_links) for worker in (a, b, c)] == [1, 1, 1]
    await meter.measure([info(a), info(b), info(c)])
    assert [len(worker.asked_links) for worker in (a, b, c)] == [1, 1, 1]
    old = b.address
    await b.die()
    await b.start()  # another port, so perhaps another machine
    assert b.address != old
    links = await meter.measure([info(a), info(b), info(c)])
    assert a.asked_links[1:] == [["w2"]]
    assert b.asked_links[1:] == [["w3", "w1"]]
    assert len(links.between) == 9
    links = await meter.measure([info(a), info(c)])
    assert len(links.between) == 4


async def test_five_workers_take_less_than_a_second(start_service: StartService) -> None:
    service = await start_service(5)
    started = time.monotonic()
    between = await measured(service)
    assert len(between) == 25
    assert time.monotonic() - started < 1


async def test_workers_of_an_older_release_are_planned_without_links(
    start_service: StartService,
) -> None:
    service = await start_service(2, is_old=True)
    assert dict(service.engine.links.between) == {}
    assert [worker.asked_links for worker in service.workers] == [[], []]


async def test_a_worker_that_measures_nonsense_is_not_believed(
    start_service: StartService,
) -> None:
    service = await start_service(2)
    said: list[dict[str, Any]] = [
        {"worker": "w9", "rtt_seconds": 1.0, "bytes_per_second": 1.0},
        {"worker": "w2", "rtt_seconds": 0.0, "bytes_per_second": 1e9},
        {"worker": "w2", "rtt_seconds": 1.0, "bytes_per_second": math.inf},
        {"worker": "w2", "rtt_seconds": math.nan, "bytes_per_second": 1.0},
        {"worker": "w2", "rtt_seconds": -1.0, "bytes_per_second": 1.0},
    ]

    async def lie(context: Any) -> Any:
        links = [worker_pb2.MeasuredLink(**link) for link in said]
        return worker_pb2.MeasureLinksReply(links=links)

    for worker in service.workers:
        worker.measure_links = lie
    between = await measured(service)
    assert set(between) == {("", "w1"), ("", "w2")}


async def test_a_worker_that_is_gone_or_refuses_costs_its_links_only(
    start_service: StartService,
) -> None:
    service = await start_service(3)
    a, b, c = service.workers

    async def refuse(context: Any) -> None:
        await context.abort(grpc.StatusCode.INTERNAL, "not today")

    a.measure_links = refuse
    gone = WorkerInfo(WorkerId("w4"), "127.0.0.1:1", "fake", 1, 2**32, 2**31, 1e10)
    between = (await MeasuredLinks(Links()).measure([info(a), info(b), info(c), gone])).between
    assert {pair[0] for pair in between} == {"", "w2", "w3"}
    assert not any("w4" in pair for pair in between)


async def test_measuring_ends_at_its_deadline(
    start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await start_service(3)

    async def hang(context: Any) -> None:
        await asyncio.sleep(60)

    for worker in service.workers:
        worker.measure_links = hang
    monkeypatch.setattr(options, "MEASURE_LINKS_SECONDS", 0.3)
    started = time.monotonic()
    between = await measured(service)
    assert time.monotonic() - started < 3
    assert {pair[0] for pair in between} == {""}


async def test_a_worker_that_leaves_meanwhile_is_not_planned(
    start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await start_service(2, wait=False)
    measuring, may_go_on = asyncio.Event(), asyncio.Event()
    measure = MeasuredLinks.measure

    async def wait(self: MeasuredLinks, workers: Any) -> Any:
        measuring.set()
        await may_go_on.wait()
        return await measure(self, workers)

    monkeypatch.setattr(MeasuredLinks, "measure", wait)
    await service.add("w1")
    leaver = await service.add("w2")
    await measuring.wait()
    service.engine.membership.leave(WorkerId("w2"), leaver.instance)
    await leaver.die()
    may_go_on.set()
    await service.add("w3")
    await service.serving()
    assert {stage.worker for stage in service.engine.plan.stages} == {"w1", "w3"}
    assert leaver.loads == []
