"""Tensors that are fetched only when packs have to be made of them.

A worker whose packs are on its disk needs no tensors: they may have made way for the packs long
ago. Which packs are missing or damaged turns out in the engine thread, while it maps them, or in
the middle of a step; it waits here while the event loop fetches.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
from collections.abc import Sequence

from potluck.errors import Cancelled
from potluck.gguf import TensorInfo
from potluck.rpc.v1 import worker_pb2
from potluck.tensor_store import TensorStore
from worker.fetching import Fetching
from worker.sources import open_sources

log = logging.getLogger(__name__)

# Without a byte from anybody in the middle of a step, which then fails: people wait for it, and
# whoever sends weights has been there when they were loaded.
STEP_AWAY_SECONDS = 5.0


class LateTensors:
    """Of one shard. `bring` and `release` are for the engine thread, the rest for the event loop,
    in which it is made.
    """

    def __init__(self, request: worker_pb2.LoadRequest, own_name: str, store: TensorStore) -> None:
        self.fetched_bytes = 0  # of all calls of `bring` that have ended
        self._request = request
        self._own_name = own_name
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._claims = contextlib.ExitStack()
        self._fetching: Fetching | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_stopped = False
        self._is_loaded = False

    @property
    def is_fetching(self) -> bool:
        """Whether the engine thread waits for tensors."""
        return self._task is not None

    @property
    def moved_bytes(self) -> int:
        """That have come from other machines."""
        return self.fetched_bytes + (
            self._fetching.fetched_bytes if self._fetching is not None else 0
        )

    @property
    def left_bytes(self) -> int:
        """That still have to come, as far as it is known."""
        return self._fetching.left_bytes if self._fetching is not None else 0

    def bring(self, tensors: Sequence[TensorInfo]) -> None:
        """Returns when these are in the store, where they stay until `release`.

        Raises ModelError and Full as Fetching.bring; Cancelled: stopped.
        """
        coming = asyncio.run_coroutine_threadsafe(self._bring(tensors), self._loop)
        try:
            coming.result()
        except concurrent.futures.CancelledError:
            raise Cancelled("nobody waits for these weights any more") from None

    def release(self) -> None:
        """What was brought has been read."""
        self._claims.close()

    def end_loading(self) -> None:
        """What is brought from now on is for a step that waits for it."""
        self._is_loaded = True

    def stop(self) -> None:
        """Ends a `bring`, and those that come, until it is renewed."""
        self._is_stopped = True
        if self._task is not None:
            self._task.cancel()

    def renew(self, request: worker_pb2.LoadRequest) -> None:
        """Another epoch with the same shard, and perhaps with others to ask."""
        self._request = request
        self._is_stopped = False

    async def _bring(self, tensors: Sequence[TensorInfo]) -> None:
        if self._is_stopped:
            raise asyncio.CancelledError
        self._task = asyncio.current_task()
        away_seconds = STEP_AWAY_SECONDS if self._is_loaded else None
        try:
            async with open_sources(self._request, self._own_name) as sources:
                self._fetching = Fetching(self._store, sources, self._claims, away_seconds)
                await self._fetching.bring(tensors)
        finally:
            if (fetched := self._fetching) is not None:
                self.fetched_bytes += fetched.fetched_bytes
                log.info("%d bytes came to make packs of", fetched.fetched_bytes)
            self._fetching = self._task = None
