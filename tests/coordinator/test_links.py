"""Links that end in odd ways, callers that do not read, workers that share a port."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

from coordinator.answer import AnswerText
from coordinator.session import Session, SessionId
from coordinator.stream import AnswerStream, Update
from potluck import errors
from potluck.replies import AnswerOptions
from potluck.rpc import options
from potluck.rpc.v1 import cluster_pb2_grpc, inference_pb2, inference_pb2_grpc
from potluck.sampling import Pick, Sampling

GREEDY = AnswerOptions(max_tokens=8, temperature=0)


class Cancelled:
    """A call that gRPC says was cancelled, though nobody here asked for it."""

    async def read(self) -> Any:
        raise asyncio.CancelledError

    async def write(self, message: Any) -> None:
        raise asyncio.CancelledError

    def cancel(self) -> None:
        pass


async def test_a_cancelled_link_is_lost_and_not_dialled_for_ever(
    start_service: Any, fake: Any
) -> None:
    service = await start_service(workers=1)
    await service.ask([5], GREEDY)
    calls: list[Cancelled] = []

    def dial() -> Cancelled:
        calls.append(Cancelled())
        return calls[-1]

    service.engine.pipeline._stub.Run = dial
    await service.workers[0].break_link()
    await fake.until(lambda: service.engine.epoch == 2, "the pipeline is given up")
    assert 1 <= len(calls) <= 2
    await service.serving()
    assert (await service.ask([5], GREEDY)).ids == fake.answer_to([5], 8)


async def test_a_cancelled_load_is_no_loaded_stage(
    start_service: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potluck.rpc.v1.worker_pb2_grpc.WorkerStub", _Unloadable)
    service = await start_service(workers=1, wait=False)
    await service.add("w1")
    await fake.until(lambda: "w1 was lost" in service.engine.detail(), "told")
    monkeypatch.undo()
    await service.serving()


class _Unloadable:
    def __init__(self, channel: Any) -> None:
        pass

    async def Echo(self, request: Any) -> None:
        raise errors.Unreachable("not today")

    def Load(self, request: Any) -> Cancelled:
        return Cancelled()


async def test_a_link_whose_task_meets_a_defect_is_lost_at_once(
    start_service: Any, fake: Any, caplog: pytest.LogCaptureFixture
) -> None:
    service = await start_service(workers=1)
    await service.ask([5], GREEDY)

    def dial() -> None:
        raise ValueError("a defect")

    service.engine.pipeline._stub.Run = dial
    await service.workers[0].break_link()
    await fake.until(lambda: service.engine.epoch == 2, "the pipeline is given up")
    assert "met a defect" in caplog.text
    await service.serving()


async def test_an_idle_link_may_break_now_and_again(
    start_service: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await start_service(workers=1)
    monkeypatch.setattr("potluck.rpc.options.CALL_SECONDS", 0.0)  # so long it has to hold
    for _ in range(3):
        run, service.workers[0]._run = service.workers[0]._run, None
        if run is None:
            await service.ask([5], GREEDY)
            continue
        with pytest.raises(grpc.aio.AbortError):
            await run.abort(grpc.StatusCode.UNAVAILABLE, "the link broke")
        await fake.until(lambda: service.workers[0]._run is not None, "it is dialled again")
    assert service.engine.epoch == 1


async def test_an_idle_results_link_may_break_and_have_nothing_to_bring(
    start_service: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potluck.rpc.options.CONNECT_SECONDS", 0.2)
    service = await start_service(workers=1)
    await service.ask([5], GREEDY)
    pipeline = service.engine.pipeline
    await fake.until(lambda: not pipeline._steps and service.open_sessions == 0, "it is idle")
    last = service.workers[0]
    call, last._next = last._next, None
    call.cancel()
    await fake.until(lambda: pipeline._results_link == 0, "it is noticed")
    again = cluster_pb2_grpc.FleetStub(last._channel).Results()
    await again.wait_for_connection()
    await asyncio.sleep(0.5)
    assert service.engine.epoch == 1
    again.cancel()


async def test_nobody_is_served_for_a_caller_that_does_not_read(
    start_service: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potluck.rpc.options.WRITE_SECONDS", 0.2)
    monkeypatch.setattr("coordinator.stream.PATIENCE_SECONDS", 0.0)  # a message each moment
    service = await start_service(workers=1)
    service.workers[0].may_pass.clear()
    # A window of one message: what others fill with a long answer.
    small = [
        *options.client_options(),
        ("grpc.http2.lookahead_bytes", 1),
        ("grpc.http2.bdp_probe", 0),
    ]
    async with grpc.aio.insecure_channel(service.addresses.public, options=small) as channel:
        request = inference_pb2.GenerateRequest(tokens=inference_pb2.TokenIds(ids=[5]))
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request)
        assert isinstance(await call.read(), inference_pb2.GenerateReply)
        await fake.until(lambda: service.engine.load_counts() == (0, 0), "it is given up", 30.0)
        assert (await service.client.status()).state == "serving"
        with pytest.raises(grpc.aio.AioRpcError, match=r"not read for 0\.2 s"):
            await _read_on(call)
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    service.workers[0].may_pass.set()


async def _read_on(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_slow_reader_gets_a_long_answer_in_bounded_messages() -> None:
    session = Session(SessionId(1), [5], 3000, Sampling(), frozenset())
    stream = AnswerStream(session, AnswerText(_Letters()), 0.0)
    for position in range(1, 3001):
        session.advance(position - 1, 1)
        stream.push(position, Pick(7), 0.0)
    updates: list[Update] = []
    while not updates or updates[-1].ended is None:
        updates.append(await stream.next())
    assert max(len(update.picks) for update in updates) == 1024
    assert sum(len(update.picks) for update in updates) == 3000
    assert [len(update.text) for update in updates] == [1024, 1024, 953]
    assert updates[-1].text.endswith("x!")


class _Letters:
    def push(self, token_id: int, /) -> str:
        return "x"

    def finish(self) -> str:
        return "!"


async def test_a_worker_that_is_started_anew_on_the_same_port_is_one_worker(
    start_service: Any, fake: Any
) -> None:
    service = await start_service(workers=2, wait=False)
    old = await service.add("old")
    await old.registered.wait()
    port = int(old.address.rpartition(":")[2])
    await old.die()
    service.workers.remove(old)
    new = await service.add("new", port=port)
    await new.registered.wait()
    fleet = service.engine.membership.fleet
    assert [worker.id for worker in fleet.usable()] == ["new"]
    other = await service.add("other")
    await other.registered.wait()
    await service.serving()
    assert (await service.ask([5], GREEDY)).ids == fake.answer_to([5], 8)


async def test_after_a_pause_of_ours_workers_have_time_to_dial_again(start_service: Any) -> None:
    service = await start_service(workers=1)
    membership = service.engine.membership
    membership._swept_at -= 60.0  # the pause is noticed; the next sweep comes half a second later
    for record in membership.fleet.workers():
        record.last_heard -= 60.0
    membership.sweep()
    membership.sweep()
    assert [worker.id for worker in membership.fleet.usable()] == ["w1"]


async def test_a_cancelled_answer_is_told_as_such(start_service: Any) -> None:
    service = await start_service(workers=1)
    with pytest.raises(errors.Unreachable, match="cancelled"):
        async for _ in service.client._answer(Cancelled()):
            pass
