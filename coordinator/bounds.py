"""What a set of workers costs at least, for many sets at once.

Pure. What the ends hold beside layers is left out (but for the time of the least head), so no
filling of the set is below its bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coordinator.goal import Way
from coordinator.pool import Floats, Indices, Pool

_HALVINGS = 20  # of the range of slots: to a millionth of it
_SLOTS = 24  # tried when sweep and slot are added up


@dataclass(frozen=True)
class _Sets:
    """Sets [v, classes] of a pool for steps of some rows; classes by rising time of a layer."""

    n_layers: int
    fixed: float
    sets: Indices
    layer: Floats
    least: Floats
    room: Floats
    constant: Floats  # [v]: of a sweep, what does not depend on who has the layers

    def sweep(self, slot: Floats) -> Floats:
        """[v]: the least sweep without a stage slower than `slot` [v]; infinite: there is none."""
        within = np.floor((slot[:, None] - self.fixed) / self.layer + 1e-9)
        most = np.minimum(self.room, within)
        fit = ~((self.sets > 0) & (most < self.least)).any(axis=1)
        extra = self.sets * np.maximum(most - self.least, 0)
        needed = self.sets * self.least
        left = self.n_layers - needed.sum(axis=1)
        until = np.cumsum(extra, axis=1)
        fit &= (left >= 0) & (until[:, -1] >= left)
        counts = needed + np.clip(left[:, None] - until + extra, 0, extra)
        return np.where(fit, self.constant + counts @ self.layer, np.inf)


def cost_bounds(pool: Pool, sets: Indices, way: Way) -> Floats:
    """[v]: a cost that no filling of the set is below; infinite if the layers do not fit.

    `sets` [v, classes] counts workers of each class; each has one at least.
    """
    of = _of(pool, sets, way.rows)
    high = np.full(len(sets), of.fixed + of.room.max() * of.layer.max())
    fastest = of.sweep(high)
    if way.is_sweep_alone:
        return fastest
    least = _least_slots(of, np.zeros(len(sets)), high, way.steps)
    if way.weight == 0:
        return np.where(np.isfinite(fastest), np.maximum(fastest, way.steps * least), np.inf)
    # Between two slots: the sweep of the upper one at least, the slot of the lower.
    lower, found = least, np.full(len(sets), np.inf)
    for part in np.linspace(0, 1, _SLOTS + 1)[1:] ** 2:
        upper = least + (high - least) * part
        found = np.minimum(found, of.sweep(upper) + way.weight * lower)
        lower = upper
    return found


def rough_bounds(pool: Pool, sets: Indices, way: Way) -> Floats:
    """[v]: the same a few percent lower, and in a twentieth of the time."""
    of = _of(pool, sets, way.rows)
    high = np.full(len(sets), of.fixed + of.room.max() * of.layer.max())
    rates = (of.sets / of.layer).sum(axis=1)
    slot = (of.n_layers + of.fixed * rates) / rates  # parts of layers, all stages as slow
    own = np.where(of.sets > 0, of.fixed + of.least * of.layer, 0).max(axis=1)
    return way.costs(of.sweep(high), np.maximum(slot, own))


def _of(pool: Pool, sets: Indices, rows: int) -> _Sets:
    times = pool.times(rows)
    each = np.array([members[0] for members in pool.classes])
    order = np.argsort(times.layer[each], kind="stable")
    each, sets = each[order], sets[:, order]
    stages = sets.sum(axis=1)
    head = np.where(sets > 0, times.head[each], np.inf).min(axis=1)
    constant = stages * pool.fixed_seconds + head + _link_bounds(pool, times.latency, stages)
    return _Sets(
        pool.n_layers,
        pool.fixed_seconds,
        sets,
        times.layer[each],
        pool.least[each],
        pool.rooms[each, 0],
        constant,
    )


def _least_slots(of: _Sets, low: Floats, high: Floats, steps: float) -> Floats:
    """[v]: below it the layers do not fit, or the sweep takes longer than `steps` slots."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        sweep = of.sweep(middle)
        good = sweep <= steps * middle if steps else np.isfinite(sweep)
        low, high = np.where(good, low, middle), np.where(good, middle, high)
    return low


def _link_bounds(pool: Pool, latency: Floats, stages: Indices) -> Floats:
    """[v]: of the way to the first, between, and back."""
    n = len(pool.workers)
    between = latency[:n, :n][~np.eye(n, dtype=np.bool_)]
    least = float(between.min()) if between.size else 0.0
    outer = float(latency[n, :n].min() + latency[:n, n].min())
    return outer + (stages - 1).astype(np.float64) * least
