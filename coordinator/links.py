"""How fast the links of the fleet are: measured before a plan, by the workers and from here.

One measurement at a time, so that they don't share a wire; the pipeline is not open then. What
fails is left out, and the planner takes a default for it: no measurement stops the service.
Belongs to the engine's task.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite

import grpc
import grpc.aio

from potluck.errors import Unreachable
from potluck.plan import COORDINATOR, LinkFigures, Links, WorkerId, WorkerInfo
from potluck.rpc import echo, options
from potluck.rpc.calls import finished
from potluck.rpc.v1 import worker_pb2, worker_pb2_grpc

# Of so many workers every pair is measured: 132 links, a second or two on a wire. Of more, enough
# to see which machines have slow links: a stage sends to one other only.
ALL_PAIRS_WORKERS = 12
# Round trips of equal links on one machine differ by half, on an idle one.
EQUAL_WITHIN = 2.0

Pair = tuple[WorkerId, WorkerId]  # from, to

log = logging.getLogger(__name__)


class MeasuredLinks:
    """What was measured between the workers of the newest plan; `otherwise`, what was not."""

    def __init__(self, otherwise: Links) -> None:
        self._otherwise = otherwise
        self._addresses: dict[WorkerId, str] = {}
        self._tried: set[Pair] = set()  # measured or not: not again while both stay where they are
        self._between: dict[Pair, LinkFigures] = {}

    async def measure(self, workers: Sequence[WorkerInfo]) -> Links:
        """The links of these workers, and from here to them; only what is new is measured.

        Takes 10 ms a link on one machine, and MEASURE_LINKS_SECONDS at most.
        """
        self._forget_all_but(workers)
        try:
            async with asyncio.timeout(options.MEASURE_LINKS_SECONDS):
                await self._measure_ours(workers)
                await self._measure_theirs(workers)
        except TimeoutError:
            log.warning("links were measured in part: it took too long")
        return replace(self._otherwise, between=evened(self._between))

    def _forget_all_but(self, workers: Sequence[WorkerInfo]) -> None:
        """Workers that are gone, and those that are elsewhere now."""
        now = {worker.id: worker.address for worker in workers}
        same = {id for id, address in self._addresses.items() if now.get(id) == address}
        same.add(COORDINATOR)
        self._addresses = now
        self._tried = {pair for pair in self._tried if same.issuperset(pair)}
        self._between = {
            pair: figures for pair, figures in self._between.items() if pair in self._tried
        }

    async def _measure_ours(self, workers: Sequence[WorkerInfo]) -> None:
        for worker in workers:
            pair = (COORDINATOR, worker.id)
            if pair in self._tried:
                continue
            self._tried.add(pair)
            figures = await echo.measure(worker.address)
            if figures is None:
                log.info("the link to %s is not measured: no echo", worker.id)
            else:
                self._between[pair] = figures

    async def _measure_theirs(self, workers: Sequence[WorkerInfo]) -> None:
        """Those that echo to us measure their links to each other."""
        here = {worker.id for worker in workers if (COORDINATOR, worker.id) in self._between}
        wanted: dict[WorkerId, list[WorkerId]] = {}
        for pair in pairs([worker.id for worker in workers]):
            if pair not in self._tried and here.issuperset(pair):
                wanted.setdefault(pair[0], []).append(pair[1])
        for source, targets in wanted.items():
            self._tried.update((source, target) for target in targets)
            for link in await _asked(source, targets, self._addresses):
                target = WorkerId(link.worker)
                figures = LinkFigures(link.rtt_seconds, link.bytes_per_second)
                if target in targets and _is_one(figures):
                    self._between[source, target] = figures


def pairs(workers: Sequence[WorkerId]) -> Iterator[Pair]:
    """Which links are measured: all, or of many workers each one's to three others."""
    n = len(workers)
    steps = range(1, n) if n <= ALL_PAIRS_WORKERS else (1, n // 3, n // 2)
    for i, source in enumerate(workers):
        for step in steps:
            yield source, workers[(i + step) % n]


def evened(between: Mapping[Pair, LinkFigures]) -> dict[Pair, LinkFigures]:
    """The links with figures that differ by chance made equal.

    Of equal machines none is better, and a plan that thinks so by a few microseconds would move
    layers about whenever a worker comes back.
    """
    rtts = _evened([link.rtt_seconds for link in between.values()])
    rates = _evened([link.bytes_per_second for link in between.values()])
    return {
        pair: LinkFigures(rtts[link.rtt_seconds], rates[link.bytes_per_second])
        for pair, link in between.items()
    }


def _evened(values: Sequence[float]) -> dict[float, float]:
    """Each value to the median of its group, which spans EQUAL_WITHIN."""
    groups: list[list[float]] = []
    for value in sorted(values):
        if groups and value <= EQUAL_WITHIN * groups[-1][0]:
            groups[-1].append(value)
        else:
            groups.append([value])
    return {value: statistics.median_low(group) for group in groups for value in group}


async def _asked(
    source: WorkerId, targets: Sequence[WorkerId], addresses: Mapping[WorkerId, str]
) -> Sequence[worker_pb2.MeasuredLink]:
    """What `source` measures; nothing if it does not answer or can't."""
    request = worker_pb2.MeasureLinksRequest(
        targets=[worker_pb2.LinkTarget(worker=id, address=addresses[id]) for id in targets]
    )
    deadline = options.ECHO_SECONDS * len(targets) + options.CONNECT_SECONDS
    try:
        async with grpc.aio.insecure_channel(
            addresses[source], options=options.client_options()
        ) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            reply = await finished(stub.MeasureLinks(request, timeout=deadline))
    except (grpc.aio.AioRpcError, Unreachable) as error:
        words = error.details() if isinstance(error, grpc.aio.AioRpcError) else error.message
        log.warning("worker %s did not measure its links: %s", source, words)
        return ()
    return reply.links


def _is_one(figures: LinkFigures) -> bool:
    """Whether a worker measured something: round trip 0 says that nobody answered."""
    values = (figures.rtt_seconds, figures.bytes_per_second)
    return all(isfinite(value) and value > 0 for value in values)
