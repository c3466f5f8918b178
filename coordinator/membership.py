"""Who is here: the fleet with its clock, and those who wait for it.

Doors tell it what workers say, the engine asks it for workers and is told when a worker that it may
be using breaks away. Belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from coordinator.fleet import Fleet, Heartbeat, LoadNews
from potluck.plan import WorkerId, WorkerInfo
from potluck.rpc import options

log = logging.getLogger(__name__)


class Membership:
    """The fleet, changed by calls and by the passing of time.

    `on_break(worker, why)`: it is gone.
    """

    def __init__(
        self, clock: Callable[[], float], on_break: Callable[[WorkerId, str], None]
    ) -> None:
        self.fleet = Fleet()
        self._clock = clock
        self._on_break = on_break
        self.n_changes = 0  # workers that came or went, since start
        self._changed = asyncio.Event()
        self._swept_at = clock()
        self._awake_since = self._swept_at

    def register(self, wished: str, info: WorkerInfo, instance: int) -> WorkerId:
        """A worker is here (again). Raises UsageError, WorkerExists."""
        worker, is_new = self.fleet.register(wished, info, instance, self._clock())
        if is_new:
            log.info("worker %s joined at %s", worker, info.address)
            for gone in self.fleet.displaced(worker):
                self.lose(gone, f"worker {worker} has its address now, {info.address}")
            self._on_break(worker, "it started again")
            self._note_change()
        return worker

    def hear(self, worker: WorkerId, instance: int, heartbeat: Heartbeat) -> None:
        """A heartbeat. Raises UnknownWorker."""
        self.fleet.hear(worker, instance, heartbeat, self._clock())

    def note_load(self, worker: WorkerId, news: LoadNews) -> None:
        """A load goes on."""
        self.fleet.note_load(worker, news, self._clock())

    def leave(self, worker: WorkerId, instance: int) -> None:
        """A worker stops."""
        if self.fleet.leave(worker, instance):
            log.info("worker %s left", worker)
            self._on_break(worker, "it has left")
            self._note_change()

    def lose(self, worker: WorkerId, why: str) -> None:
        """Declares a worker lost; it has to register again."""
        log.warning("worker %s is lost: %s", worker, why)
        self.fleet.lose(worker, why)
        self._on_break(worker, why)
        self._note_change()

    def sweep(self) -> None:
        """Declares those lost whose heartbeats stopped. Call it once a heartbeat's interval."""
        now = self._clock()
        if now - self._swept_at > 4 * options.HEARTBEAT_SECONDS:
            self._awake_since = now
        self._swept_at = now
        if now - self._awake_since < options.LOST_SECONDS:
            return  # we were stopped or suspended: workers have to dial again before they are late
        for worker in self.fleet.overdue(now, options.LOST_SECONDS):
            self.lose(worker, f"no heartbeat for {options.LOST_SECONDS:g} s")

    async def enough(self, n_workers: int) -> list[WorkerInfo]:
        """So many usable workers, in order of registration, as soon as they are here."""
        while len(chosen := self.fleet.steadiest(n_workers)) < n_workers:
            await self.change()
        return chosen

    def steady(self, n_workers: int) -> list[WorkerInfo]:
        """All that a plan may choose from when `n_workers` are enough."""
        return self.fleet.steady(n_workers)

    async def change(self, seen: int | None = None) -> None:
        """Returns when a worker has come or gone, since `n_changes` was `seen` or from now on."""
        seen = self.n_changes if seen is None else seen
        while self.n_changes == seen:
            self._changed.clear()
            await self._changed.wait()

    def _note_change(self) -> None:
        self.n_changes += 1
        self._changed.set()
