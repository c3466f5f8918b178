"""When a stage acknowledges: never before the step it would hold up, never long after."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.worker.test_pipeline import opened, rows, tokens
from worker import ack_stream, stage


async def test_a_step_is_sent_on_before_it_is_acknowledged(
    rig: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "ACK_DELAY_SECONDS", 5.0)  # far longer than a step
    events: list[str] = []
    async with rig(1) as r:
        await r.load()
        send, write = r.workers[0]._stage.link.send, ack_stream.AckStream._write

        async def sent(message: Any, activation_bytes: int = 0) -> None:
            events.append("sent")
            await send(message, activation_bytes)

        async def acknowledged(self: Any, ack: Any) -> None:
            events.append("acknowledged")
            await write(self, ack)

        monkeypatch.setattr(r.workers[0]._stage.link, "send", sent)
        monkeypatch.setattr(ack_stream.AckStream, "_write", acknowledged)
        await r.run(opened(1), rows(1, 0, tokens(3), 1))
        await r.run(rows(1, 3, tokens(1), 1))
    assert events == ["sent", "acknowledged"] * 2


async def test_a_slow_step_is_acknowledged_while_it_is_computed_and_so_is_the_next(
    rig: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    async with rig(1) as r:
        await r.load()
        shard = r.workers[0]._stage.shard
        run = shard.run

        def slow(*args: Any) -> Any:
            assert go.wait(30)
            return run(*args)

        monkeypatch.setattr(shard, "run", slow)
        ack = await r.send(opened(1), rows(1, 0, tokens(3), 1))
        assert (ack.step, ack.HasField("failure")) == (1, False)
        monkeypatch.setattr(stage, "ACK_DELAY_SECONDS", 3600.0)  # the next one may not wait for it
        ack = await r.send(rows(1, 3, tokens(1), 1))
        assert (ack.step, ack.HasField("failure")) == (2, False)
        assert r.fleet.results.empty()
        go.set()
        assert [(await r.result()).step for _ in range(2)] == [1, 2]


async def test_a_refusal_is_told_at_once(
    rig: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "ACK_DELAY_SECONDS", 3600.0)
    async with rig(1) as r:
        await r.load()
        async with asyncio.timeout(5):
            ack = await r.send(opened(1), rows(1, 0, tokens(1)), step=9)
        assert ack.failure.code
