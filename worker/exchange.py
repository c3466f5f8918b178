"""Links between workers are measured: from here when the coordinator asks, and by our echo.

Addresses come from the coordinator and are dialled one after the other; whoever does not answer
costs its deadline and nothing else. No state: every call stands alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from potluck.rpc import echo, options
from potluck.rpc.v1 import worker_pb2, worker_pb2_grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

MOST_TARGETS = 64


class Exchanges(worker_pb2_grpc.WorkerServicer):
    """The two calls of worker.proto; a part of worker.server.Worker."""

    async def Echo(self, request: worker_pb2.EchoRequest, context: Context) -> worker_pb2.EchoReply:
        """The size of what came."""
        n_bytes = len(request.payload)
        if n_bytes > options.ECHO_BYTES:
            found = f"payload: {n_bytes} bytes, expected at most {options.ECHO_BYTES}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, found)
        return worker_pb2.EchoReply(size_bytes=n_bytes)

    async def MeasureLinks(
        self, request: worker_pb2.MeasureLinksRequest, context: Context
    ) -> worker_pb2.MeasureLinksReply:
        """Round trip and rate to each target."""
        n_targets = len(request.targets)
        if n_targets > MOST_TARGETS:
            found = f"targets: {n_targets}, expected at most {MOST_TARGETS}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, found)
        return worker_pb2.MeasureLinksReply(
            links=[await _measured(target) for target in request.targets]
        )


async def _measured(target: worker_pb2.LinkTarget) -> worker_pb2.MeasuredLink:
    link = worker_pb2.MeasuredLink(worker=target.worker)
    if (figures := await echo.measure(target.address)) is not None:
        link.rtt_seconds = figures.rtt_seconds
        link.bytes_per_second = figures.bytes_per_second
    return link
