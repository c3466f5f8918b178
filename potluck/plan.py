"""Which worker holds which layers: the nouns, frozen and self-checking.

No algorithm: that is coordinator/planner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import NewType

from potluck.errors import PlanError

WorkerId = NewType("WorkerId", str)
COORDINATOR = WorkerId("")  # an end of a link that is no worker

# What handing a step over costs a stage besides bytes and latency: protobuf, crc, two event loops.
# 0.4 to 0.6 ms a stage on loopback (bench/link.py, Zen 3).
HAND_OVER_SECONDS = 0.5e-3

# Where a worker has its weights: in memory, or in files of the cache that are mapped.
WEIGHTS = ("arena", "mmap")

# How activations travel between workers (potluck/wire.py); f32 alone is exact.
WIRES = ("f32", "f16", "q8")
WIRE_Q8_BLOCK = 32  # values of a row that share a scale


@dataclass(frozen=True, slots=True)
class Span:
    """Layers [start, stop) of a model. Never empty; raises PlanError."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise PlanError(f"span [{self.start}, {self.stop}) holds no layer")

    @property
    def n_layers(self) -> int:
        """How many layers the span holds."""
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """How long a machine takes for a layer of some shape and for the head, measured by its probe.

    `seconds[i]` is of one layer for a step of `rows[i]` rows; both rise. Raises PlanError if they
    do not, or if they are no times.
    """

    layer_bytes: int  # weights of the layer that was measured
    rows: tuple[int, ...]  # the first is 1
    seconds: tuple[float, ...]
    head_bytes: int
    head_seconds: float  # norm and head, one row

    def __post_init__(self) -> None:
        pairs = list(pairwise(self.rows))
        if not self.rows or self.rows[0] != 1 or any(a >= b for a, b in pairs):
            raise PlanError(f"layers were timed for steps of {list(self.rows)} rows")
        times = (*self.seconds, self.head_seconds)
        if len(self.seconds) != len(self.rows) or not all(0 < t < inf for t in times):
            raise PlanError(f"{list(times)} are no times of a layer")
        if any(a > b for a, b in pairwise(self.seconds)):
            raise PlanError("more rows took less time")
        if self.layer_bytes < 1 or self.head_bytes < 0:
            raise PlanError(f"a layer of {self.layer_bytes} bytes")


@dataclass(frozen=True, slots=True)
class DiskFigures:
    """The disk with a worker's cache; 0: not measured."""

    free_bytes: int
    read_bytes_per_second: float
    write_bytes_per_second: float


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """One direction between two machines, when nothing else is sent."""

    rtt_seconds: float
    bytes_per_second: float

    def seconds(self, n_bytes: int) -> float:
        """From the first byte's departure to the last one's arrival."""
        return self.rtt_seconds / 2 + n_bytes / self.bytes_per_second


# What a link is taken for until it is measured: gigabit Ethernet, one switch.
GIGABIT = LinkFigures(rtt_seconds=0.6e-3, bytes_per_second=117.5e6)


@dataclass(frozen=True, slots=True)
class Links:
    """Links between workers, and between them and the coordinator, as far as they were measured."""

    default: LinkFigures = GIGABIT
    between: Mapping[tuple[WorkerId, WorkerId], LinkFigures] = field(default_factory=dict)
    hand_over_seconds: float = HAND_OVER_SECONDS

    def of(self, source: WorkerId, target: WorkerId) -> LinkFigures:
        """From `source` to `target`; what only the other direction is known of is as fast."""
        return self.between.get((source, target)) or self.between.get(
            (target, source), self.default
        )


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker said of itself at registration; figures measured by its probe."""

    id: WorkerId
    address: str  # host:port of its Worker service
    isa: str
    threads: int
    memory_bytes: int
    memory_free_bytes: int  # that a shard and its KV may take
    read_bytes_per_second: float
    machine: str = ""
    # Weights on its disk: what memory has room for, which is not for them. None: all is in memory.
    room_bytes: int | None = None
    times: LayerTimes | None = None  # None: not measured; read bandwidth tells
    disk: DiskFigures | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """One span of a plan, on its worker."""

    worker: WorkerId
    span: Span
    embeds: bool
    has_head: bool
    memory_bytes: int  # shard, KV budget and scratch
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Stages in pipeline order: each layer once, each worker at most once. Raises PlanError."""

    n_layers: int
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        at = 0
        for stage in self.stages:
            if stage.span.start != at:
                raise PlanError(f"layers {at} to {stage.span.start} lie on no stage or on two")
            at = stage.span.stop
        if at != self.n_layers:
            raise PlanError(f"the plan ends at layer {at} of {self.n_layers}")
        if len({stage.worker for stage in self.stages}) != len(self.stages):
            raise PlanError("a worker stands twice in the plan")
        ends = [(s.embeds, s.has_head) for s in self.stages]
        last = len(ends) - 1
        if ends != [(i == 0, i == last) for i in range(len(ends))]:
            raise PlanError("only the first stage embeds and only the last has the head")
