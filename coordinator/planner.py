"""Which worker holds which layers.

Pure: the same model, workers and wishes give the same plan. It starts nothing and reads no clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from coordinator.every_worker import spread
from coordinator.forecast import Forecast, forecast_of
from coordinator.limits import PlanLimits, WorkerLimits, usable
from coordinator.sizes import ModelSizes, end_bytes, size_text, sizes_of, whole_pages
from potluck.errors import PlanError
from potluck.plan import Links, Plan, Span, Stage, WorkerId, WorkerInfo

__all__ = [
    "Asked",
    "Forecast",
    "Links",
    "ModelSizes",
    "PlanLimits",
    "Planned",
    "WorkerLimits",
    "kv_tokens",
    "plan",
    "plan_for",
    "sizes_of",
]

# A session's KV is taken to hold so many positions, or half its context if that is shorter, when a
# forecast adds the time to read it: a question and half of its answer.
ASSUMED_POSITIONS = 256


@dataclass(frozen=True, slots=True)
class Asked:
    """What a plan is made for. Raises PlanError if it is nothing."""

    context_tokens: int
    max_sessions: int = 1  # sessions that KV is wanted for; as many as fit, at least one
    sessions: int = 1  # answers at once that the plan is made to be fast for
    slowest_weight: float | None = None  # A of Lambda + A tau; None: tokens/s of `sessions`
    every_worker: bool = False  # each worker is a stage, the slow ones too
    positions: int | None = None  # that a session's KV holds when it is timed; None: assumed

    def __post_init__(self) -> None:
        if min(self.context_tokens, self.max_sessions, self.sessions) < 1:
            raise PlanError(f"a plan for nothing: {self}")
        if self.slowest_weight is not None and not 0 <= self.slowest_weight < float("inf"):
            raise PlanError(f"the slowest stage weighs {self.slowest_weight}, expected 0 or more")

    @property
    def timed_positions(self) -> int:
        """Positions of each session's KV in a forecast."""
        if self.positions is not None:
            return self.positions
        return min(self.context_tokens // 2, ASSUMED_POSITIONS)


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, why, and what is expected of it."""

    plan: Plan
    forecast: Forecast
    spares: tuple[WorkerId, ...] = ()  # workers that hold nothing
    replicas: tuple[Plan, ...] = ()  # further pipelines, of other workers
    replica_forecasts: tuple[Forecast, ...] = ()  # of each of them
    advice: tuple[str, ...] = ()  # one line each, for people


def plan(
    sizes: ModelSizes,
    workers: Sequence[WorkerInfo],
    asked: Asked,
    *,
    links: Links = Links(),  # noqa: B008  frozen; no call changes it
    limits: Mapping[WorkerId, WorkerLimits] = {},
    stored: Mapping[WorkerId, frozenset[int]] = {},
) -> Planned:
    """The best plan for what is asked. Raises PlanError, with the bytes needed and offered.

    `stored`: layers that a worker has on its disk or in its memory already; with every layer of
    every worker (a synthetic: model) nothing has to be sent.
    """
    if not workers:
        raise PlanError("no worker is here", remedy="start one with `potluck join`")
    pool = usable(workers, limits)
    found = _every_worker(sizes, pool, asked, limits)
    used = {stage.worker for stage in found.stages}
    return Planned(
        plan=found,
        forecast=forecast_of(found, sizes, pool, links, asked.timed_positions, stored),
        spares=tuple(worker.id for worker in workers if worker.id not in used),
    )


def plan_for(
    sizes: ModelSizes, workers: Sequence[WorkerInfo], context_tokens: int, max_sessions: int
) -> Plan:
    """A stage for each worker, with KV for as many of `max_sessions` contexts as fit, at least one.

    Raises PlanError, with the bytes needed and offered, if the model does not fit even so.
    """
    return plan(sizes, workers, Asked(context_tokens, max_sessions, every_worker=True)).plan


def kv_tokens(plan: Plan, sizes: ModelSizes) -> int:
    """Positions that the plan's KV has room for, all sessions together; whole pages."""
    first = plan.stages[0]
    return first.kv_bytes // (sizes.kv_layer_bytes * first.span.n_layers)


def _every_worker(
    sizes: ModelSizes, workers: Sequence[WorkerInfo], asked: Asked, limits: PlanLimits
) -> Plan:
    if len(workers) > sizes.n_layers:
        raise PlanError(
            f"{len(workers)} workers can't share {sizes.n_layers} layers, each needs one",
            remedy=f"ask for --workers {sizes.n_layers} or fewer",
        )
    context_tokens = whole_pages(asked.context_tokens)
    sessions = asked.max_sessions
    while sessions > 0:
        best = spread(sizes, workers, sessions * context_tokens, limits)
        if best is not None:
            return _plan(sizes, best, sessions * context_tokens)
        sessions //= 2
    raise _too_little(sizes, workers, context_tokens)


def _plan(sizes: ModelSizes, order: Sequence[tuple[WorkerInfo, int]], n_positions: int) -> Plan:
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


def _too_little(sizes: ModelSizes, workers: Sequence[WorkerInfo], context_tokens: int) -> PlanError:
    kv = context_tokens * sizes.kv_layer_bytes * sizes.n_layers
    needed = sizes.weight_bytes + kv + sizes.scratch_bytes * len(workers)
    offered = sum(worker.memory_free_bytes for worker in workers)
    least = min(workers, key=lambda worker: worker.memory_free_bytes)
    name = "worker offers" if len(workers) == 1 else "workers offer"
    message = (
        f"the model needs {size_text(needed)} ({size_text(sizes.weight_bytes)} of weights,"
        f" {size_text(kv)} of KV for one context of {context_tokens} tokens),"
        f" {len(workers)} {name} {size_text(offered)}"
    )
    if offered >= needed:
        message += (
            f", but {least.id} offers {size_text(least.memory_free_bytes)}, too little for its part"
        )
    rooms = [worker.room_bytes for worker in workers if worker.room_bytes is not None]
    if rooms:
        message += (
            f"; of that {size_text(sum(rooms))} are memory, which KV, buffers and two layers at a"
            " time must fit into"
        )
    return PlanError(message, remedy="add a worker, give workers more --memory or lower --context")
