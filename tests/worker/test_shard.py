"""What the engine thread makes of a step when engine and admission disagree, and of lossy links."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from potluck import wire
from potluck.rpc.v1 import types_pb2, worker_pb2

Command = types_pb2.KvCommand
FULL, INVALID = types_pb2.FAILURE_CODE_FULL, types_pb2.FAILURE_CODE_INVALID
UNKNOWN, POSITION = types_pb2.FAILURE_CODE_UNKNOWN_SESSION, types_pb2.FAILURE_CODE_POSITION


def opened(session: int, max_tokens: int = 64) -> types_pb2.KvCommand:
    return Command(open=Command.Open(session=session, max_tokens=max_tokens))


def rows(session: int, start: int, tokens: list[int], want: int = 0, **more: Any) -> Any:
    return types_pb2.Rows(
        session=session, start_position=start, token_ids=tokens, want_logits=want, **more
    )


def engine_of(r: Any, i: int = 0) -> Any:
    """The engine's own shard, to change it behind our back."""
    return r.workers[i]._stage.shard._loaded


def failures(result: Any) -> list[tuple[int, int]]:
    return [(f.session, f.code) for f in result.failures]


async def test_an_open_that_the_engine_refuses_closes_the_session_everywhere(
    rig: Callable[[int], Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(2) as r:
        await r.load((2,))
        engine_of(r).open(5, 16)
        result = await r.run(opened(5), opened(6), rows(5, 0, [1], 1), rows(6, 0, [1], 1))
        assert failures(result) == [(5, POSITION)]
        assert "the engine refused what was admitted" in caplog.text
        assert [x.session for x in result.rows] == [6]
        assert [w.loaded().sessions for w in r.workers] == [1, 1]
        assert not (await r.run(opened(5), rows(5, 0, [1], 1))).failures


async def test_rows_whose_session_the_engine_lacks_fail_alone(rig: Callable[[int], Any]) -> None:
    async with rig(2) as r:
        await r.load((2,))
        await r.run(*(opened(i) for i in (1, 2, 3)), *(rows(i, 0, [1, 2]) for i in (1, 2, 3)))
        engine_of(r, 1).close(1)
        engine_of(r, 1).truncate(2, 1)
        result = await r.run(*(rows(i, 2, [3], 1) for i in (1, 2, 3)))
        assert failures(result) == [(1, UNKNOWN), (2, POSITION)]
        assert [x.session for x in result.rows] == [3]
        alone = await r.run(opened(4), rows(4, 0, [1, 2, 3], 1))
        assert alone.rows[0].picks[0].token_id == result.rows[0].picks[0].token_id


async def test_sampling_that_leaves_no_token_fails_its_session_alone(
    rig: Callable[[int], Any],
) -> None:
    async with rig(1) as r:
        await r.load()
        nothing = types_pb2.Sampling(refused_ids=range(421))
        result = await r.run(
            opened(1), opened(2), rows(1, 0, [1], 1, sampling=nothing), rows(2, 0, [1], 1)
        )
        assert failures(result) == [(1, INVALID)]
        assert [x.session for x in result.rows] == [2]


async def test_an_error_that_nobody_is_guilty_of_fails_the_step(
    rig: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(1) as r:
        await r.load()
        await r.run(opened(1))
        monkeypatch.setattr("worker.stage._token_ids", lambda step: np.array([999], np.int32))
        result = await r.run(rows(1, 0, [1], 1))
        assert failures(result) == [(0, INVALID)]
        assert not result.rows
        monkeypatch.undo()
        assert not (await r.run(rows(1, 0, [1], 1))).failures


@pytest.mark.parametrize("kind", [wire.F16, wire.Q8])
async def test_lossy_links_are_near_and_smaller(rig: Callable[[int], Any], kind: Any) -> None:
    sampling = types_pb2.Sampling(logprobs=5)
    prompt = rows(1, 0, list(range(20)), 1, sampling=sampling)
    async with rig(2) as r:
        await r.load((2,))
        exact = (await r.run(opened(1), prompt)).rows[0].picks[0]
        sent = (await r.workers[0].heartbeat(1)).link.activation_bytes
        await r.load((2,), wire=kind)
        near = (await r.run(opened(1), prompt)).rows[0].picks[0]
        assert near.token_id == exact.token_id
        assert near.logprob == pytest.approx(exact.logprob, abs=0.05)
        assert near.logprob != exact.logprob
        less = (await r.workers[0].heartbeat(1)).link.activation_bytes
        assert less == 20 * wire.row_bytes(kind, 64) < sent


async def test_what_a_lossy_link_can_not_write_fails_the_step(
    rig: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(2) as r:
        await r.load((2,), wire=wire.F16)
        monkeypatch.setattr(wire, "_F16_MAX", 0.0)
        monkeypatch.setattr(
            np, "isinf", lambda x: np.ones_like(x, dtype=bool)
        )  # every value is now beyond f16
        result = await r.run(opened(1), rows(1, 0, [1], 1))
        monkeypatch.undo()
        assert [(f.worker, f.code) for f in result.failures] == [
            ("w0", types_pb2.FAILURE_CODE_BAD_FRAME)
        ]
        assert not result.rows
        assert not (await r.run(rows(1, 0, [1], 1))).failures


async def test_a_flush_while_nothing_runs_is_no_error(rig: Callable[[int], Any]) -> None:
    async with rig(1) as r:
        await r.stub(0).Cancel(worker_pb2.CancelRequest(epoch=9))
        await r.load()
        await r.stub(0).Cancel(worker_pb2.CancelRequest(epoch=9))
        result = await r.run(opened(1), rows(1, 0, [1], 1))
        assert (len(result.rows), len(result.failures)) == (0, 0)
        r.workers[0].fence(3)  # by heartbeat, and an old one at that
        r.epoch, r.step = 9, 0
        assert len((await r.run(rows(1, 0, [1], 1))).rows) == 1
