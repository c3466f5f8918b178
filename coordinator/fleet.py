"""Which workers there are, and how each of them is.

Pure: time is an argument, on one monotonic clock. Owned by the engine; only it declares a worker
lost (one judge). A lost worker's next heartbeat is refused, so it registers again and is planned
anew.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from math import inf

from potluck.errors import UnknownWorker, UsageError, WorkerExists
from potluck.plan import WorkerId, WorkerInfo

FORGET_SECONDS = 600.0  # a lost worker stays in `status` so long
_ID = re.compile(r"[a-z0-9-]{1,32}")
_RATE_SAMPLES = 10  # heartbeats: 5 s at 0.5 s each
LOAD_RATE_SECONDS = 5.0  # over which a load's rate is taken


class WorkerState(Enum):
    """One word each, used in status, page, logs and metrics."""

    JOINING = "joining"
    PROBING = "probing"
    FETCHING = "fetching"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"
    QUARANTINED = "quarantined"


PLANNABLE = frozenset(
    {
        WorkerState.JOINING,
        WorkerState.PROBING,
        WorkerState.FETCHING,
        WorkerState.LOADING,
        WorkerState.READY,
    }
)


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """A worker's link to the next stage, as the worker counts it. `to` "" is the coordinator."""

    to: str
    rtt_seconds: float
    sent_bytes: int
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a worker says of itself twice a second."""

    state: WorkerState
    epoch: int = 0  # of its shard; 0: none
    progress: int = 0  # the engine's counter
    memory_free_bytes: int = 0
    resident_bytes: int = 0
    kv_used_bytes: int = 0
    sessions: int = 0
    link: LinkFigures | None = None


@dataclass(frozen=True, slots=True)
class LoadNews:
    """How far a worker's load is. Weights come from other machines first, if they have to."""

    done_bytes: int = 0  # of the span's tensors, packed
    total_bytes: int = 0
    fetched_bytes: int = 0
    fetch_total_bytes: int = 0

    @property
    def is_fetching(self) -> bool:
        """Whether something has to come yet."""
        return self.fetched_bytes < self.fetch_total_bytes

    @property
    def moved_bytes(self) -> int:
        """Rises with every byte that is fetched or packed."""
        return self.fetched_bytes + self.done_bytes

    @property
    def left_bytes(self) -> int:
        """Of what is under way: of the fetching, then of the packing."""
        if self.is_fetching:
            return self.fetch_total_bytes - self.fetched_bytes
        return max(0, self.total_bytes - self.done_bytes)


@dataclass(slots=True)
class WorkerRecord:
    """One registered process. `last_heard` and `progress_at` are on the caller's clock."""

    info: WorkerInfo
    instance: int  # random number of the process
    last_heard: float
    state: WorkerState = WorkerState.JOINING
    heartbeat: Heartbeat = field(default_factory=lambda: Heartbeat(WorkerState.JOINING))
    progress_at: float = 0.0  # when the engine's counter last moved
    load: LoadNews = field(default_factory=LoadNews)  # of the newest one
    ready_epoch: int = 0  # loaded, as its Load call said; 0: not since the newest load began
    lost_why: str = ""
    n_lost: int = 0  # how often a worker of this id was lost
    _sent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RATE_SAMPLES))
    _moved: deque[tuple[float, int]] = field(default_factory=deque)  # of the load: when, bytes

    @property
    def is_usable(self) -> bool:
        """Whether a plan may use it."""
        return self.state in PLANNABLE

    @property
    def link_bytes_per_second(self) -> float:
        """Mean over the newest heartbeats; 0 before the second."""
        if len(self._sent) < 2:
            return 0.0
        (then, before), (now, after) = self._sent[0], self._sent[-1]
        return max(0, after - before) / (now - then) if now > then else 0.0

    def load_bytes_per_second(self, now: float) -> float:
        """What is fetched or packed, over the newest seconds; 0 before the second message.

        If no message comes, the rate falls: `now` counts as one in which nothing has moved.
        """
        if len(self._moved) < 2:
            return 0.0
        (then, before), (newest, after) = self._moved[0], self._moved[-1]
        seconds = (now if now - newest > LOAD_RATE_SECONDS else newest) - then
        return max(0, after - before) / seconds if seconds > 0 else 0.0

    def load_seconds_left(self, now: float) -> float:
        """Until all is fetched, or all is packed; 0: unknown, or nothing is left."""
        rate = self.load_bytes_per_second(now)
        return self.load.left_bytes / rate if rate > 0 else 0.0

    def note_load(self, news: LoadNews, now: float) -> None:
        """Keeps a sample; another load, and packing after fetching, start anew."""
        if news.moved_bytes < self.load.moved_bytes or news.is_fetching != self.load.is_fetching:
            self._moved.clear()
        self.load = news
        self._moved.append((now, news.moved_bytes))
        while now - self._moved[0][0] > LOAD_RATE_SECONDS and len(self._moved) > 2:
            self._moved.popleft()

    def note_link(self, link: LinkFigures | None, now: float) -> None:
        """Keeps a sample of the link's counter; a new link starts anew."""
        if link is None or (self._sent and link.sent_bytes < self._sent[-1][1]):
            self._sent.clear()
        if link is not None:
            self._sent.append((now, link.sent_bytes))


class Fleet:
    """The registered workers, in order of their first registration."""

    def __init__(self) -> None:
        self._workers: dict[WorkerId, WorkerRecord] = {}

    def register(
        self, wished: str, info: WorkerInfo, instance: int, now: float
    ) -> tuple[WorkerId, bool]:
        """Takes a worker in (`info.id` is ignored). Its id, and whether it must be planned anew.

        The second is False only for a repeated call of a process that is here under the same
        address. Raises UsageError for an id that is not [a-z0-9-]{1,32}, WorkerExists if another
        living process has it. A process at the address of an older one has replaced it: a port has
        one owner. Without a wish it gets that one's id, with another wish see `displaced`.
        """
        id = self._id_for(wished, instance, info.address)
        old = self._workers.get(id)
        if old is not None and old.instance != instance and old.is_usable:
            if old.info.address != info.address:
                raise WorkerExists(
                    f"another process is worker {id}, at {old.info.address}",
                    remedy="choose another --name, or stop the other one first",
                )
        elif old is not None and old.instance == instance:
            # What a loaded shard takes is this process's own: its first figure is what it offers.
            free = max(info.memory_free_bytes, old.info.memory_free_bytes)
            room = info.room_bytes
            if room is not None:
                room = max(room, old.info.room_bytes or 0)
            info = replace(info, memory_free_bytes=free, room_bytes=room)
            if old.is_usable and old.info.address == info.address:
                old.last_heard = now
                return id, False
        n_lost = old.n_lost if old is not None else 0
        info = replace(info, id=id)
        self._workers[id] = WorkerRecord(info, instance, now, progress_at=now, n_lost=n_lost)
        return id, True

    def displaced(self, id: WorkerId) -> list[WorkerId]:
        """Usable workers at the address of `id`: it has taken their port, so they are gone."""
        address = self._workers[id].info.address
        return [
            other
            for other, worker in self._workers.items()
            if other != id and worker.is_usable and worker.info.address == address
        ]

    def hear(self, id: WorkerId, instance: int, heartbeat: Heartbeat, now: float) -> None:
        """Notes a heartbeat. Raises UnknownWorker if the process has to register (again)."""
        worker = self._workers.get(id)
        if worker is None or worker.instance != instance or worker.state is WorkerState.LOST:
            raise UnknownWorker(f"worker {id} is not registered", remedy="register again")
        if heartbeat.progress != worker.heartbeat.progress:
            worker.progress_at = now
        worker.note_link(heartbeat.link, now)
        worker.last_heard = now
        worker.heartbeat = heartbeat
        if heartbeat.epoch >= worker.ready_epoch:  # else it was written before the load's end
            worker.state = heartbeat.state

    def leave(self, id: WorkerId, instance: int) -> bool:
        """A worker is about to stop; False if it is not (any more) known under that number."""
        worker = self._workers.get(id)
        if worker is None or worker.instance != instance:
            return False
        del self._workers[id]
        return True

    def lose(self, id: WorkerId, why: str) -> None:
        """Declares a worker lost; an unknown one is no error."""
        worker = self._workers.get(id)
        if worker is not None:
            worker.n_lost += worker.state is not WorkerState.LOST
            worker.state = WorkerState.LOST
            worker.lost_why = why

    def overdue(self, now: float, patience_seconds: float) -> list[WorkerId]:
        """Usable workers unheard for longer than `patience_seconds`.

        Forgets those lost long ago.
        """
        for id, worker in list(self._workers.items()):
            if worker.state is WorkerState.LOST and now - worker.last_heard > FORGET_SECONDS:
                del self._workers[id]
        return [
            id
            for id, worker in self._workers.items()
            if worker.state is not WorkerState.LOST and now - worker.last_heard > patience_seconds
        ]

    def stillest(self, ids: Iterable[WorkerId]) -> tuple[WorkerId, float]:
        """Of `ids`, at least one: whose engine stands still for longest; when one of all moved."""
        moved = {id: w.progress_at if (w := self._workers.get(id)) else -inf for id in ids}
        return min(moved, key=lambda id: moved[id]), max(moved.values())

    def note_load(self, id: WorkerId, news: LoadNews, now: float) -> None:
        """Progress of a load, for people."""
        worker = self._workers.get(id)
        if worker is not None:
            worker.note_load(news, now)
            worker.ready_epoch = 0

    def note_ready(self, ids: Iterable[WorkerId], epoch: int) -> None:
        """These have loaded their spans of `epoch`; their heartbeats will say so a little later."""
        for id in ids:
            worker = self._workers.get(id)
            if worker is not None and worker.is_usable:
                worker.state, worker.ready_epoch = WorkerState.READY, epoch

    def usable(self) -> list[WorkerInfo]:
        """What a plan may use, in order of registration."""
        return [worker.info for worker in self._workers.values() if worker.is_usable]

    def steadiest(self, n_workers: int) -> list[WorkerInfo]:
        """So many of the usable, or all; who was lost more often only if nobody else is there.

        Else a machine that is lost at every load would keep a spare out of the plan for ever. In
        order of registration, so that who stays keeps its layers.
        """
        records = [worker for worker in self._workers.values() if worker.is_usable]
        chosen = sorted(records, key=lambda worker: worker.n_lost)[:n_workers]
        ids = {worker.info.id for worker in chosen}
        return [worker.info for worker in records if worker.info.id in ids]

    def steady(self, n_workers: int) -> list[WorkerInfo]:
        """The usable that were lost no more often than the last of the `n_workers` steadiest."""
        records = [worker for worker in self._workers.values() if worker.is_usable]
        lost = sorted(worker.n_lost for worker in records)
        most = lost[min(n_workers, len(lost)) - 1] if lost else 0
        return [worker.info for worker in records if worker.n_lost <= most]

    def workers(self) -> list[WorkerRecord]:
        """All that are known, lost ones too. To be read only."""
        return list(self._workers.values())

    def _id_for(self, wished: str, instance: int, address: str) -> WorkerId:
        if wished:
            if not _ID.fullmatch(wished):
                raise UsageError(f"worker id {wished!r}: 1 to 32 of a-z, 0-9 and -")
            return WorkerId(wished)
        for id, worker in self._workers.items():
            if worker.instance == instance or worker.info.address == address:
                return id
        number = 1
        while f"w{number}" in self._workers:
            number += 1
        return WorkerId(f"w{number}")
