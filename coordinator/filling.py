"""How many layers each worker of a set gets, for every bound on the slowest stage.

Pure. Layers are alike, so a stage's time is a straight line of their count: for given workers, ends
and bound, giving each its least and the rest to whoever is cheapest a layer is the fastest sweep.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from coordinator.goal import Way
from coordinator.pool import EMBEDS, HAS_HEAD, Floats, Indices, Pool

_CELLS = 100_000  # values of an array [ends, bounds, stages] at most: a third of a millisecond each


@dataclass(frozen=True, slots=True)
class Filled:
    """One set of workers with its ends and layers."""

    members: tuple[int, ...]  # workers of the pool, rising
    first: int
    last: int
    counts: tuple[int, ...]  # layers of each member
    sweep_seconds: float
    slot_seconds: float
    cost: float


@dataclass(frozen=True)
class Filling:
    """One set of workers with some choices of its ends, for steps of some rows."""

    n_layers: int
    members: Indices  # [k], the cheapest a layer first
    ends: Indices  # [p, 2]: first and last, as places in members
    latency: Floats  # [p]: of all links
    busy: Floats  # [p]: the longest that a link is occupied
    layer: Floats  # [k] seconds
    least: Floats  # [k]
    constant: Floats  # [p, k] seconds of a stage without layers
    room: Floats  # [p, k]

    def costs(self, way: Way, ceiling: float) -> Floats:
        """[p]: the least cost for each choice of ends; infinite: none, or above `ceiling`."""
        every = self._bounds(way.most_slot(ceiling))
        if way.is_sweep_alone:
            every = every[-1:]
        found = np.full(len(self.ends), np.inf)
        while len(every):
            tried = self._some(every)
            sweep, slot, _ = self._fill(every[tried])
            costs = way.costs(sweep, slot)  # [p, c]
            found = np.minimum(found, costs.min(axis=1))
            if len(tried) == len(every):
                break
            at = int(np.argmin(costs.min(axis=0)))  # then those beside the best
            low, high = tried[max(at - 1, 0)], tried[min(at + 1, len(tried) - 1)]
            every = every[low : high + 1]
        return found

    def balanced(self, way: Way, limit: float) -> list[Filled]:
        """For each choice of ends the least slot whose cost is `limit` at most, if there is one."""
        return self.balanced_within(self._bounds(way.most_slot(limit)), way, limit)

    def balanced_within(self, bounds: Floats, way: Way, limit: float) -> list[Filled]:
        """The same for slots among `bounds`, which rise."""
        if len(bounds) == 0:
            return []
        tried = self._some(bounds)
        sweep, slot, counts = self._fill(bounds[tried])
        good = way.costs(sweep, slot) <= limit  # [p, c]
        found = []
        for i in map(int, np.flatnonzero(good.any(axis=1))):
            at = int(np.argmax(good[i]))
            if at == 0 or tried[at] - tried[at - 1] == 1:
                found.append(self._filled(i, counts[i, at], sweep[i, at], slot[i, at], way))
            else:  # between two that were tried there are others
                others = bounds[tried[at - 1] + 1 : tried[at] + 1]
                found += self._of_ends(i).balanced_within(others, way, limit)
        return found

    def _bounds(self, high: float) -> Floats:
        """Times up to `high` that a stage can have, rising."""
        starts = np.stack([self.constant.min(axis=0), self.constant.max(axis=0)])  # [2, k]
        layers = np.arange(1, int(self.room.max()) + 1)
        every = np.unique(starts[:, :, None] + self.layer[:, None] * layers)
        return every[every <= high * (1 + 1e-9)]

    def _some(self, bounds: Floats) -> Indices:
        """Places of as many bounds as may be tried at once, both ends with them."""
        most = max(_CELLS // self.room.size, 8)
        if len(bounds) <= most:
            return np.arange(len(bounds))
        return np.linspace(0, len(bounds) - 1, most).round().astype(np.int64)

    def _fill(self, bounds: Floats) -> tuple[Floats, Floats, Floats]:
        """Sweep [p, c], infinite where the layers do not fit, slot [p, c] and layers [p, c, k]."""
        constant, room = self.constant[:, None, :], self.room[:, None, :]
        within = np.floor((bounds[None, :, None] - constant) / self.layer + 1e-9)
        most = np.minimum(room, within)
        fit = (most >= self.least).all(axis=2) & (most.sum(axis=2) >= self.n_layers)
        extra = np.maximum(most - self.least, 0)
        left = self.n_layers - self.least.sum()
        before = np.cumsum(extra, axis=2) - extra
        counts = self.least + np.clip(left - before, 0, extra)
        seconds = constant + counts * self.layer
        sweep = seconds.sum(axis=2) + self.latency[:, None]
        slot = np.maximum(seconds.max(axis=2), self.busy[:, None])
        fit &= left >= 0
        return np.where(fit, sweep, np.inf), slot, counts

    def _of_ends(self, i: int) -> Filling:
        one = slice(i, i + 1)
        return replace(
            self,
            ends=self.ends[one],
            latency=self.latency[one],
            busy=self.busy[one],
            constant=self.constant[one],
            room=self.room[one],
        )

    def _filled(self, i: int, counts: Floats, sweep: float, slot: float, way: Way) -> Filled:
        """Of one choice of ends."""
        order = np.argsort(self.members)
        first, last = self.members[self.ends[i]]
        return Filled(
            tuple(int(m) for m in self.members[order]),
            int(first),
            int(last),
            tuple(int(n) for n in counts[order]),
            float(sweep),
            float(slot),
            float(way.costs(np.array(sweep), np.array(slot))),
        )


def filling_of(
    pool: Pool, members: tuple[int, ...], rows: int, ends: Indices, latency: Floats, busy: Floats
) -> Filling:
    """Of `members` of the pool; `ends` [p, 2] are workers of it, first and last."""
    times = pool.times(rows)
    each = np.array(members)
    by_cost = each[np.argsort(times.layer[each], kind="stable")]
    place = {int(m): i for i, m in enumerate(by_cost)}
    places = np.array([[place[int(a)], place[int(b)]] for a, b in ends], dtype=np.int64)
    p = np.arange(len(places))
    role = np.zeros((len(places), len(by_cost)), dtype=np.int64)
    role[p, places[:, 0]] += EMBEDS
    role[p, places[:, 1]] += HAS_HEAD
    constant = np.full(role.shape, pool.fixed_seconds, dtype=np.float64)
    constant[p, places[:, 1]] += times.head[by_cost][places[:, 1]]
    return Filling(
        pool.n_layers,
        by_cost,
        places,
        latency,
        busy,
        times.layer[by_cost],
        pool.least[by_cost],
        constant,
        pool.rooms[by_cost[None, :], role],
    )
