"""What this machine offers for a model, as one JSON object: `potluck-worker --describe MODEL`.

The same figures that a worker registers with, under the names of potluck.plan.WorkerInfo. Nobody is
joined, and of the model only its header is read.
"""

from __future__ import annotations

import re
from dataclasses import asdict

from potluck import catalogue, engine, model
from potluck.layer_shape import LayerShape, shape_of
from worker.config import Settings
from worker.disk import with_free_now
from worker.layer_times import Conditions, layer_times
from worker.probe import Machine, Memory

_NO_ID = re.compile(r"[^a-z0-9-]+")


def shape_to_describe(model_: str) -> LayerShape:
    """The layer of a MODEL that is to be timed. Raises UnknownModel, ModelError, UsageError."""
    file = catalogue.open_model(model_)
    return shape_of(file, model.config_of(file))


def description_of(
    settings: Settings,
    shape: LayerShape,
    engine_: engine.Engine,
    machine: Machine,
    memory: Memory,
) -> dict[str, object]:
    """Blocks for some seconds. What could not be measured is None."""
    before = memory.now()
    conditions = Conditions(machine.name, before.room_bytes, machine.cpu_quota)
    times = layer_times(engine_, shape, conditions)
    now = memory.now()
    return {
        "id": settings.name or _id_of(machine.name),
        "machine": machine.name,
        "platform": machine.platform,
        "cores": machine.cores,
        "isa": machine.isa,
        "threads": machine.threads,
        "memory_bytes": now.total_bytes,
        "memory_free_bytes": now.free_bytes,
        "room_bytes": now.room_bytes if memory.maps_weights else None,
        "read_bytes_per_second": machine.read_bytes_per_second,
        "model": settings.describe,
        "times": asdict(times) if times else None,
        "disk": asdict(with_free_now(machine.disk)) if machine.disk else None,
    }


def _id_of(name: str) -> str:
    """A machine's name as an id of a worker: [a-z0-9-]{1,32}."""
    return _NO_ID.sub("-", name.lower()).strip("-")[:32].strip("-") or "worker"
