"""A link keeps order, sends again what may be lost, and says when it is lost itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.errors import StageLost
from potluck.rpc import options
from potluck.rpc.v1 import types_pb2, worker_pb2, worker_pb2_grpc
from worker.link import Link, Sending, Window

BAD_FRAME, GAP = types_pb2.FAILURE_CODE_BAD_FRAME, types_pb2.FAILURE_CODE_GAP
INVALID = types_pb2.FAILURE_CODE_INVALID


def step(number: int) -> worker_pb2.Step:
    return worker_pb2.Step(epoch=1, step=number)


class Next(worker_pb2_grpc.WorkerServicer):
    """The next stage: `refuses` maps a step to the codes of its refusals, used up one by one."""

    def __init__(self) -> None:
        self.steps: asyncio.Queue[int] = asyncio.Queue()
        self.refuses: dict[int, list[Any]] = {}
        self.expected = 1
        self.answers = True
        self.breaks_at = 0
        self.n_streams = 0
        self.relay: list[worker_pb2.StepAck] = []

    async def Run(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        self.n_streams += 1
        async for message in request_iterator:
            number = message.step
            if self.breaks_at == number:
                self.breaks_at = 0
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken on purpose")
            codes = self.refuses.get(number, [])
            code = codes.pop(0) if codes else GAP if number > self.expected else None
            ack = worker_pb2.StepAck(epoch=1, step=number)
            if code is None:
                self.expected = max(self.expected, number + 1)
                self.steps.put_nowait(number)
            else:
                ack.failure.CopyFrom(types_pb2.Failure(code=code, worker="w1", message="no"))
            if self.answers:
                yield ack
            while self.relay:
                yield self.relay.pop()

    async def arrived(self, n: int) -> list[int]:
        async with asyncio.timeout(10):
            return [await self.steps.get() for _ in range(n)]


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Link, Next, asyncio.Queue[Any], Any]]:
    """A running link, its next stage, what went back upstream, and the next stage's server."""
    there = Next()  # type: ignore[abstract]  # links call Run only
    server = grpc.aio.server(options=options.server_options())
    worker_pb2_grpc.add_WorkerServicer_to_server(there, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    back: asyncio.Queue[Any] = asyncio.Queue()
    to = worker_pb2.NextStage(worker="w1", address=f"127.0.0.1:{port}")
    link = Link("w0", to, back.put_nowait)
    running = asyncio.create_task(link.run())
    try:
        yield link, there, back, server
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.stop(None)


async def told(back: asyncio.Queue[Any]) -> Any:
    async with asyncio.timeout(10):
        return await back.get()


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not claim():  # noqa: ASYNC110  it has no event to wait for
            await asyncio.sleep(0.005)


async def test_messages_arrive_in_order_and_round_trips_are_measured() -> None:
    async with linked() as (link, there, back, _):
        for number in range(1, 30):
            await link.send(step(number), activation_bytes=100)
        assert await there.arrived(29) == list(range(1, 30))
        await until(lambda: link.wire_seconds > 0)
        assert link.wire_seconds < 1
        figures = link.figures
        assert (figures.to, figures.activation_bytes) == ("w1", 2900)
        assert figures.sent_bytes == sum(step(n).ByteSize() for n in range(1, 30))
        assert back.empty()


async def test_nothing_is_dialled_before_there_is_something_to_send() -> None:
    async with linked() as (link, there, _, _):
        await asyncio.sleep(0)
        assert there.n_streams == 0
        await link.send(step(1))
        assert await there.arrived(1) == [1]


async def test_a_damaged_frame_is_sent_once_more_and_order_is_kept() -> None:
    async with linked() as (link, there, back, _):
        there.refuses = {3: [BAD_FRAME]}
        for number in range(1, 9):
            await link.send(step(number))
        assert await there.arrived(8) == list(range(1, 9))
        assert back.empty()


async def test_a_frame_that_stays_damaged_is_told_upstream() -> None:
    async with linked() as (link, there, back, _):
        there.refuses = {2: [BAD_FRAME, BAD_FRAME]}
        await link.send(step(1))
        await link.send(step(2))
        ack = await told(back)
        assert (ack.step, ack.failure.code, ack.failure.worker) == (2, BAD_FRAME, "w1")


async def test_other_refusals_are_told_at_once() -> None:
    async with linked() as (link, there, back, _):
        there.refuses = {1: [INVALID]}
        await link.send(step(1))
        assert (await told(back)).failure.code == INVALID


async def test_failures_of_later_stages_travel_upstream() -> None:
    async with linked() as (link, there, back, _):
        lost = types_pb2.Failure(code=types_pb2.FAILURE_CODE_LINK_LOST, worker="w5", message="x")
        there.relay = [worker_pb2.StepAck(epoch=1, step=1, failure=lost)]
        await link.send(step(1))
        assert (await told(back)).failure == lost
        await link.send(step(2))
        assert await there.arrived(2) == [1, 2]


async def test_a_broken_stream_is_dialled_again_and_what_was_lost_sent_again() -> None:
    async with linked() as (link, there, back, _):
        there.breaks_at = 3
        for number in range(1, 8):
            await link.send(step(number))
        seen: list[int] = []
        while 7 not in seen:
            seen += await there.arrived(1)
        assert sorted(set(seen)) == list(range(1, 8))
        assert (there.n_streams, link.lost) == (2, None)
        assert back.empty()


async def test_a_dead_next_stage_is_lost_after_the_second_try() -> None:
    async with linked() as (link, there, back, server):
        await link.send(step(1))
        await there.arrived(1)
        await server.stop(None)
        ack = await told(back)
        assert ack.failure.code == types_pb2.FAILURE_CODE_LINK_LOST
        assert (ack.failure.worker, ack.epoch, ack.step) == ("w0", 1, 1)
        assert "worker w1" in ack.failure.message
        with pytest.raises(StageLost, match="is lost"):
            await link.send(step(2))


async def test_a_sender_that_waits_for_room_hears_that_the_link_is_lost() -> None:
    async with linked() as (link, _, back, server):
        await server.stop(None)

        async def send_many() -> None:
            for number in range(1, 99):
                await link.send(step(number))

        with pytest.raises(StageLost):
            await send_many()
        assert (await told(back)).failure.code == types_pb2.FAILURE_CODE_LINK_LOST


async def test_silence_breaks_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "ACK_SECONDS", 0.2)
    async with linked() as (link, there, back, _):
        there.answers = False
        await link.send(step(1))
        assert "no acknowledgement" in (await told(back)).failure.message
        assert there.n_streams == 2


class Model:
    """A receiver takes the next step or one that it has; it refuses what follows a refusal."""

    def __init__(self) -> None:
        self.window = Window()
        self.n_added = 0
        self.arrived: list[int] = []

    def add(self) -> None:
        self.n_added += 1
        self.window.waiting.append(Sending(step(self.n_added), 0))

    def answer(self, *, is_fine: bool) -> None:
        """The oldest message that is under way is acknowledged or refused."""
        if not self.window.unacked:
            return
        oldest = self.window.unacked[0]
        number = oldest.message.step
        assert self.window.is_oldest(1, number)
        is_new = number == len(self.arrived) + 1
        if number <= len(self.arrived) or (is_new and is_fine):
            self.window.acknowledge()
            self.arrived += [number] if is_new else []
        else:
            oldest.was_refused = False  # here tries are not limited
            assert self.window.refuse(may_try_again=True)

    def do(self, event: str) -> None:
        match event:
            case "add":
                self.add()
            case "take":
                self.window.take(0.0)
            case "break":
                self.window.rewind()
            case _:
                self.answer(is_fine=event == "ack")


@given(st.lists(st.sampled_from(["add", "take", "ack", "refuse", "break"]), max_size=80))
def test_a_window_never_loses_and_never_reorders(events: list[str]) -> None:
    model = Model()
    for event in events:
        model.do(event)
    for _ in range(3 * model.n_added + 3):
        model.do("take")
        while model.window.unacked:
            model.do("ack")
    assert model.arrived == list(range(1, model.n_added + 1))
    assert not model.window.is_oldest(1, 1)
