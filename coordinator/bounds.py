"""What a set of workers costs at least, for many sets at once.

Pure. Ends, memory of the ends and bounds on slots are left out, so no filling is below it.
"""

from __future__ import annotations

import numpy as np

from coordinator.goal import Way
from coordinator.pool import Floats, Indices, Pool


def cost_bounds(pool: Pool, sets: Indices, way: Way) -> Floats:
    """[v]: a cost that no filling of the set is below; infinite if the layers do not fit.

    `sets` [v, classes] counts workers of each class; each has one at least.
    """
    times = pool.times(way.rows)
    of = np.array([members[0] for members in pool.classes])
    layer, least, room = times.layer[of], pool.least[of], pool.rooms[of, 0]
    used = sets > 0
    stages = sets.sum(axis=1)
    head = np.where(used, times.head[of], np.inf).min(axis=1)
    links = _link_bounds(pool, times.latency, stages)
    sweep = stages * pool.fixed_seconds + head + links + _cheapest(pool, sets, layer, least, room)
    # Slots: all stages as slow as each other, with parts of layers, and no head.
    rates = (sets / layer).sum(axis=1)
    overhead = (sets * (pool.fixed_seconds / layer)).sum(axis=1)
    slot = (pool.n_layers + overhead) / rates
    own = pool.fixed_seconds + least * layer
    slot = np.maximum(slot, np.where(used, own, 0).max(axis=1))
    return way.costs(sweep, slot)


def _cheapest(pool: Pool, sets: Indices, layer: Floats, least: Floats, room: Floats) -> Floats:
    """[v]: seconds of all layers, as many as fit on the cheapest; infinite: they do not fit."""
    order = np.argsort(layer, kind="stable")
    extra = (sets * np.maximum(room - least, 0))[:, order]
    needed = (sets * least).sum(axis=1)
    left = pool.n_layers - needed
    before = np.cumsum(extra, axis=1) - extra
    taken = np.clip(left[:, None] - before, 0, extra)
    seconds = (sets * (least * layer)).sum(axis=1) + (taken * layer[order]).sum(axis=1)
    fits = (left >= 0) & (extra.sum(axis=1) >= left) & ~((sets > 0) & (room < least)).any(axis=1)
    return np.where(fits, seconds, np.inf)


def _link_bounds(pool: Pool, latency: Floats, stages: Indices) -> Floats:
    """[v]: of the way to the first, between, and back."""
    n = len(pool.workers)
    between = latency[:n, :n][~np.eye(n, dtype=np.bool_)]
    least = float(between.min()) if between.size else 0.0
    outer = float(latency[n, :n].min() + latency[:n, n].min())
    return outer + (stages - 1).astype(np.float64) * least
