"""One pipeline of some workers: who is in it, with how many layers and how much KV.

Pure. KV is planned for as many of the wished sessions as costs nothing, but for one at least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from coordinator import arranging
from coordinator.asked import Asked
from coordinator.forecast import Forecast, forecast_of
from coordinator.goal import Rules, goal_of
from coordinator.limits import PlanLimits, is_pinned
from coordinator.pool import fits, pool_of
from coordinator.search import MOST_EVALUATIONS, search
from coordinator.sizes import ModelSizes, end_bytes, most_layers, whole_pages
from potluck.plan import Links, Plan, Span, Stage, WorkerId, WorkerInfo


@dataclass(frozen=True)
class Task:
    """What is planned: everything but the workers that may be used."""

    sizes: ModelSizes
    asked: Asked
    links: Links = field(default_factory=Links)
    limits: PlanLimits = field(default_factory=dict)
    stored: Mapping[WorkerId, frozenset[int]] = field(default_factory=dict)
    rules: Rules = field(default_factory=Rules)
    weighs_orders: bool = True  # as in coordinator/search
    most_evaluations: int = MOST_EVALUATIONS

    @property
    def context_tokens(self) -> int:
        """Positions of one session's KV: whole pages."""
        return whole_pages(self.asked.context_tokens)

    @property
    def kv_levels(self) -> list[int]:
        """Numbers of sessions that KV is planned for, the wished one first: it is halved."""
        levels = [max(self.asked.max_sessions, self.asked.sessions)]
        while levels[-1] > 1:
            levels.append(levels[-1] // 2)
        return levels

    def forecast(self, plan: Plan, workers: Sequence[WorkerInfo]) -> Forecast:
        """What is expected of a plan of these workers."""
        return forecast_of(
            plan, self.sizes, workers, self.links, self.asked.timed_positions, self.stored
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """A pipeline, and by what it was chosen."""

    plan: Plan
    kv_sessions: int  # contexts that its KV holds
    cost: float  # seconds a token, or what else was minimised; less is better
    score: float  # the same with what its stages should have saved
    evaluations: int  # sets of workers that were filled for it


def lay_out(task: Task, workers: Sequence[WorkerInfo], sessions: int) -> Layout | None:
    """The best pipeline for so many sessions at once, or for as many as there is KV for.

    None: not one context's KV fits beside the layers.
    """
    levels = task.kv_levels
    needed = [n for n in levels if n >= min(sessions, levels[0])][-1]
    best: Layout | None = None
    for level in levels[levels.index(needed) :]:
        layout = _of_level(task, workers, min(sessions, level), level)
        if layout is None:
            continue
        if best is not None and layout.score > best.score * (1 - task.rules.stage_worth):
            break  # less KV does not leave that much more room for fast layers
        best = layout
    return best and _with_more_kv(task, workers, sessions, best)


def has_room(task: Task, workers: Sequence[WorkerInfo]) -> bool:
    """Whether a plan exists, with KV for one context."""
    positions = task.context_tokens
    return fits(pool_of(task.sizes, workers, positions, Links(), task.limits, 0))


def alone(task: Task, workers: Sequence[WorkerInfo]) -> Plan | None:
    """The whole model on the one worker that is fastest for one answer; None: it fits none."""
    pinned = [worker for worker in workers if is_pinned(task.limits, worker.id)]
    if len(pinned) > 1:
        return None
    tried = [
        lay_out(task, [worker], 1)
        for worker in pinned or workers
        if _has_room(task.sizes, [(worker, task.sizes.n_layers)], task.context_tokens)
    ]
    found = [layout for layout in tried if layout is not None]
    return min(found, key=lambda layout: layout.score).plan if found else None


def plan_of(sizes: ModelSizes, order: Sequence[tuple[WorkerInfo, int]], n_positions: int) -> Plan:
    """Workers in pipeline order with their layers, and KV for so many positions, as a plan."""
    stages = []
    last = len(order) - 1
    stops = accumulate(count for _, count in order)
    for i, ((worker, count), stop) in enumerate(zip(order, stops, strict=True)):
        span = Span(stop - count, stop)
        kv = n_positions * sizes.kv_layer_bytes * count
        weights = sum(sizes.layer_bytes[span.start : span.stop])
        memory = weights + kv + end_bytes(sizes, embeds=i == 0, has_head=i == last)
        stages.append(Stage(worker.id, span, i == 0, i == last, memory_bytes=memory, kv_bytes=kv))
    return Plan(sizes.n_layers, tuple(stages))


def _of_level(
    task: Task, workers: Sequence[WorkerInfo], sessions: int, level: int
) -> Layout | None:
    """With KV for `level` sessions, neither more nor less."""
    sizes, asked = task.sizes, task.asked
    n_positions = level * task.context_tokens
    pool = pool_of(sizes, workers, n_positions, task.links, task.limits, asked.timed_positions)
    if not fits(pool):
        return None
    goal = goal_of(sessions, asked.slowest_weight, task.rules)
    found = search(
        pool,
        goal,
        weighs_orders=task.weighs_orders,
        most_evaluations=task.most_evaluations,
    )
    if found is None:
        return None
    order = arranging.arranged(pool, found, sizes.layer_bytes, task.stored)
    plan = plan_of(sizes, order, n_positions)
    return Layout(plan, level, found.cost / sessions, found.score / sessions, found.evaluations)


def _with_more_kv(
    task: Task, workers: Sequence[WorkerInfo], sessions: int, layout: Layout
) -> Layout:
    """KV for as many sessions as fit beside the same layers, or on more workers if answers are not
    slower for it by what a stage must save.
    """
    most = layout.cost / (1 - task.rules.stage_worth)
    wished = task.kv_levels[0]
    fitting = _with_all_kv(task, workers, layout, wished)
    if fitting.kv_sessions == wished or layout.kv_sessions < sessions:
        return fitting
    for more in task.kv_levels:
        if more <= fitting.kv_sessions:
            break
        other = _of_level(task, workers, sessions, more)
        if other is not None and other.cost <= most:
            return _with_all_kv(task, workers, other, wished)
    return fitting


def _with_all_kv(task: Task, workers: Sequence[WorkerInfo], layout: Layout, wished: int) -> Layout:
    """KV for as many sessions as fit beside these layers."""
    infos = {worker.id: worker for worker in workers}
    order = [(infos[stage.worker], stage.span.n_layers) for stage in layout.plan.stages]
    low, high = layout.kv_sessions, wished
    while low < high:
        middle = (low + high + 1) // 2
        if _has_room(task.sizes, order, middle * task.context_tokens):
            low = middle
        else:
            high = middle - 1
    plan = plan_of(task.sizes, order, low * task.context_tokens)
    return replace(layout, plan=plan, kv_sessions=low)


def _has_room(sizes: ModelSizes, order: Sequence[tuple[WorkerInfo, int]], n_positions: int) -> bool:
    last = len(order) - 1
    return all(
        n <= most_layers(sizes, worker, n_positions, embeds=i == 0, has_head=i == last)
        for i, (worker, n) in enumerate(order)
    )
