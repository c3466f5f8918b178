"""A plan without a cluster: described machines in, what the planner says of them out, as JSON.

Opens no port and starts nothing. Names in the JSON never change once released.
"""

from __future__ import annotations

import sys
from pathlib import Path

from coordinator import planner, workers_file
from coordinator.config import Settings, Use
from coordinator.described import Description, workers_of
from coordinator.forecast import Forecast
from coordinator.planner import Asked, Planned
from coordinator.served import ModelShape, shape_of, stored_layers
from potluck.errors import UsageError
from potluck.model import layer_macs
from potluck.plan import Plan, WorkerInfo

FIRST_TOKEN_PROMPT = 512  # tokens of the prompt whose first token is timed
_STDIN = "standard input"


def asked_of(settings: Settings, context_tokens: int) -> Asked:
    """What the options ask of a plan."""
    return Asked(
        context_tokens,
        max_sessions=settings.max_sessions,
        sessions=settings.sessions,
        every_worker=settings.use is Use.ALL,
        one_pipeline=not settings.replicas,
    )


def plan_only(settings: Settings) -> dict[str, object]:
    """Plans as the settings say, for described workers.

    Raises UsageError, ModelError, PlanError.
    """
    described = _description(settings)
    limits = {**described.limits}
    if settings.limits:
        limits |= workers_file.read(Path(settings.limits)).limits
    shape = shape_of(settings.model, settings.context_tokens, settings.kv_type, settings.wire)
    workers = workers_of(described, shape.sizes, layer_macs(shape.config))
    planned = planner.plan(
        shape.sizes,
        workers,
        asked_of(settings, shape.context_tokens),
        links=described.links,
        limits=limits,
        stored=stored_layers(shape.file, shape.config, workers),
    )
    return planned_json(planned, shape, settings, workers)


def planned_json(
    planned: Planned, shape: ModelShape, settings: Settings, workers: tuple[WorkerInfo, ...]
) -> dict[str, object]:
    """A plan and its forecast as plain values."""
    forecast, n_stages = planned.forecast, len(planned.plan.stages)
    pipelines = (planned.plan, *planned.replicas)
    numbers = sorted({1, n_stages, 2 * n_stages, settings.sessions})
    return {
        "model": shape.name,
        "n_layers": shape.config.n_layers,
        "weights_bytes": shape.sizes.weight_bytes,
        "context_tokens": shape.context_tokens,
        "max_sessions": settings.max_sessions,
        "sessions": settings.sessions,
        "kv_type": settings.kv_type.value,
        "wire": settings.wire,
        "use": settings.use.value,
        "stages": _stages(planned.plan, forecast, workers),
        "links": [
            {
                "from": link.source or workers_file.COORDINATOR_NAME,
                "to": link.target or workers_file.COORDINATOR_NAME,
                "predicted_seconds": link.seconds(1),
            }
            for link in forecast.links
        ],
        "forecast": {
            "sweep_seconds": forecast.sweep_seconds(),
            "slot_seconds": forecast.slot_seconds(),
            "speeds": [_speed(planned, n) for n in numbers],
            "first_token_prompt_tokens": FIRST_TOKEN_PROMPT,
            "first_token_seconds": forecast.first_token_seconds(FIRST_TOKEN_PROMPT),
            "load_seconds": forecast.whole_load_seconds,
            "load_seconds_by_worker": dict(forecast.load_seconds),
        },
        "kv": {
            "tokens": sum(planner.kv_tokens(plan, shape.sizes) for plan in pipelines),
            "bytes_per_token": shape.sizes.kv_layer_bytes * shape.sizes.n_layers,
        },
        "spares": list(planned.spares),
        "replicas": [_stages(plan, None, workers) for plan in planned.replicas],
        "advice": list(planned.advice),
    }


def _description(settings: Settings) -> Description:
    if settings.workers_file:
        described = workers_file.read(Path(settings.workers_file))
    else:
        described = workers_file.from_json(sys.stdin.read(), _STDIN)
    if not described.workers:
        raise UsageError(
            f"{described.source}: describes no worker",
            remedy="write a [[worker]] for each machine; docs/planning.md shows how",
        )
    return described


def _stages(
    plan: Plan, forecast: Forecast | None, workers: tuple[WorkerInfo, ...]
) -> list[dict[str, object]]:
    offered = {worker.id: worker.memory_free_bytes for worker in workers}
    found = []
    for i, stage in enumerate(plan.stages):
        shown: dict[str, object] = {
            "stage": i,
            "worker": stage.worker,
            "span": [stage.span.start, stage.span.stop],
            "n_layers": stage.span.n_layers,
            "memory_bytes": stage.memory_bytes,
            "memory_free_bytes": offered[stage.worker],
            "kv_bytes": stage.kv_bytes,
        }
        if forecast is not None:
            seconds = forecast.stages[i].seconds(1)
            share = seconds / forecast.sweep_seconds()
            shown |= {"predicted_seconds": seconds, "share": share}
        found.append(shown)
    return found


def _speed(planned: Planned, sessions: int) -> dict[str, object]:
    total = planned.tokens_per_second(sessions)
    return {
        "sessions": sessions,
        "tokens_per_second": total,
        "tokens_per_second_each": total / sessions,
    }
