"""Hostile and broken input, lost neighbours: one clear failure, and the worker lives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from potluck import wire
from potluck.rpc import options
from potluck.rpc.v1 import types_pb2, worker_pb2

Command = types_pb2.KvCommand
DIM = 64
OPEN = Command(open=Command.Open(session=1, max_tokens=64))


def rows(start: int, tokens: list[int], want: int = 0, session: int = 1) -> types_pb2.Rows:
    return types_pb2.Rows(session=session, start_position=start, token_ids=tokens, want_logits=want)


def activation(n_rows: int, seed: int = 0) -> types_pb2.Activation:
    values = np.random.default_rng(seed).normal(size=(n_rows, DIM)).astype(np.float32)
    return wire.to_message(values, wire.F32)


async def second_stage(r: Any) -> Any:
    """A stream to worker 1 as its previous stage has it; session 1 is open there."""
    await r.load((2,))
    call = r.stub(1).Run()
    await call.write(worker_pb2.Step(epoch=1, step=1, commands=[OPEN]))
    assert not (await call.read()).HasField("failure")
    await r.result()
    return call


async def sent(call: Any, step: worker_pb2.Step) -> Any:
    await call.write(step)
    async with asyncio.timeout(10):
        return await call.read()


def damaged(change: Callable[[types_pb2.Activation], Any]) -> types_pb2.Activation:
    message = activation(1)
    change(message)
    return message


BAD_ACTIVATIONS: dict[str, types_pb2.Activation | None] = {
    "checksum": damaged(lambda a: setattr(a, "crc32c", a.crc32c ^ 1)),
    "too few bytes": damaged(lambda a: setattr(a, "values", a.values[:-4])),
    "too many bytes": damaged(lambda a: setattr(a, "values", a.values * 2)),
    "rows": damaged(lambda a: setattr(a, "rows", 2)),
    "rows beyond memory": damaged(lambda a: setattr(a, "rows", 2**32 - 1)),
    "dim": damaged(lambda a: setattr(a, "dim", 32)),
    "no type": damaged(lambda a: setattr(a, "type", 0)),
    "unknown type": damaged(lambda a: a.MergeFromString(b"\x08\x63")),
    "another type": damaged(lambda a: setattr(a, "type", wire.F16)),
    "none": None,
}


@pytest.mark.parametrize("what", BAD_ACTIVATIONS)
async def test_a_wrong_activation_is_refused_and_the_next_right_one_runs(
    rig: Callable[[int], Any], what: str
) -> None:
    async with rig(2) as r:
        call = await second_stage(r)
        bad = worker_pb2.Step(
            epoch=1, step=2, rows=[rows(0, [5], 1)], activation=BAD_ACTIVATIONS[what]
        )
        ack = await sent(call, bad)
        assert (ack.step, ack.failure.code) == (2, types_pb2.FAILURE_CODE_BAD_FRAME)
        assert ack.failure.worker == "w1"
        good = worker_pb2.Step(epoch=1, step=2, rows=[rows(0, [5], 1)], activation=activation(1))
        assert not (await sent(call, good)).HasField("failure")
        assert len((await r.result()).rows[0].picks) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_a_value_that_is_not_finite_fails_the_step_and_names_the_worker(
    rig: Callable[[int], Any], value: float
) -> None:
    async with rig(2) as r:
        call = await second_stage(r)
        values = np.zeros((1, DIM), np.float32)
        values[0, 7] = value
        poisoned = worker_pb2.Step(
            epoch=1,
            step=2,
            rows=[rows(0, [5], 1)],
            activation=wire.to_message(values, wire.F32),
        )
        assert not (await sent(call, poisoned)).HasField("failure")
        result = await r.result()
        assert [(f.worker, f.session, f.code) for f in result.failures] == [
            ("w1", 0, types_pb2.FAILURE_CODE_NOT_FINITE)
        ]
        assert not result.rows
        good = worker_pb2.Step(epoch=1, step=3, rows=[rows(0, [5], 1)], activation=activation(1))
        assert not (await sent(call, good)).HasField("failure")
        assert len((await r.result()).rows) == 1


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (worker_pb2.Step(epoch=0, step=2), types_pb2.FAILURE_CODE_INVALID),
        (worker_pb2.Step(epoch=1, step=0), types_pb2.FAILURE_CODE_INVALID),
        (worker_pb2.Step(epoch=1, step=9), types_pb2.FAILURE_CODE_GAP),
        (worker_pb2.Step(epoch=2, step=2), types_pb2.FAILURE_CODE_GAP),
        (
            worker_pb2.Step(epoch=1, step=2, rows=[rows(0, [1] * 513)]),
            types_pb2.FAILURE_CODE_INVALID,
        ),
        (
            worker_pb2.Step(epoch=1, step=2, activation=activation(1)),
            types_pb2.FAILURE_CODE_BAD_FRAME,
        ),
    ],
)
async def test_a_step_that_can_not_be_is_refused_whole(
    rig: Callable[[int], Any], step: worker_pb2.Step, code: Any
) -> None:
    async with rig(2) as r:
        call = await second_stage(r)
        assert (await sent(call, step)).failure.code == code
        assert not (await sent(call, worker_pb2.Step(epoch=1, step=2))).HasField("failure")


async def test_rows_that_can_not_be_are_named_and_left_out(rig: Callable[[int], Any]) -> None:
    async with rig(1) as r:
        await r.load()
        bad = [
            rows(0, [], session=2),
            rows(0, [1], session=9),
            rows(0, [421], session=3),
            rows(0, [2**32 - 1], session=4),
            rows(5, [1], session=5),
        ]
        opens = [Command(open=Command.Open(session=i, max_tokens=16)) for i in (2, 3, 4, 5)]
        result = await r.run(OPEN, *opens, *bad, rows(0, [1, 2], 1))
        assert [(f.session, f.code) for f in result.failures] == [
            (2, types_pb2.FAILURE_CODE_INVALID),
            (9, types_pb2.FAILURE_CODE_UNKNOWN_SESSION),
            (3, types_pb2.FAILURE_CODE_INVALID),
            (4, types_pb2.FAILURE_CODE_INVALID),
            (5, types_pb2.FAILURE_CODE_POSITION),
        ]
        assert [x.session for x in result.rows] == [1]


async def test_a_step_before_any_load_is_answered(rig: Callable[[int], Any]) -> None:
    async with rig(1) as r:
        await r.dial()
        r.epoch = 1
        ack = await r.send(OPEN)
        assert ack.failure.code == types_pb2.FAILURE_CODE_NOT_LOADED


async def test_bytes_that_are_no_message_end_the_stream_and_not_the_worker(
    rig: Callable[[int], Any],
) -> None:
    async with rig(1) as r:
        await r.load()
        for junk in [
            b"\xff" * 64,
            worker_pb2.Step(epoch=1, step=1, commands=[OPEN]).SerializeToString()[:-1],
        ]:
            raw: Any = r.channels[0].stream_stream("/potluck.rpc.v1.Worker/Run")()
            with pytest.raises(grpc.aio.AioRpcError):
                await talk(raw, junk)
        assert len((await r.run(OPEN, rows(0, [1], 1))).rows) == 1


async def talk(call: Any, message: Any) -> None:
    await call.write(message)
    async with asyncio.timeout(10):
        await call.read()
        await call.read()


async def test_a_message_beyond_the_limit_is_refused(rig: Callable[[int], Any]) -> None:
    async with rig(1) as r:
        await r.load()
        channel = grpc.aio.insecure_channel(r.addresses[0])
        raw: Any = channel.stream_stream("/potluck.rpc.v1.Worker/Run")()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await talk(raw, b"\x00" * (options.MESSAGE_BYTES + 1))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await channel.close()
        await r.run(OPEN)


async def test_a_client_that_goes_away_leaves_the_stage_as_it_is(rig: Callable[[int], Any]) -> None:
    async with rig(2) as r:
        await r.load((2,))
        await r.run(OPEN, rows(0, [1, 2, 3]))
        await r.send(rows(3, [4], 1))
        await r.dial()  # the old stream is cancelled in mid-step
        await r.result()
        assert not (await r.send(rows(3, [4], 1), step=2)).HasField("failure")  # a repeat
        await r.result()
        assert len((await r.run(rows(4, [5], 1))).rows) == 1


async def test_a_lost_next_stage_is_told_upstream_and_a_new_plan_works(
    rig: Callable[[int], Any],
) -> None:
    async with rig(3) as r:
        await r.load((1, 2))
        await r.run(OPEN, rows(0, [1, 2, 3]))
        await r.kill(2)
        ack = await r.ack()  # unasked: the link broke while nothing was under way
        assert (ack.failure.code, ack.failure.worker) == (
            types_pb2.FAILURE_CODE_LINK_LOST,
            "w1",
        )
        await r.load((2,))
        result = await r.run(OPEN, rows(0, [1, 2, 3], 1))
        assert len(result.rows) == 1
        assert not result.failures


async def test_steps_after_a_loss_are_refused_at_once(rig: Callable[[int], Any]) -> None:
    async with rig(2) as r:
        await r.load((2,))
        await r.run(OPEN, rows(0, [1]))
        await r.kill(1)
        assert (await r.ack()).failure.code == types_pb2.FAILURE_CODE_LINK_LOST
        ack = await r.send(rows(1, [2], 1))
        assert (ack.step, ack.failure.code) == (2, types_pb2.FAILURE_CODE_LINK_LOST)


async def test_a_defect_is_told_and_logged_and_the_worker_lives(
    rig: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(1) as r:
        await r.load()
        with monkeypatch.context() as patch:
            patch.setattr("worker.stage._token_ids", lambda step: 1 / 0)
            assert not (await r.send(OPEN)).HasField("failure")
            assert (await r.ack()).failure.code == types_pb2.FAILURE_CODE_INTERNAL
        assert "ZeroDivisionError" in caplog.text
        reply = await r.stub(0).Describe(
            worker_pb2.DescribeRequest(hello=types_pb2.Hello(protocol=1))
        )
        assert reply.loaded.epoch == 1
