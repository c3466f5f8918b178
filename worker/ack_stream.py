"""The answering half of a Run stream."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc.aio

from potluck.rpc.v1 import worker_pb2

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

log = logging.getLogger(__name__)


class AckStream:
    """Acknowledgements and failures share it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = asyncio.Lock()  # gRPC takes one write at a time

    async def acknowledge(
        self,
        ack: worker_pb2.StepAck,
        received_at: float,
        moment: Callable[[], Awaitable[None]] | None,
    ) -> None:
        """Waits for the moment and writes; a failure of the same step does not overtake it."""
        async with self._lock:
            if moment is not None:
                await moment()
            ack.held_seconds = time.perf_counter() - received_at
            await self._write(ack)

    async def tell(self, failure: worker_pb2.StepAck) -> None:
        """Writes what comes back unasked."""
        async with self._lock:
            await self._write(failure)

    async def _write(self, ack: worker_pb2.StepAck) -> None:
        try:
            await self._context.write(ack)
        except (grpc.aio.UsageError, grpc.aio.InternalError, asyncio.InvalidStateError) as e:
            # Nobody listens any more: then there is nobody to tell.
            log.debug("an acknowledgement found no reader: %s", e)
