"""The engine thread: calls in order, errors to whoever waits, nothing kept, an end."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from worker.engine_thread import EngineThread


@pytest.fixture
def thread() -> Iterator[EngineThread]:
    made = EngineThread()
    yield made
    made.close()


async def test_calls_run_one_at_a_time_in_the_order_asked_for(thread: EngineThread) -> None:
    order: list[int] = []
    threads = set()

    def call(i: int) -> int:
        threads.add(threading.get_ident())
        order.append(i)
        return i * i

    assert await asyncio.gather(*(thread.run(call, i) for i in range(50))) == [
        i * i for i in range(50)
    ]
    assert order == list(range(50))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_an_error_reaches_who_waits_and_the_next_call_runs(thread: EngineThread) -> None:
    def fails() -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        await thread.run(fails)
    assert await thread.run(lambda: 7) == 7


async def test_who_stops_waiting_does_not_stop_the_call(thread: EngineThread) -> None:
    begun, go, done = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        assert go.wait(10)
        done.set()

    waiting = asyncio.ensure_future(thread.run(call))
    await asyncio.to_thread(begun.wait, 10)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go.set()
    await thread.run(lambda: None)
    assert done.is_set()


async def test_what_a_call_was_given_is_freed_when_it_returns(thread: EngineThread) -> None:
    class Buffer(np.ndarray):
        pass

    buffer = np.zeros(4).view(Buffer)
    there = weakref.ref(buffer)
    assert await thread.run(lambda array: array.sum(), buffer) == 0
    del buffer
    for _ in range(100):  # the thread lets go just after it has told the event loop
        if there() is None:
            break
        await asyncio.sleep(0.01)
    gc.collect()
    assert there() is None


async def test_a_closed_thread_has_done_what_was_asked_and_takes_no_more() -> None:
    thread = EngineThread()
    first = thread.run(lambda: 1)
    await asyncio.to_thread(thread.close)
    assert await first == 1
    with pytest.raises(RuntimeError, match="closed"):
        await thread.run(lambda: 2)


def test_an_event_loop_that_ended_does_not_end_the_thread(thread: EngineThread) -> None:
    go = threading.Event()

    async def leave() -> None:
        waiting = thread.run(go.wait, 10)
        assert not waiting.done()

    asyncio.run(leave())
    go.set()

    async def stay() -> int:
        return await thread.run(lambda: 3)

    assert asyncio.run(stay()) == 3
