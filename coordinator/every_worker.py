"""A stage for each worker that is given, so that what people started is what is used.

Pure. Layers are spread so that the slowest stage is as fast as it can be, never over a worker's
memory; the order is the given one unless another makes the slowest stage 3 % faster.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence

from coordinator.layer_times import Speed, speed_of
from coordinator.limits import PlanLimits, layer_range
from coordinator.sizes import ModelSizes, most_layers
from potluck.plan import WorkerId, WorkerInfo

# Ends are tried among so many workers that have most memory or bandwidth: 132 orders of 80 layers
# plan in 20 to 50 ms (Zen 3), and a machine that is neither large nor fast makes no good end.
_ENDS_TRIED = 12

# Another order than that of registration must gain 3 %: two probes of one machine differ by 2.
_BETTER = 0.97


def spread(
    sizes: ModelSizes, workers: Sequence[WorkerInfo], n_positions: int, limits: PlanLimits
) -> list[tuple[WorkerInfo, int]] | None:
    """Workers in pipeline order and their layers: the least slowest stage, the given order among
    near equals. None: no room for the KV of so many positions.
    """
    found: tuple[float, list[tuple[WorkerInfo, int]]] | None = None
    speeds = {worker.id: speed_of(sizes, worker) for worker in workers}
    for order in _orders(workers):
        counts = _counts(sizes, order, speeds, n_positions, limits)
        if counts is None:
            continue
        slowest = max(_seconds(speeds, order, i, count) for i, count in enumerate(counts))
        if found is None or slowest < found[0] * _BETTER:
            found = slowest, list(zip(order, counts, strict=True))
    return found and found[1]


def in_their_places(
    workers: Sequence[WorkerInfo], stored: Mapping[WorkerId, frozenset[int]], n_layers: int
) -> list[WorkerInfo]:
    """By the first layer that each holds; who holds none where nobody holds any, one after the
    other, or at the end. Else as they registered.
    """
    held = frozenset[int]().union(*(stored.get(worker.id, ()) for worker in workers))
    gaps = iter([i for i in range(n_layers) if i not in held and (i == 0 or i - 1 in held)])
    places = {
        worker.id: min(layers) if (layers := stored.get(worker.id)) else next(gaps, n_layers)
        for worker in workers
    }
    return sorted(workers, key=lambda worker: places[worker.id])


def _orders(workers: Sequence[WorkerInfo]) -> Iterator[list[WorkerInfo]]:
    """As they are given, then every choice of first and last; the rest stay in their order.

    Only the ends differ (embeddings, head), so the order between them changes nothing.
    """
    yield list(workers)
    if len(workers) == 1:
        return
    rank = sorted(
        workers, key=lambda w: (w.memory_free_bytes, w.read_bytes_per_second), reverse=True
    )
    fast = sorted(workers, key=lambda w: w.read_bytes_per_second, reverse=True)
    near = {w.id for w in (*rank[: _ENDS_TRIED // 2], *fast[: _ENDS_TRIED // 2])}
    ends = [w for w in workers if w.id in near]
    for last in reversed(ends):
        for first in ends:
            if first is not last:
                middle = [w for w in workers if w is not first and w is not last]
                yield [first, *middle, last]


def _counts(
    sizes: ModelSizes,
    order: Sequence[WorkerInfo],
    speeds: Mapping[WorkerId, Speed],
    n_positions: int,
    limits: PlanLimits,
) -> list[int] | None:
    """Layers of each stage: the least of each, then one by one to whoever stays fastest; None: no
    room. For equal layers this greedy choice is the least possible slowest stage.
    """
    last = len(order) - 1
    counts, rooms = [], []
    for i, worker in enumerate(order):
        room = most_layers(sizes, worker, n_positions, embeds=i == 0, has_head=i == last)
        least, most = layer_range(limits, worker.id)
        counts.append(least)
        rooms.append(room if most is None else min(room, most))
    n_left = sizes.n_layers - sum(counts)
    if any(n > room for n, room in zip(counts, rooms, strict=True)) or n_left < 0:
        return None
    if sum(rooms) < sizes.n_layers:
        return None
    heap = [
        (_seconds(speeds, order, i, counts[i] + 1), i)
        for i in range(len(order))
        if rooms[i] > counts[i]
    ]
    heapq.heapify(heap)
    for _ in range(n_left):
        _, i = heapq.heappop(heap)
        counts[i] += 1
        if counts[i] < rooms[i]:
            heapq.heappush(heap, (_seconds(speeds, order, i, counts[i] + 1), i))
    return counts


def _seconds(
    speeds: Mapping[WorkerId, Speed], order: Sequence[WorkerInfo], i: int, n_layers: int
) -> float:
    """Time of stage i for one row."""
    speed = speeds[order[i].id]
    return n_layers * speed.seconds[0] + (speed.head_row_seconds if i == len(order) - 1 else 0)
