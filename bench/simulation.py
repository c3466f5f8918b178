"""A cluster without machines: the real scheduler and sessions over described stages and links.

Event-driven: a heap of times and what happens then; it reads no clock and never sleeps, and the
same input gives the same output. What is real: coordinator.scheduler and coordinator.session, used
as coordinator.engine uses them, and the depth of coordinator.pipeline. What is described: how long
a stage takes for a step, and how long bytes travel. A stage runs its steps one by one, in order,
and sends one while it computes the next; a link sends one message at a time. Left out: failures,
acknowledgements, and whatever else a machine does meanwhile.
"""

from __future__ import annotations

import heapq
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from coordinator.scheduler import Batch, Limits, Scheduler
from coordinator.session import Session, SessionId
from potluck.sampling import Sampling

_SAMPLING = Sampling(temperature=0.0)
_VOCAB = 256  # token ids mean nothing here


@dataclass(frozen=True, slots=True)
class Work:
    """What a step asks of each stage."""

    rows: int
    picks: int  # rows whose logits are wanted
    positions: int  # of KV that are read, all sessions together


@dataclass(frozen=True, slots=True)
class RowCurve:
    """Seconds of a step by its rows: reading the weights and computing rows overlap in part.

    (memory^p + (rows * row)^p)^(1/p); p = 4 resembles kernels that were measured, infinity is the
    limit where whichever is slower hides the other.
    """

    memory_seconds: float  # to read the weights once
    row_seconds: float  # to compute one row
    power: float = 4.0

    def seconds(self, rows: int) -> float:
        """Of a step of so many rows; one without rows is passed on at once."""
        if rows == 0:
            return 0.0
        longer = max(self.memory_seconds, rows * self.row_seconds)
        ratio = min(self.memory_seconds, rows * self.row_seconds) / longer
        return float(longer * (1 + ratio**self.power) ** (1 / self.power))


@dataclass(frozen=True, slots=True)
class SimulatedStage:
    """One stage: its name, and the seconds that it computes for a step."""

    name: str
    seconds: Callable[[Work], float]


@dataclass(frozen=True, slots=True)
class SimulatedLink:
    """One direction between two machines.

    A message of n bytes occupies the medium for n / bytes_per_second and arrives latency_seconds
    later. Links that name the same medium share it, as machines on one Wi-Fi share its air.
    """

    latency_seconds: float
    bytes_per_second: float
    medium: str = ""  # empty: its own


@dataclass(frozen=True, slots=True)
class Pipe:
    """Stages and links as they stand: links[0] from the coordinator, links[-1] back to it."""

    stages: tuple[SimulatedStage, ...]
    links: tuple[SimulatedLink, ...]
    row_bytes: int  # of one row's activation between stages
    step_bytes: int = 200  # of a message besides activations

    def __post_init__(self) -> None:
        if len(self.links) != len(self.stages) + 1:
            raise ValueError(f"{len(self.stages)} stages have {len(self.links)} links")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A person who asks at `at_seconds`."""

    n_prompt: int
    max_tokens: int
    at_seconds: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What happened. Times: seconds since the start."""

    asked_at: dict[SessionId, float] = field(default_factory=dict)
    token_times: dict[SessionId, list[float]] = field(default_factory=dict)
    busy: list[list[tuple[float, float]]] = field(default_factory=list)  # of each stage: from, to
    steps: list[Work] = field(default_factory=list)

    @property
    def first_token_seconds(self) -> float:
        """From asking to the first token; the median of all sessions."""
        waits = [times[0] - self.asked_at[id] for id, times in self.token_times.items()]
        return statistics.median(waits)

    @property
    def window(self) -> tuple[float, float]:
        """While all sessions answer: from the last one's first token to the first one's last."""
        begin = max(times[0] for times in self.token_times.values())
        return begin, min(times[-1] for times in self.token_times.values())

    @property
    def tokens_per_second(self) -> float:
        """All sessions together, while all of them answer. Raises ValueError: they never did."""
        begin, end = self.window
        if end <= begin:
            raise ValueError("the first answer ended before the last one began: ask for more")
        tokens = sum(begin < t <= end for times in self.token_times.values() for t in times)
        return tokens / (end - begin)

    def utilisation(self, stage: int) -> float:
        """Part of the window in which a stage computed."""
        begin, end = self.window
        spans = ((max(start, begin), min(stop, end)) for start, stop in self.busy[stage])
        return sum(max(0.0, stop - start) for start, stop in spans) / (end - begin)


@dataclass(slots=True)
class _Step:
    batch: Batch
    work: Work


class _Simulation:
    """One run. Everything happens in the order of its time, then of its making."""

    def __init__(self, pipe: Pipe, limits: Limits) -> None:
        self.outcome = Outcome(busy=[[] for _ in pipe.stages])
        self._pipe = pipe
        self._scheduler = Scheduler(limits)
        self._sessions: dict[SessionId, Session] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._now = 0.0
        self._n_events = 0
        self._in_flight = 0
        self._waiting: list[deque[_Step]] = [deque() for _ in pipe.stages]
        self._is_busy = [False] * len(pipe.stages)
        self._free_at: dict[str, float] = {}  # of each medium

    def run(self, arrivals: Sequence[Arrival]) -> Outcome:
        for i, arrival in enumerate(arrivals, start=1):
            self._at(arrival.at_seconds, partial(self._ask, SessionId(i), arrival))
        while self._events:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
            if not self._events or self._events[0][0] > self._now:
                self._fill()  # the engine's loop looks once at all that has come
        return self.outcome

    def _at(self, seconds: float, happen: Callable[[], None]) -> None:
        self._n_events += 1
        heapq.heappush(self._events, (seconds, self._n_events, happen))

    def _ask(self, id: SessionId, arrival: Arrival) -> None:
        prompt = [(7 * i + id) % _VOCAB for i in range(arrival.n_prompt)]
        session = Session(id, prompt, arrival.max_tokens, _SAMPLING, frozenset())
        self._scheduler.add(session)
        self._sessions[id] = session
        self.outcome.asked_at[id] = self._now

    def _fill(self) -> None:
        """As coordinator.engine: one step more in flight than there are stages."""
        while self._in_flight <= len(self._pipe.stages):
            batch = self._scheduler.next_batch()
            if batch is None:
                return
            self._in_flight += 1
            step = _Step(batch, work_of(batch))
            self.outcome.steps.append(step.work)
            self._send(0, step)

    def _send(self, link: int, step: _Step) -> None:
        """Over links[link], to the stage of that number, or to the coordinator after the last."""
        line = self._pipe.links[link]
        n_bytes = self._pipe.step_bytes
        if 0 < link < len(self._pipe.stages):
            n_bytes += step.work.rows * self._pipe.row_bytes
        medium = line.medium or f"link {link}"
        start = max(self._now, self._free_at.get(medium, 0.0))
        sent_at = self._free_at[medium] = start + n_bytes / line.bytes_per_second
        self._at(sent_at + line.latency_seconds, lambda: self._arrive(link, step))

    def _arrive(self, place: int, step: _Step) -> None:
        if place == len(self._pipe.stages):
            self._commit(step)
            return
        self._waiting[place].append(step)
        self._compute(place)

    def _compute(self, place: int) -> None:
        if self._is_busy[place] or not self._waiting[place]:
            return
        self._is_busy[place] = True
        step = self._waiting[place].popleft()
        done_at = self._now + self._pipe.stages[place].seconds(step.work)
        self.outcome.busy[place].append((self._now, done_at))
        self._at(done_at, lambda: self._computed(place, step))

    def _computed(self, place: int, step: _Step) -> None:
        self._is_busy[place] = False
        self._send(place + 1, step)
        self._compute(place)

    def _commit(self, step: _Step) -> None:
        """As coordinator.engine commits a step whose every row succeeded."""
        self._in_flight -= 1
        returned = self._scheduler.returned()
        assert returned is step.batch, "links keep order"
        for rows in step.batch.rows:
            session = self._sessions[rows.session]
            session.advance(rows.start, len(rows.tokens))
            if not rows.want_logits:
                continue
            session.push(len(session.tokens), len(session.tokens) % _VOCAB)
            self.outcome.token_times.setdefault(session.id, []).append(self._now)
            if session.is_live:
                self._scheduler.make_ready(session.id)
            else:
                self._scheduler.remove(session.id)


def simulate(pipe: Pipe, limits: Limits, arrivals: Sequence[Arrival]) -> Outcome:
    """Runs until every session has its answer. Raises Full: more of them than places and queue."""
    return _Simulation(pipe, limits).run(arrivals)


def work_of(batch: Batch) -> Work:
    """What a batch asks of a stage: rows, picks, and positions that its sessions attend to."""
    return Work(
        rows=batch.n_rows,
        picks=sum(rows.want_logits for rows in batch.rows),
        positions=sum(rows.start + len(rows.tokens) for rows in batch.rows),
    )
