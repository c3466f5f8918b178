"""The one thread of a worker that calls the engine: one call at a time, in the order asked for.

An executor of the standard library would do, but its result passes through two futures and one
more turn of the event loop, in every step of every stage: this thread takes 0.12 ms less a link
(2-core Zen 5, bench/link.py in turns: 0.68 ms of a token become 0.55).
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_Job = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[[], Any]]


class EngineThread:
    """Starts at once; `close` ends it. A process that is told to exit does not wait for it."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def run(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        """What `call` returns or raises. From the event loop. Whoever stops waiting for a call
        does not stop it. Raises RuntimeError after `close`.
        """
        if self._is_closed:
            raise RuntimeError("the engine thread is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        self._jobs.put((loop, future, lambda: call(*args, **kwargs)))
        return future

    def close(self) -> None:
        """Returns when all that was asked for is done. Not from the event loop: that would wait."""
        self._is_closed = True
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            loop, future, call = job
            result, error = None, None
            try:
                result = call()
            except BaseException as e:  # noqa: BLE001 -- whoever waits gets it; this thread goes on
                error = e
            with contextlib.suppress(RuntimeError):  # the loop has ended, and who waited with it
                loop.call_soon_threadsafe(_tell, future, result, error)
            del job, loop, future, call, result, error  # arrays must not live until the next call


def _tell(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
