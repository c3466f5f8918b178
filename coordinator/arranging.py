"""Which of several fillings that are as good as each other is taken, and who stands where in it.

Pure. The better balanced ones first, then what moves the fewest bytes, then the order of
registration: so that planning anew changes little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from coordinator.filling import Filled
from coordinator.pool import Pool
from coordinator.routes import Routes
from coordinator.search import Found
from potluck.plan import WorkerId, WorkerInfo

# Slots that differ by less are the same: two probes of one machine differ by 2 %.
_SAME_SLOT = 1.01
_COMPARED = 200  # fillings at most,
_ROUTES = 30  # if each needs its own order

Order = list[tuple[int, int]]  # workers of the pool and their layers, as they are passed


def arranged(
    pool: Pool, found: Found, layer_bytes: Sequence[int], stored: Mapping[WorkerId, frozenset[int]]
) -> list[tuple[WorkerInfo, int]]:
    """The workers in pipeline order, each with its number of layers."""
    least = min(filled.slot_seconds for filled in found.filled)
    near = [f for f in found.filled if f.slot_seconds <= least * _SAME_SLOT]
    near.sort(key=lambda f: f.cost)
    held = [stored.get(worker.id, frozenset()) for worker in pool.workers]
    times, n = pool.times(found.way.rows), len(pool.workers)
    routes = Routes(times.latency[:n, :n], times.busy[:n, :n])
    most = _COMPARED if pool.has_equal_links else _ROUTES
    orders = [order for f in near[:most] for order in _orders(pool, f, routes, held)]
    best = min(orders, key=lambda order: (_moved(order, layer_bytes, held), _steps_back(order)))
    return [(pool.workers[i], n) for i, n in best]


def _orders(
    pool: Pool, filled: Filled, routes: Routes, held: Sequence[frozenset[int]]
) -> Iterator[Order]:
    """By registration, and, if workers hold layers, by those."""
    counts = dict(zip(filled.members, filled.counts, strict=True))
    if not pool.has_equal_links:
        order = [(i, counts[i]) for i in _route(filled, routes)]
    else:
        ends = filled.first, filled.last
        middle = [(i, counts[i]) for i in filled.members if i not in ends]
        order = [(filled.first, counts[filled.first]), *middle]
        if filled.last != filled.first:
            order.append((filled.last, counts[filled.last]))
    yield order
    if any(held):
        exchanged = _exchanged(pool, order, held)
        yield exchanged
        if pool.has_equal_links:
            middle = sorted(exchanged[1:-1], key=lambda stage: min(held[stage[0]], default=10**9))
            yield [*exchanged[:1], *middle, *exchanged[1:][-1:]]


def _route(filled: Filled, routes: Routes) -> list[int]:
    """The cheapest order over links that are not occupied longer than the slot."""
    order = routes.order(filled.members, filled.first, filled.last)
    slot = filled.slot_seconds * (1 + 1e-9)
    if len(order) > 1 and routes.busy[order[:-1], order[1:]].max() > slot:
        cost = np.where(routes.busy <= slot, routes.cost, np.inf)
        allowed = Routes(cost, routes.busy)
        order = allowed.order(filled.members, filled.first, filled.last)
    return order


def _exchanged(pool: Pool, order: Order, held: Sequence[frozenset[int]]) -> Order:
    """Alike workers change places so that each gets layers that it holds."""
    found = list(order)
    for alike in pool.classes:
        places = [at for at, (i, _) in enumerate(order) if i in alike]
        free = list(alike)
        overlaps = []
        for at in places:
            start = sum(n for _, n in order[:at])
            span = set(range(start, start + order[at][1]))
            overlaps += [(-len(span & held[i]), i != order[at][0], at, i) for i in free]
        open_places = set(places)
        for _, _, at, i in sorted(overlaps):
            if at in open_places and i in free:
                open_places.remove(at)
                free.remove(i)
                found[at] = (i, order[at][1])
    return found


def _moved(order: Order, layer_bytes: Sequence[int], held: Sequence[frozenset[int]]) -> int:
    """Bytes of layers that their worker does not hold yet."""
    start = moved = 0
    for i, n in order:
        if held[i]:
            moved += sum(layer_bytes[j] for j in range(start, start + n) if j not in held[i])
        else:
            moved += sum(layer_bytes[start : start + n])
        start += n
    return moved


def _steps_back(order: Order) -> int:
    """How often a worker stands behind one that registered later."""
    return sum(a > b for (a, _), (b, _) in pairwise(order))
