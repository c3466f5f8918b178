"""Machines as people describe them, and what the planner takes them for.

Pure. Whoever knows only how fast a machine reads its memory says that; who has measured layers says
so; in between stands the model of two figures, bandwidth and multiply-adds. Reading a description
is coordinator/workers_file.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from coordinator.limits import PlanLimits
from coordinator.sizes import ModelSizes
from potluck.errors import UsageError
from potluck.plan import DiskFigures, LayerTimes, Links, WorkerId, WorkerInfo

# Rows at which the model of two figures is taken; the planner interpolates between them.
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True, slots=True)
class DescribedWorker:
    """One machine; zeros and empty tuples were not said. `where` names it in errors."""

    id: WorkerId
    where: str
    memory_bytes: int = 0  # that shard and KV may take
    room_bytes: int = 0  # of that, memory, if weights are mapped from the disk
    read_bytes_per_second: float = 0.0
    macs_per_second: float = 0.0  # multiply-adds of layers, all threads
    rows: tuple[int, ...] = ()  # of timed steps, rising from 1
    seconds: tuple[float, ...] = ()  # of one layer for so many rows
    layer_bytes: int = 0  # of the layer that was timed
    head_seconds: float = 0.0
    head_bytes: int = 0
    disk: DiskFigures | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """Everything that one file, or one message, says."""

    source: str  # name of the file
    workers: tuple[DescribedWorker, ...] = ()
    limits: PlanLimits = field(default_factory=dict)
    links: Links = field(default_factory=Links)


def workers_of(
    description: Description, sizes: ModelSizes, layer_macs: int
) -> tuple[WorkerInfo, ...]:
    """The machines, for a model of such sizes; `layer_macs`: multiply-adds of a layer and row.

    Raises UsageError for one whose memory or speed is not said.
    """
    return tuple(_info(worker, sizes, layer_macs) for worker in description.workers)


def seconds_of(mem_seconds: float, mac_seconds: float, rows: Sequence[int]) -> list[float]:
    """(mem^4 + (m * mac)^4)^(1/4) for each number m of rows.

    Reading weights and computing overlap, and the longer of the two decides; the fourth power
    rounds the corner. LLaMA-65B in Q4_0, 455 MB a layer at 50 GB/s and 8.1e8 multiply-adds at 6e11
    a second: 1 row 9.1 ms, 8 rows 12.0 ms.
    """
    return [(mem_seconds**4 + (m * mac_seconds) ** 4) ** 0.25 for m in rows]


def _info(worker: DescribedWorker, sizes: ModelSizes, layer_macs: int) -> WorkerInfo:
    if not worker.memory_bytes:
        raise UsageError(
            f"{worker.where}: memory is missing",
            remedy='say what a shard may take there, such as memory = "12 GiB"',
        )
    read = worker.read_bytes_per_second
    if worker.seconds and not read:
        read = (worker.layer_bytes or round(sizes.mean_layer_bytes)) / worker.seconds[0]
    if not read:
        raise UsageError(
            f"{worker.where}: read_gb_per_second or layer_ms is missing",
            remedy="`potluck plan MODEL --describe` on that machine measures both",
        )
    return WorkerInfo(
        id=worker.id,
        address="",
        isa="",
        threads=0,
        memory_bytes=worker.memory_bytes,
        memory_free_bytes=worker.memory_bytes,
        read_bytes_per_second=read,
        machine=worker.id,
        room_bytes=worker.room_bytes or None,
        times=_times(worker, sizes, layer_macs),
        disk=worker.disk,
    )


def _times(worker: DescribedWorker, sizes: ModelSizes, layer_macs: int) -> LayerTimes | None:
    if worker.seconds:
        layer_bytes = worker.layer_bytes or round(sizes.mean_layer_bytes)
        head_bytes = worker.head_bytes or sizes.head_bytes
        return LayerTimes(
            layer_bytes=layer_bytes,
            rows=worker.rows,
            seconds=worker.seconds,
            head_bytes=head_bytes,
            head_seconds=worker.head_seconds or worker.seconds[0] * head_bytes / layer_bytes,
        )
    if not worker.macs_per_second:
        return None
    layer_bytes, read = round(sizes.mean_layer_bytes), worker.read_bytes_per_second
    seconds = seconds_of(layer_bytes / read, layer_macs / worker.macs_per_second, _ROWS)
    return LayerTimes(
        layer_bytes=layer_bytes,
        rows=_ROWS,
        seconds=tuple(seconds),
        head_bytes=sizes.head_bytes,
        head_seconds=sizes.head_bytes / read,
    )
