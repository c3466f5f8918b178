"""Echo and MeasureLinks: what a worker answers, and what it costs when nobody does."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import grpc.aio
import pytest

from potluck.rpc import echo, options
from potluck.rpc.v1 import worker_pb2, worker_pb2_grpc

Rig = Callable[[int], Any]


def target(worker: str, address: str) -> worker_pb2.LinkTarget:
    return worker_pb2.LinkTarget(worker=worker, address=address)


def closed_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


async def test_links_to_other_workers_are_measured(rig: Rig) -> None:
    async with rig(3) as r:
        targets = [target("w1", r.addresses[1]), target("w2", r.addresses[2])]
        started = time.monotonic()
        reply = await r.stub(0).MeasureLinks(worker_pb2.MeasureLinksRequest(targets=targets))
        assert time.monotonic() - started < 2  # 0.02 s on an idle machine
        assert [link.worker for link in reply.links] == ["w1", "w2"]
        for link in reply.links:
            assert 0 < link.rtt_seconds < 1
            assert link.bytes_per_second > 1e6


async def test_who_does_not_answer_has_no_link_and_the_next_one_is_measured(rig: Rig) -> None:
    async with rig(2) as r:
        targets = [target("dead", closed_address()), target("w1", r.addresses[1])]
        reply = await r.stub(0).MeasureLinks(worker_pb2.MeasureLinksRequest(targets=targets))
        assert (reply.links[0].rtt_seconds, reply.links[0].bytes_per_second) == (0, 0)
        assert reply.links[1].rtt_seconds > 0


@pytest.mark.parametrize("address", ["", ":", "127.0.0.1:99999", "\0", "unix:/nowhere", "[::1"])
async def test_an_address_that_is_none_is_not_answered(address: str) -> None:
    assert await echo.measure(address) is None


async def test_a_worker_that_accepts_and_says_nothing_costs_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(options, "ECHO_SECONDS", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        started = time.monotonic()
        assert await echo.measure(f"127.0.0.1:{server.getsockname()[1]}") is None
        assert time.monotonic() - started < 2


class Slow(worker_pb2_grpc.WorkerServicer):
    """Echoes what is small at once, and `seconds` later what is not."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def Echo(self, request: worker_pb2.EchoRequest, context: Any) -> Any:
        if len(request.payload) > echo.SMALL_BYTES:
            await asyncio.sleep(self.seconds)
        return worker_pb2.EchoReply(size_bytes=len(request.payload))


@pytest.mark.parametrize("seconds", [0.05, 30.0])
async def test_a_slow_link_is_as_slow_as_it_is_or_as_the_deadline_tells(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(options, "ECHO_SECONDS", 1.0)
    server = grpc.aio.server(options=options.server_options())
    worker_pb2_grpc.add_WorkerServicer_to_server(Slow(seconds), server)  # type: ignore[abstract]  # echo is enough
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        figures = await echo.measure(f"127.0.0.1:{port}")
    finally:
        await server.stop(None)
    assert figures is not None
    expected = 2**20 / min(seconds, 1.0)
    assert 0.5 * expected < figures.bytes_per_second < 1.5 * expected
    assert figures.rtt_seconds < 0.05


async def test_no_more_than_a_mebibyte_is_echoed(rig: Rig) -> None:
    async with rig(1) as r:
        most = worker_pb2.EchoRequest(payload=bytes(options.ECHO_BYTES))
        assert (await r.stub(0).Echo(most)).size_bytes == options.ECHO_BYTES
        assert (await r.stub(0).Echo(worker_pb2.EchoRequest())).size_bytes == 0
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await r.stub(0).Echo(worker_pb2.EchoRequest(payload=bytes(options.ECHO_BYTES + 1)))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "1048577 bytes" in (refused.value.details() or "")


async def test_no_more_than_64_targets_are_measured(rig: Rig) -> None:
    async with rig(1) as r:
        many = worker_pb2.MeasureLinksRequest(targets=[target("w1", closed_address())] * 65)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await r.stub(0).MeasureLinks(many)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
