"""Which worker holds which layers.

Pure: the same model, workers and wishes give the same plan. It starts nothing and reads no clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.advice import advice_for
from coordinator.asked import Asked
from coordinator.every_worker import in_their_places, spread
from coordinator.forecast import Forecast, shared
from coordinator.goal import Rules
from coordinator.layout import Task, has_room, plan_of
from coordinator.limits import PlanLimits, WorkerLimits, usable
from coordinator.refusal import refusal
from coordinator.replicas import fleet_of
from coordinator.sizes import ModelSizes, sizes_of
from potluck.errors import PlanError
from potluck.plan import Links, Plan, WorkerId, WorkerInfo

__all__ = [
    "Asked",
    "Forecast",
    "Links",
    "ModelSizes",
    "PlanLimits",
    "Planned",
    "Rules",
    "WorkerLimits",
    "kv_tokens",
    "plan",
    "plan_for",
    "sizes_of",
]


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, why, and what is expected of it."""

    plan: Plan
    forecast: Forecast
    spares: tuple[WorkerId, ...] = ()  # workers that hold nothing
    replicas: tuple[Plan, ...] = ()  # further pipelines, of other workers
    replica_forecasts: tuple[Forecast, ...] = ()  # of each of them
    advice: tuple[str, ...] = ()  # one line each, for people

    def tokens_per_second(self, sessions: int = 1) -> float:
        """Of so many sessions in all pipelines, each session where it adds most."""
        return shared([self.forecast, *self.replica_forecasts], sessions)


def plan(
    sizes: ModelSizes,
    workers: Sequence[WorkerInfo],
    asked: Asked,
    *,
    links: Links = Links(),  # noqa: B008  frozen; no call changes it
    limits: Mapping[WorkerId, WorkerLimits] = {},
    stored: Mapping[WorkerId, frozenset[int]] = {},
    rules: Rules = Rules(),  # noqa: B008  frozen; no call changes it
) -> Planned:
    """The best plan for what is asked. Raises PlanError, with the bytes needed and offered.

    `stored`: layers that a worker has on its disk or in its memory already; with every layer of
    every worker (a synthetic: model) nothing has to be sent.
    """
    if not workers:
        raise _nobody()
    pool = usable(workers, limits)
    task = Task(sizes, asked, links, limits, stored, rules)
    plans = [_every_worker(task, pool)] if asked.every_worker else _best(task, pool)
    forecasts = [task.forecast(each, pool) for each in plans]
    used = {stage.worker for each in plans for stage in each.stages}
    return Planned(
        plan=plans[0],
        forecast=forecasts[0],
        replicas=tuple(plans[1:]),
        replica_forecasts=tuple(forecasts[1:]),
        spares=tuple(worker.id for worker in workers if worker.id not in used),
        advice=advice_for(task, pool, plans, forecasts),
    )


def plan_for(
    sizes: ModelSizes, workers: Sequence[WorkerInfo], context_tokens: int, max_sessions: int
) -> Plan:
    """A stage for each worker, with KV for as many of `max_sessions` contexts as fit, at least one.

    Raises PlanError, with the bytes needed and offered, if the model does not fit even so.
    """
    if not workers:
        raise _nobody()
    return _every_worker(
        Task(sizes, Asked(context_tokens, max_sessions, every_worker=True)), workers
    )


def kv_tokens(plan: Plan, sizes: ModelSizes) -> int:
    """Positions that the plan's KV has room for, all sessions together; whole pages."""
    first = plan.stages[0]
    return first.kv_bytes // (sizes.kv_layer_bytes * first.span.n_layers)


def _nobody() -> PlanError:
    return PlanError("no worker is here", remedy="start one with `potluck join`")


def _best(task: Task, workers: Sequence[WorkerInfo]) -> list[Plan]:
    fleet = fleet_of(task, workers)
    if fleet is None:
        raise refusal(task, workers, has_room)
    return [layout.plan for layout in fleet.layouts]


def _every_worker(task: Task, workers: Sequence[WorkerInfo]) -> Plan:
    sizes = task.sizes
    if len(workers) > sizes.n_layers:
        raise PlanError(
            f"{len(workers)} workers can't share {sizes.n_layers} layers, each needs one",
            remedy=f"ask for --workers {sizes.n_layers} or fewer",
        )
    placed = in_their_places(workers, task.stored, sizes.n_layers)
    for sessions in task.kv_levels:
        n_positions = sessions * task.context_tokens
        best = spread(sizes, placed, n_positions, task.limits)
        if best is not None:
            return plan_of(sizes, best, n_positions)
    raise refusal(task, workers, _has_room_for_each)


def _has_room_for_each(task: Task, workers: Sequence[WorkerInfo]) -> bool:
    """Whether each of the workers can be a stage."""
    return spread(task.sizes, workers, task.context_tokens, task.limits) is not None
