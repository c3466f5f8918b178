"""How fast the link from here to a worker is, by Worker.Echo.

For workers that are asked to measure, and for the coordinator. The round trip is that of 16 KiB,
about what a row of a large model takes; the rate is what 64 times as much takes longer. Both
include the time that gRPC and Python take at the two ends, as activations do.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from typing import Any

import grpc
import grpc.aio

from potluck.errors import Unreachable
from potluck.plan import LinkFigures
from potluck.rpc import options
from potluck.rpc.calls import finished
from potluck.rpc.v1 import worker_pb2, worker_pb2_grpc

SMALL_BYTES = 16 * 1024
LARGE_BYTES = options.ECHO_BYTES
SMALL_EXCHANGES = 7  # that count; one more opens the connection
LARGE_EXCHANGES = 3  # that count; one more lets windows grow

log = logging.getLogger(__name__)


async def measure(address: str) -> LinkFigures | None:
    """From here to the worker at `address` (host:port); None: it does not answer, or not Echo.

    Takes 5 s at most. A link so slow that a large exchange does not end has the rate that it would
    have had if it had ended then.
    """
    small: list[float] = []
    large: list[float] = []
    started = time.perf_counter()
    try:
        async with (
            asyncio.timeout(options.ECHO_SECONDS),
            grpc.aio.insecure_channel(address, options=options.client_options()) as channel,
        ):
            stub = worker_pb2_grpc.WorkerStub(channel)
            for size_bytes, taken, count in (
                (SMALL_BYTES, small, SMALL_EXCHANGES),
                (LARGE_BYTES, large, LARGE_EXCHANGES),
            ):
                request = worker_pb2.EchoRequest(payload=bytes(size_bytes))
                for _ in range(1 + count):
                    taken.append(await _exchange(stub, request))
    except TimeoutError:
        log.debug("%s: the measurement took too long", address)
    except (grpc.aio.AioRpcError, Unreachable) as e:
        log.debug("%s does not echo: %s", address, e)
        return None
    if not small:
        return None
    rtt = statistics.median(small[1:] or small)
    if large:
        least = min(large[1:] or large)
        return LinkFigures(rtt, _rate(least, rtt))
    left = time.perf_counter() - started - sum(small)
    return LinkFigures(rtt, _rate(left, rtt))


async def _exchange(stub: Any, request: worker_pb2.EchoRequest) -> float:
    """Seconds of one. Raises AioRpcError, Unreachable."""
    started = time.perf_counter()
    await finished(stub.Echo(request))
    return time.perf_counter() - started


def _rate(large_seconds: float, small_seconds: float) -> float:
    """Bytes/s by what a large exchange takes longer than a small one; by itself if it does not."""
    longer = large_seconds - small_seconds
    if longer <= 0:
        return LARGE_BYTES / max(large_seconds, 1e-9)
    return (LARGE_BYTES - SMALL_BYTES) / longer
