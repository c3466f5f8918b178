"""Joining, heartbeats, and a coordinator that comes and goes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from potluck.errors import PotluckError
from potluck.rpc.v1 import cluster_pb2, types_pb2
from worker import membership
from worker.membership import Membership


class Member:
    """A worker as membership sees it; counts what it is told."""

    def __init__(self) -> None:
        self.name = ""
        self.epochs: list[int] = []
        self.forgotten: list[bool] = []
        self.n_announced = 0
        self.shapes: list[types_pb2.LayerShape] = []
        self.may_probe = asyncio.Event()
        self.may_probe.set()

    async def probe(self, shape: types_pb2.LayerShape) -> None:
        self.shapes.append(shape)
        await self.may_probe.wait()

    async def resources(self) -> types_pb2.Resources:
        return types_pb2.Resources(machine="here", memory_free_bytes=5)

    async def heartbeat(self, instance: int) -> cluster_pb2.HeartbeatRequest:
        return cluster_pb2.HeartbeatRequest(worker=self.name, instance=instance, steps=9)

    def fence(self, epoch: int) -> None:
        self.epochs.append(epoch)

    async def forget(self, *, epochs: bool) -> None:
        self.forgotten.append(epochs)

    def announce(self) -> None:
        self.n_announced += 1


@asynccontextmanager
async def joined(address: str, name: str = "") -> AsyncIterator[tuple[Member, Membership, Any]]:
    member = Member()
    m = Membership(member, address, "", name, "127.0.0.1:1", member.announce)
    task = asyncio.create_task(m.run())
    try:
        yield member, m, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def soon(awaitable: Any) -> Any:
    async with asyncio.timeout(10):
        return await awaitable


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "BACK_OFF_SECONDS", (0.02, 0.05))


async def test_a_worker_registers_and_its_heart_beats(fleet: Callable[..., Any]) -> None:
    async with fleet() as f, joined(f.address, "pi1") as (member, m, _):
        request = await soon(f.registered.get())
        assert (request.worker, request.address) == ("pi1", "127.0.0.1:1")
        assert (request.hello.protocol, request.resources.memory_free_bytes) == (1, 5)
        f.epoch = 3
        beats = [await soon(f.beats.get()) for _ in range(3)]
        assert {(b.worker, b.instance, b.steps) for b in beats} == {("pi1", request.instance, 9)}
        assert member.epochs[-1] == 3
        assert (member.name, member.n_announced, member.forgotten) == ("pi1", 1, [])
        await m.leave()
        assert f.left == ["pi1"]


async def test_layers_are_timed_between_join_and_register(fleet: Callable[..., Any]) -> None:
    async with fleet() as f:
        f.shape = types_pb2.LayerShape(dim=64)
        async with joined(f.address) as (member, _, _):
            member.may_probe.clear()
            async with asyncio.timeout(10):
                while not member.shapes:  # noqa: ASYNC110  no event says so
                    await asyncio.sleep(0.01)
            assert f.registered.empty()
            member.may_probe.set()
            await soon(f.registered.get())
            assert [shape.dim for shape in member.shapes] == [64]


async def test_a_coordinator_that_asks_for_no_times_gets_none(fleet: Callable[..., Any]) -> None:
    async with fleet() as f, joined(f.address) as (member, _, _):
        await soon(f.registered.get())
        assert member.shapes == []


async def test_the_coordinator_gives_a_name_to_who_has_none(fleet: Callable[..., Any]) -> None:
    async with fleet() as f, joined(f.address) as (member, _, _):
        assert (await soon(f.registered.get())).worker == ""
        await soon(f.beats.get())
        assert member.name == "w7"


async def test_a_forgotten_worker_registers_again_and_forgets_its_sessions(
    fleet: Callable[..., Any],
) -> None:
    async with fleet() as f, joined(f.address, "a") as (member, _, _):
        first = await soon(f.registered.get())
        f.known.clear()
        second = await soon(f.registered.get())
        assert (second.worker, second.instance) == ("a", first.instance)
        assert member.forgotten == [True]
        assert member.n_announced == 1


async def test_a_worker_waits_for_its_coordinator_and_finds_it_again(
    fleet: Callable[..., Any],
) -> None:
    async with fleet() as f:
        port = int(f.address.rpartition(":")[2])
    async with joined(f"127.0.0.1:{port}", "a") as (member, _, task):
        await asyncio.sleep(0.1)  # some tries that nobody hears
        assert not task.done()
        async with fleet(port) as f:
            await soon(f.registered.get())
            await soon(f.beats.get())
        async with fleet(port) as f:  # another process: it knows nobody
            await soon(f.registered.get())
            await soon(f.beats.get())
        assert member.forgotten == [True]
        assert not task.done()


async def test_a_refusal_is_final(fleet: Callable[..., Any]) -> None:
    async with fleet() as f:
        f.refuses = grpc.StatusCode.PERMISSION_DENIED
        async with joined(f.address) as (_, m, task):
            with pytest.raises(ExceptionGroup) as refused:
                await soon(task)
            assert isinstance(refused.value.exceptions[0], PotluckError)
            assert refused.value.exceptions[0].remedy == "be another"
            await m.leave()  # nobody to leave


@pytest.mark.parametrize("name", ["RESOURCE_EXHAUSTED", "CANCELLED", "UNKNOWN", "INTERNAL"])
async def test_a_coordinator_that_has_no_time_for_us_is_asked_again(
    fleet: Callable[..., Any], name: str
) -> None:
    async with fleet() as f:
        f.refuses = grpc.StatusCode[name]
        async with joined(f.address, "a") as (_, _, task):
            await asyncio.sleep(0.1)
            assert not task.done()
            f.refuses = grpc.StatusCode.OK
            await soon(f.registered.get())
            await soon(f.beats.get())


async def test_a_taken_name_may_get_free(
    fleet: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet() as f:
        f.refuses = grpc.StatusCode.ALREADY_EXISTS
        async with joined(f.address) as (_, _, task):
            await asyncio.sleep(0.1)
            assert not task.done()
            f.refuses = grpc.StatusCode.OK
            await soon(f.registered.get())
        f.refuses = grpc.StatusCode.ALREADY_EXISTS
        monkeypatch.setattr(membership, "NAME_TAKEN_SECONDS", 0.1)
        async with joined(f.address) as (_, _, task):
            with pytest.raises(ExceptionGroup):
                await soon(task)


async def test_sessions_are_freed_when_the_coordinator_stays_away(
    fleet: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "LEASE_SECONDS", 0.3)
    async with fleet() as f, joined(f.address, "a") as (member, _, _):
        for _ in range(12):
            await soon(f.beats.get())  # 0.6 s of heartbeats renew the lease
        assert member.forgotten == []
    async with joined(f"127.0.0.1:{closed_port()}", "b") as (member, m, _):
        async with asyncio.timeout(10):
            while not member.forgotten:  # noqa: ASYNC110  no event says so
                await asyncio.sleep(0.01)
        assert member.forgotten == [False]
        await m.leave()


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
