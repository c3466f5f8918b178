"""Which workers a pipeline is made of, with which ends and how many layers each.

Pure. Sets of workers are looked at from the most promising on: a bound below the cost of a set says
when no other can be better. Up to `_EXACT_SETS` sets the answer is the best there is; in larger
pools the sets are those of the cheapest workers, improved by swapping, adding and dropping one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from coordinator.bounds import cost_bounds
from coordinator.filling import Filled, Filling, filling_of
from coordinator.goal import Goal, Way
from coordinator.moves import promising_sets
from coordinator.pool import Floats, Indices, Pool
from coordinator.routes import EXACT_STAGES, Routes, long_cost

_EXACT_SETS = 1100  # of counts a class: ten unlike workers have 1,023
MOST_EVALUATIONS = 500  # sets filled
_ENDS = 2  # of many stages so many workers are tried at each end
_WAYS = 2  # in large pools so many are tried for a set, by their bounds
_LEVELS = 6  # bounds on how long a link may be occupied
_NEARLY_BEST = 40  # sets whose best balanced filling is looked for,
_NEARLY_BEST_OF_MANY = 3  # and in large pools


@dataclass(frozen=True, slots=True)
class Found:
    """The best that the search has; all of `filled` are about as good."""

    score: float
    cost: float
    way: Way
    filled: tuple[Filled, ...]
    evaluations: int  # sets filled


@dataclass(frozen=True, slots=True)
class _Try:
    members: tuple[int, ...]
    way: Way
    cost: float


def search(
    pool: Pool, goal: Goal, *, weighs_orders: bool = True, most_evaluations: int = MOST_EVALUATIONS
) -> Found | None:
    """The best pipeline of the pool, or None if the model does not fit it.

    `weighs_orders`: links cost what they cost in the best order. Else, and with many workers, what
    they cost in the mean: many times faster, and links are a small part. After `most_evaluations`
    sets the best of them is taken.
    """
    if not pool.workers:
        return None
    few = len(pool.workers) <= EXACT_STAGES
    weighs_orders = weighs_orders and few and not pool.has_equal_links
    return _Search(pool, goal, most_evaluations, weighs_orders=weighs_orders).run()


class _Search:
    """One search: what was tried, and the best of it."""

    def __init__(
        self, pool: Pool, goal: Goal, most_evaluations: int, *, weighs_orders: bool
    ) -> None:
        self.pool, self.goal = pool, goal
        self.most_evaluations, self.weighs_orders = most_evaluations, weighs_orders
        is_small = len(pool.workers) <= EXACT_STAGES
        self.most_ways = len(goal.ways) if is_small else _WAYS
        self.nearly_best = _NEARLY_BEST if is_small else _NEARLY_BEST_OF_MANY
        self.tries: list[_Try] = []
        self.best = np.inf  # score
        self.best_stages = 0
        self.evaluations = 0
        self._routes: dict[tuple[int, float], Routes] = {}

    def run(self) -> Found | None:
        """Sets by rising bound until none can be better."""
        sets = self._sets()
        near = 1 + self.goal.rules.near
        stages = sets.sum(axis=1)
        penalty = np.array([self.goal.penalty(int(k)) for k in stages])
        bounds = np.stack([cost_bounds(self.pool, sets, way) for way in self.goal.ways])  # [w, v]
        scores = bounds.min(axis=0) * penalty
        for v in np.lexsort((stages, scores)):
            if scores[v] > self.best * near or self.evaluations >= self.most_evaluations:
                break
            members = self._members(sets[v])
            for w in np.argsort(bounds[:, v], kind="stable")[: self.most_ways]:
                if bounds[w, v] * penalty[v] > self.best * near:
                    break
                self._try(members, self.goal.ways[w], float(penalty[v]))
        return self._chosen() if self.tries else None

    def _sets(self) -> Indices:
        """[v, classes]: how many of each class a set has."""
        counts = [
            range(len(members) if pinned else 0, len(members) + 1)
            for members, pinned in zip(self.pool.classes, self.pool.pinned, strict=True)
        ]
        if prod(len(each) for each in counts) <= _EXACT_SETS:
            sets = np.array(list(product(*counts)), dtype=np.int64)
        else:
            sets = promising_sets(self.pool, self.goal)
        stages = sets.sum(axis=1)
        possible: Indices = sets[(stages > 0) & (stages <= self.pool.n_layers)]
        return possible

    def _members(self, counts: Indices) -> tuple[int, ...]:
        """The first of each class."""
        chosen = (m[:n] for m, n in zip(self.pool.classes, counts, strict=True))
        return tuple(sorted(i for members in chosen for i in members))

    def _try(self, members: tuple[int, ...], way: Way, penalty: float) -> None:
        self.evaluations += 1
        ceiling = self.best * (1 + self.goal.rules.near) / penalty
        cost = min(
            (float(filling.costs(way, ceiling).min()) for filling in self._fillings(members, way)),
            default=np.inf,
        )
        if not np.isfinite(cost):
            return
        self.tries.append(_Try(members, way, cost))
        score, k = cost * penalty, len(members)
        is_tie = score <= self.best * (1 + 1e-9) and k < self.best_stages
        if score < self.best * (1 - 1e-9) or is_tie:
            self.best, self.best_stages = score, k

    def _fillings(self, members: tuple[int, ...], way: Way) -> list[Filling]:
        """All choices of ends; once more for each link that others would wait for."""
        ends = self._ends(members, way.rows)
        found = []
        for level in self._levels(members, way):
            latency, busy = self._links(members, way.rows, ends, level)
            can = np.isfinite(latency)
            if can.any():
                filling = filling_of(
                    self.pool, members, way.rows, ends[can], latency[can], busy[can]
                )
                found.append(filling)
        return found

    def _ends(self, members: tuple[int, ...], rows: int) -> Indices:
        """[p, 2]: workers that may be first and last; of alike ones the first and the second."""
        if len(members) == 1:
            return np.array([[members[0], members[0]]])
        chosen = set(members)
        classes = [[m for m in alike if m in chosen] for alike in self.pool.classes]
        classes = [alike for alike in classes if alike]
        if len(classes) > EXACT_STAGES:
            times, rooms = self.pool.times(rows), self.pool.rooms
            by_head = sorted(classes, key=lambda alike: float(times.head[alike[0]]))
            by_room = sorted(classes, key=lambda alike: -float(rooms[alike[0], 0]))
            by_place = sorted(classes, key=lambda alike: alike[0])
            near = [*by_head[:_ENDS], *by_room[:_ENDS], by_place[0], by_place[-1]]
            classes = sorted({alike[0]: alike for alike in near}.values())
        pairs = [(a[0], b[-1]) for a in classes for b in classes if a[0] != b[-1]]
        return np.array(pairs, dtype=np.int64)

    def _levels(self, members: tuple[int, ...], way: Way) -> list[float]:
        """How long a link may be occupied: without limit, and below each time that matters.

        No order is better than the cheapest unless a link in that is what others wait for.
        """
        if not self.weighs_orders or way.is_sweep_alone:
            return [np.inf]
        times = self.pool.times(way.rows)
        each = list(members)
        among = times.busy[np.ix_(each, each)][~np.eye(len(each), dtype=np.bool_)]
        least = self.pool.n_layers / (1 / times.layer[each]).sum()  # of any slot
        matter = np.unique(among[among > least])
        if len(matter) > _LEVELS:
            matter = matter[np.linspace(0, len(matter) - 1, _LEVELS).round().astype(np.int64)]
        below = [float(np.nextafter(limit, 0)) for limit in matter[::-1]]
        return [np.inf, *below]

    def _links(
        self, members: tuple[int, ...], rows: int, ends: Indices, level: float
    ) -> tuple[Floats, Floats]:
        """[p], [p]: latency of all links for each choice of ends, and the longest occupation."""
        times = self.pool.times(rows)
        n, first, last = len(self.pool.workers), ends[:, 0], ends[:, 1]
        outer = times.latency[n, first] + times.latency[last, n]
        busy = np.maximum(times.busy[n, first], times.busy[last, n])
        k = len(members)
        if k == 1:
            return outer, busy
        if not self.weighs_orders:
            inner = np.full(len(ends), long_cost(times.latency, members))
            each = list(members)
            largest = times.busy[np.ix_(each, each)][~np.eye(k, dtype=np.bool_)].max()
            return outer + inner, np.maximum(busy, largest if self.pool.has_equal_links else 0)
        table = self.routes(rows, level).costs(members)
        place = {m: i for i, m in enumerate(members)}
        at = [place[int(m)] for m in first], [place[int(m)] for m in last]
        return outer + table.total[at], np.maximum(busy, table.longest[at])

    def routes(self, rows: int, level: float) -> Routes:
        """Ways over links that no step of `rows` rows occupies longer than `level`."""
        key = rows, level
        if key not in self._routes:
            times = self.pool.times(rows)
            n = len(self.pool.workers)
            cost = np.where(times.busy <= level, times.latency, np.inf)[:n, :n]
            self._routes[key] = Routes(cost, times.busy[:n, :n])
        return self._routes[key]

    def _chosen(self) -> Found:
        """All fillings of the best number of stages that are nearly as good as the best."""
        cost = self.best / self.goal.penalty(self.best_stages)
        limit = cost * (1 + self.goal.rules.near) * (1 + 1e-9)
        filled: list[Filled] = []
        best_way = self.goal.ways[0]
        near = [t for t in self.tries if len(t.members) == self.best_stages and t.cost <= limit]
        for tried in sorted(near, key=lambda t: t.cost)[: self.nearly_best]:
            if not filled:
                best_way = tried.way
            for filling in self._fillings(tried.members, tried.way):
                filled += filling.balanced(tried.way, limit)
        return Found(self.best, cost, best_way, tuple(filled), self.evaluations)
