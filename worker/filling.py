"""A shard that loads in the engine thread, and what is told of it meanwhile.

Belongs to the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from potluck.errors import Cancelled
from potluck.rpc import options
from potluck.rpc.v1 import worker_pb2
from worker.engine_thread import EngineThread
from worker.shard import Shard

FETCH_NEWS_SECONDS = 0.5  # between two messages while tensors come that packs are made of


async def fill(
    shard: Shard, thread: EngineThread, resident_bytes: int, is_closing: Callable[[], bool]
) -> AsyncGenerator[worker_pb2.LoadProgress, None]:
    """Loads; stops at the next matrix or pack if nobody listens any more, or the worker closes.

    One of them may take minutes on a slow disk: meanwhile the engine's counter tells, and of
    tensors that are fetched for packs, those that have come.
    """
    loop = asyncio.get_running_loop()
    progress: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
    is_given_up = False

    def on_progress(done_bytes: int, matrix: str) -> None:
        if is_given_up or is_closing():
            raise Cancelled("the load was given up")
        loop.call_soon_threadsafe(progress.put_nowait, (done_bytes, matrix))

    loading = thread.run(shard.load, on_progress, resident_bytes)
    loading.add_done_callback(lambda _: progress.put_nowait(None))
    done_bytes, matrix, counted = 0, "", 0
    late = shard.late
    news_seconds = options.LOAD_NEWS_SECONDS if late is None else FETCH_NEWS_SECONDS
    try:
        while True:
            try:
                async with asyncio.timeout(news_seconds):
                    news = await progress.get()
            except TimeoutError:
                if shard.progress == counted and not (late is not None and late.is_fetching):
                    continue
            else:
                if news is None:
                    break
                done_bytes, matrix = news
            counted = shard.progress
            yield _message(shard, done_bytes, matrix)
        await loading
    finally:
        is_given_up = True
        if late is not None and not loading.done():
            late.stop()
        await asyncio.gather(loading, return_exceptions=True)


def _message(shard: Shard, done_bytes: int, matrix: str) -> worker_pb2.LoadProgress:
    late = shard.late
    came, left = (0, 0) if late is None else (late.moved_bytes, late.left_bytes)
    return worker_pb2.LoadProgress(
        done_bytes=done_bytes,
        total_bytes=shard.weights_bytes,
        matrix=matrix,
        fetched_bytes=came,
        fetch_total_bytes=came + left,
    )
