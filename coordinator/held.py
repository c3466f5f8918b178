"""Which layers workers have already, so that a new plan leaves them where they are.

Pure. Known is what a worker reported as loaded while this coordinator ran: it is still in its
memory, or on its disk. Both may have been lost since; then it is fetched like anything else.
"""

from __future__ import annotations

from collections.abc import Iterable

from potluck.plan import Plan, WorkerId, WorkerInfo


class HeldLayers:
    """By worker, under its name and its machine's: a name may pass to another machine."""

    def __init__(self) -> None:
        self._layers: dict[tuple[WorkerId, str], frozenset[int]] = {}

    def note(self, plan: Plan, workers: Iterable[WorkerInfo]) -> None:
        """All stages of `plan`, made for `workers`, are loaded."""
        infos = {worker.id: worker for worker in workers}
        for stage in plan.stages:
            key = _key(infos[stage.worker])
            span = range(stage.span.start, stage.span.stop)
            self._layers[key] = self._layers.get(key, frozenset()).union(span)

    def of(self, workers: Iterable[WorkerInfo]) -> dict[WorkerId, frozenset[int]]:
        """Those that have any."""
        return {w.id: layers for w in workers if (layers := self._layers.get(_key(w)))}


def _key(worker: WorkerInfo) -> tuple[WorkerId, str]:
    return worker.id, worker.machine
