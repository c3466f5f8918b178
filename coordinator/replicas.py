"""Several pipelines of one model, when that gives more tokens a second to those who ask at once.

Pure. R pipelines hold the weights R times, and a long one leaves more room for KV; but several lose
fewer sessions when a worker dies, pass fewer links, and let fast machines work together. A session
stays in its pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from coordinator.bounds import rough_bounds
from coordinator.goal import goal_of
from coordinator.layout import Layout, Task, lay_out
from coordinator.pool import Indices, Pool, pool_of
from coordinator.routes import EXACT_STAGES
from potluck.plan import WorkerInfo

_TRIED = 2  # ways to share out workers that are planned in full, the most promising,
_TRIED_OF_MANY = 1  # if there are more than
_MANY_WORKERS = 64
_EVALUATIONS = 200  # sets filled for all pipelines, but these for each:
_LEAST_EVALUATIONS = 12

Shares = list[list[int]]  # workers of the pool, by pipeline


@dataclass(frozen=True, slots=True)
class Fleet:
    """Pipelines that share no worker, and what they give together."""

    layouts: tuple[Layout, ...]  # the fastest for one session first
    total: float  # tokens/s of all sessions that were asked for

    @property
    def n_workers(self) -> int:
        """Workers in use."""
        return sum(len(layout.plan.stages) for layout in self.layouts)

    @property
    def kv_sessions(self) -> int:
        """Contexts that KV is there for."""
        return sum(layout.kv_sessions for layout in self.layouts)


def fleet_of(task: Task, workers: Sequence[WorkerInfo]) -> Fleet | None:
    """As many pipelines as give the best total; on a tie one if KV is short, else two.

    None: not even one fits.
    """
    one = lay_out(task, workers, task.asked.sessions)
    if one is None:
        return None
    single = _fleet(task, workers, [one], [task.asked.sessions])
    asked = task.asked
    if asked.one_pipeline or asked.sessions == 1 or asked.slowest_weight is not None:
        return single
    if len(workers) == 1:
        return single
    found = [single, *_several(task, workers)]
    best = max(fleet.total for fleet in found) * (1 - task.rules.stage_worth)
    ties = [fleet for fleet in found if fleet.total >= best]
    fewest = min(fleet.n_workers for fleet in ties)
    ties = [fleet for fleet in ties if fleet.n_workers == fewest]
    ties.sort(key=lambda fleet: (len(fleet.layouts), -fleet.total))
    if len(ties) > 1 and len(ties[0].layouts) == 1 and len(ties[1].layouts) == 2:
        is_short = ties[1].kv_sessions < min(ties[0].kv_sessions, task.asked.max_sessions)
        return ties[0] if is_short else ties[1]
    return ties[0]


def _fleet(
    task: Task, workers: Sequence[WorkerInfo], layouts: Sequence[Layout], sessions: Sequence[int]
) -> Fleet:
    """A pipeline answers no more sessions at once than its KV holds."""
    total, first = 0.0, []
    for layout, n in zip(layouts, sessions, strict=True):
        forecast = task.forecast(layout.plan, workers)
        total += forecast.tokens_per_second(min(n, layout.kv_sessions))
        first.append((forecast.sweep_seconds(), layout))
    first.sort(key=lambda pair: pair[0])
    return Fleet(tuple(layout for _, layout in first), total)


def _several(task: Task, workers: Sequence[WorkerInfo]) -> Iterator[Fleet]:
    """The most promising of two or more pipelines, planned in full."""
    pool = pool_of(
        task.sizes,
        workers,
        task.context_tokens,
        task.links,
        task.limits,
        task.asked.timed_positions,
    )
    promising: list[tuple[float, Shares]] = []
    for n in _numbers(task, pool):
        for shares in _shared_out(pool, n):
            total = _rough_total(task, pool, shares)
            if total > 0:
                promising.append((total, shares))
    promising.sort(key=lambda pair: -pair[0])
    promising = _unlike(pool, promising)
    tried = _TRIED if len(workers) <= _MANY_WORKERS else _TRIED_OF_MANY
    for _, shares in promising[:tried]:
        sessions = _sessions(pool, shares, task.asked.sessions)
        layouts = _lay_out_each(task, pool, shares, sessions)
        if layouts is not None:
            yield _fleet(task, workers, layouts, sessions)


def _unlike(pool: Pool, promising: list[tuple[float, Shares]]) -> list[tuple[float, Shares]]:
    """Without those that share out alike workers in the same way once more."""
    class_of = {i: c for c, members in enumerate(pool.classes) for i in members}
    found: dict[tuple[tuple[int, ...], ...], tuple[float, Shares]] = {}
    for total, shares in promising:
        key = tuple(sorted(tuple(sorted(class_of[i] for i in part)) for part in shares))
        found.setdefault(key, (total, shares))
    return list(found.values())


def _numbers(task: Task, pool: Pool) -> list[int]:
    """Of pipelines: all small ones, then fewer and fewer."""
    memory = sum(worker.memory_free_bytes for worker in pool.workers)
    most = min(
        task.asked.sessions, len(pool.workers), int(memory // max(task.sizes.weight_bytes, 1))
    )
    found, n = [], 2
    while n <= most:
        found.append(n)
        n += max(1, n // 5)
    if most >= 2 and found[-1] != most:
        found.append(most)
    return found


def _shared_out(pool: Pool, n: int) -> Iterator[Shares]:
    """Workers into n parts of about the same memory: fast and slow ones mixed, those of about the
    same speed together, and neighbours together.
    """
    memory = np.array([worker.memory_free_bytes for worker in pool.workers], dtype=np.float64)
    by_speed = np.argsort(pool.times(1).layer, kind="stable")
    mixed: Shares = [[] for _ in range(n)]
    held = np.zeros(n)
    for i in by_speed:
        part = int(np.argmin(held))
        mixed[part].append(int(i))
        held[part] += memory[i]
    yield [sorted(part) for part in mixed]
    orders = [by_speed] if pool.has_equal_links else [by_speed, _neighbours(pool)]
    for order in orders:
        before = np.cumsum(memory[order]) - memory[order] / 2
        parts = (n * before / memory.sum()).astype(np.int64)
        shares = [sorted(int(i) for i in order[parts == part]) for part in range(n)]
        if all(shares):
            yield shares


def _neighbours(pool: Pool) -> Indices:
    """All workers, each followed by the nearest that is left."""
    n = len(pool.workers)
    latency = pool.times(1).latency[:n, :n].copy()
    order = [0]
    for _ in range(n - 1):
        latency[:, order[-1]] = np.inf
        order.append(int(np.argmin(latency[order[-1]])))
    return np.array(order)


def _sessions(pool: Pool, shares: Shares, sessions: int) -> list[int]:
    """Sessions of each pipeline by what its workers read a second; one at least."""
    speed = np.array([(1 / pool.times(1).layer[part]).sum() for part in shares])
    wished = 1 + (sessions - len(shares)) * speed / speed.sum()
    found = np.floor(wished).astype(np.int64)
    for part in np.argsort(found - wished, kind="stable")[: sessions - int(found.sum())]:
        found[part] += 1
    return [int(n) for n in found]


def _rough_total(task: Task, pool: Pool, shares: Shares) -> float:
    """About the tokens/s of these pipelines; 0 if one of them does not fit."""
    alone = replace(pool, classes=tuple((i,) for i in range(len(pool.workers))))
    layer = pool.times(1).layer
    sets, parts = [], []
    for part, members in enumerate(shares):
        chosen = np.zeros(len(pool.workers), dtype=np.int64)
        for i in sorted(members, key=lambda i: layer[i]):  # the fastest, the two fastest, ...
            chosen[i] = 1
            sets.append(chosen.copy())
            parts.append(part)
    sessions = _sessions(pool, shares, task.asked.sessions)
    goal = goal_of(ceil(task.asked.sessions / len(shares)), None, task.rules)
    array = np.array(sets)
    costs = np.min([rough_bounds(alone, array, way) for way in goal.ways], axis=0)
    best = np.full(len(shares), np.inf)
    np.minimum.at(best, np.array(parts), costs)
    if not np.isfinite(best).all():
        return 0.0
    held = [_kv_sessions(task, [pool.workers[i] for i in members]) for members in shares]
    return float((np.minimum(sessions, held) / best).sum())


def _kv_sessions(task: Task, workers: Sequence[WorkerInfo]) -> int:
    """About how many contexts fit beside the weights."""
    sizes = task.sizes
    memory = sum(worker.memory_free_bytes - sizes.scratch_bytes for worker in workers)
    one = task.context_tokens * sizes.kv_layer_bytes * sizes.n_layers
    return max(int((memory - sizes.weight_bytes) // max(one, 1)), 0)


def _lay_out_each(
    task: Task, pool: Pool, shares: Shares, sessions: Sequence[int]
) -> list[Layout] | None:
    n_kv = ceil(task.kv_levels[0] / len(shares))
    each = replace(
        task,
        asked=replace(task.asked, max_sessions=n_kv, sessions=1),
        weighs_orders=len(pool.workers) <= EXACT_STAGES,
        most_evaluations=max(_EVALUATIONS // len(shares), _LEAST_EVALUATIONS),
    )
    found = []
    for members, n in zip(shares, sessions, strict=True):
        layout = lay_out(each, [pool.workers[i] for i in members], n)
        if layout is None:
            return None
        found.append(layout)
    return found
