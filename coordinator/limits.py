"""What people say that workers may be used for.

Pure. A limit narrows what a worker offered and never widens it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from potluck.errors import PlanError
from potluck.plan import WorkerId, WorkerInfo


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """Of one worker. Raises PlanError if nothing could meet them."""

    memory_bytes: int | None = None  # the most of its memory that a plan may take; None: all of it
    # The least and the most; a least above 0 pins it: it is a stage of any plan. None: any number.
    layers: tuple[int, int] | None = None
    exclude: bool = False  # it is never part of a plan

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and self.memory_bytes < 0:
            raise PlanError(f"a limit of {self.memory_bytes} bytes of memory")
        if self.layers is None:
            return
        least, most = self.layers
        if not 0 <= least <= most:
            raise PlanError(f"layers {least} to {most}: the least is above the most, or below 0")


PlanLimits = Mapping[WorkerId, WorkerLimits]

NO_LIMITS = WorkerLimits()


def usable(workers: Sequence[WorkerInfo], limits: PlanLimits) -> list[WorkerInfo]:
    """The workers that may be planned, with the memory that they may give. Raises PlanError.

    A limit for a worker that is not here waits for it.
    """
    found = []
    for worker in workers:
        limit = limits.get(worker.id, NO_LIMITS)
        if limit.exclude or layer_range(limits, worker.id)[1] == 0:
            continue
        most = limit.memory_bytes
        if most is not None:
            room = worker.room_bytes
            worker = replace(
                worker,
                memory_free_bytes=min(worker.memory_free_bytes, most),
                room_bytes=None if room is None else min(room, most),
            )
        found.append(worker)
    if workers and not found:
        raise PlanError("every worker is excluded by limits", remedy="allow one of them")
    return found


def is_pinned(limits: PlanLimits, worker: WorkerId) -> bool:
    """Whether people want it to be a stage."""
    layers = limits.get(worker, NO_LIMITS).layers
    return layers is not None and layers[0] > 0


def layer_range(limits: PlanLimits, worker: WorkerId) -> tuple[int, int | None]:
    """Least and most layers of a worker that is used; None: as many as fit."""
    layers = limits.get(worker, NO_LIMITS).layers
    return (1, None) if layers is None else (max(layers[0], 1), layers[1])
