"""In which order a set of workers is passed, so that the links between them cost least.

Pure. Exact (Held-Karp) for few workers; for more, the nearest next, then pieces turned round while
that helps. If all links are equal, every order is as good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from coordinator.pool import Floats

EXACT_STAGES = 10  # 1,024 sets of at most 10 first and last: 10 ms a set of ten (Zen 3)

_TURNS = 200  # pieces turned round at most, in a long route


@dataclass(frozen=True, slots=True)
class Costs:
    """The cheapest ways through some workers, by the first (row) and the last: [k, k]."""

    total: Floats  # infinite: there is none
    longest: Floats  # the largest `busy` on the way


@dataclass
class Routes:
    """Least costs of passing workers. `cost` [n, n] is of a link, infinite if it is not allowed;
    `busy` [n, n] is how long it is occupied.
    """

    cost: Floats
    busy: Floats
    _tables: dict[tuple[int, ...], Costs] = field(default_factory=dict)

    def costs(self, members: tuple[int, ...]) -> Costs:
        """Through all of `members`, which rise and are EXACT_STAGES at most."""
        if members not in self._tables:
            self._tables[members] = self._compute(members)
        return self._tables[members]

    def _compute(self, members: tuple[int, ...]) -> Costs:
        """From the ways that leave out the last: [last, first, the one before the last]."""
        k = len(members)
        total, longest = np.full((k, k), np.inf), np.zeros((k, k))
        if k == 1:
            return Costs(np.zeros((1, 1)), longest)
        others = [members[:last] + members[last + 1 :] for last in range(k)]
        tables = [self.costs(each) for each in others]
        before, here = np.array(others), np.array(members)[:, None]
        totals = np.stack([t.total for t in tables]) + self.cost[before, here][:, None, :]
        busy = np.maximum(
            np.stack([t.longest for t in tables]), self.busy[before, here][:, None, :]
        )
        chosen = totals.argmin(axis=2)[:, :, None]
        last, first = np.nonzero(~np.eye(k, dtype=np.bool_))
        total[first, last] = np.take_along_axis(totals, chosen, axis=2).ravel()
        longest[first, last] = np.take_along_axis(busy, chosen, axis=2).ravel()
        return Costs(total, longest)

    def order(self, members: tuple[int, ...], first: int, last: int) -> list[int]:
        """The cheapest order of members from `first` to `last`; in large pools a cheap one."""
        if len(members) <= EXACT_STAGES >= len(self.cost):
            return self._exact_order(tuple(sorted(members)), first, last)
        return self._long_order(members, first, last)

    def _exact_order(self, members: tuple[int, ...], first: int, last: int) -> list[int]:
        way = [last]
        while len(members) > 1:
            here = way[-1]
            members = tuple(m for m in members if m != here)
            if len(members) == 1:
                way.append(members[0])
                break
            table = self.costs(members).total[members.index(first)] + self.cost[list(members), here]
            way.append(members[int(len(members) - 1 - np.argmin(table[::-1]))])
        return way[::-1]

    def _long_order(self, members: Sequence[int], first: int, last: int) -> list[int]:
        left = [m for m in members if m not in (first, last)]
        way = [first]
        while left:
            nearest = min(left, key=lambda m: self.cost[way[-1], m])
            left.remove(nearest)
            way.append(nearest)
        return self._turned([*way, last])

    def _turned(self, way: list[int]) -> list[int]:
        """Turns pieces round as long as that makes the way cheaper; both ends stay."""
        for _ in range(_TURNS):
            best, piece = 1e-12, (0, 0)
            steps = self.cost[way[:-1], way[1:]]
            backward = self.cost[way[1:], way[:-1]]
            gain_inside = np.concatenate([[0.0], np.cumsum(steps - backward)])
            array = np.array(way)
            for i in range(1, len(way) - 2):
                j = np.arange(i + 1, len(way) - 1)
                before = steps[i - 1] + steps[j] + gain_inside[j] - gain_inside[i]
                after = self.cost[way[i - 1], array[j]] + self.cost[way[i], array[j + 1]]
                gains = before - after
                at = int(np.argmax(gains))
                if gains[at] > best:
                    best, piece = float(gains[at]), (i, int(j[at]))
            if piece == (0, 0):
                return way
            i, end = piece
            way[i : end + 1] = way[i : end + 1][::-1]
        return way


def long_cost(cost: Floats, members: Sequence[int]) -> float:
    """About what a way through many members costs: for each, what its links cost in the mean."""
    if len(members) < 2:
        return 0.0
    among = cost[np.ix_(members, members)]
    mean = (among.sum() - np.trace(among)) / (len(members) * (len(members) - 1))
    return float(mean) * (len(members) - 1)
