"""What is said when a model does not fit: each cure that is named works, and less does not."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest

from coordinator.limits import WorkerLimits
from coordinator.planner import Asked, ModelSizes, Planned, plan
from potluck.errors import PlanError
from potluck.model import SCRATCH_BYTES
from potluck.plan import WorkerId, WorkerInfo

GIB = 2**30
LLAMA_65B = ModelSizes(
    (455_300_000,) * 80,
    147_000_000,
    215_000_000,
    kv_layer_bytes=32_768,
    scratch_bytes=500_000_000,
    row_bytes=32_768,
    kv_q8_layer_bytes=16_896,
    q4_0_layer_bytes=455_300_000,
)


def worker(name: str, gib: float, room: float | None = None) -> WorkerInfo:
    n_bytes = round(gib * GIB)
    room_bytes = None if room is None else round(room * GIB)
    return WorkerInfo(
        WorkerId(name), "127.0.0.1:1", "avx2", 4, n_bytes, n_bytes, 4e10, room_bytes=room_bytes
    )


def workers(*gib: float) -> list[WorkerInfo]:
    return [worker(f"w{i + 1}", each) for i, each in enumerate(gib)]


def refused(sizes: ModelSizes, fleet: list[WorkerInfo], asked: Asked) -> PlanError:
    with pytest.raises(PlanError) as found:
        plan(sizes, fleet, asked)
    return found.value


def can(sizes: ModelSizes, fleet: list[WorkerInfo], asked: Asked) -> Planned | None:
    try:
        return plan(sizes, fleet, asked)
    except PlanError:
        return None


def n_bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"GiB": GIB, "MiB": 2**20}[unit]


def check_cures(sizes: ModelSizes, fleet: list[WorkerInfo], asked: Asked) -> set[str]:
    """Tries each cure, and a step less; returns which kinds were named."""
    remedy = refused(sizes, fleet, asked).remedy
    kinds = set()
    if found := re.search(r"add a worker with ([\d.]+ .iB)", remedy):
        kinds.add("worker")
        step = GIB / 10 if "GiB" in found[1] else 2**20
        for size, works in ((n_bytes(found[1]), True), (n_bytes(found[1]) - 1.5 * step, False)):
            more = worker("more", size / GIB)
            assert (can(sizes, [*fleet, more], asked) is not None) is works, remedy
    if found := re.search(r"give (?:each|the) worker ([\d.]+ .iB) more --memory", remedy):
        kinds.add("memory")
        for size, works in ((n_bytes(found[1]), True), (n_bytes(found[1]) - GIB / 7, False)):
            larger = [
                replace(w, memory_free_bytes=w.memory_free_bytes + round(size)) for w in fleet
            ]
            assert (can(sizes, larger, asked) is not None) is works, remedy
    if found := re.search(r"lower --context to (\d+)", remedy):
        kinds.add("context")
        tokens = int(found[1])
        assert 0 < tokens < asked.context_tokens
        assert can(sizes, fleet, replace(asked, context_tokens=tokens)) is not None
        assert can(sizes, fleet, replace(asked, context_tokens=tokens + 256)) is None
    if found := re.search(r"--kv-type q8(?: and --context (\d+))?", remedy):
        kinds.add("q8")
        small = replace(sizes, kv_layer_bytes=sizes.kv_q8_layer_bytes)
        tokens = int(found[1] or asked.context_tokens)
        assert can(small, fleet, replace(asked, context_tokens=tokens)) is not None
    if "use q4_0" in remedy:
        kinds.add("q4_0")
        small = replace(sizes, layer_bytes=(sizes.q4_0_layer_bytes,) * sizes.n_layers)
        assert can(small, fleet, asked) is not None
    if found := re.search(r"leave (\w+) out", remedy):
        kinds.add("leave")
        assert can(sizes, [w for w in fleet if w.id != found[1]], asked) is not None
    assert kinds, remedy
    return kinds


def test_needed_and_offered_are_said_with_cures_that_work() -> None:
    asked = Asked(4096)
    error = refused(LLAMA_65B, workers(16, 16, 8), asked)
    assert "needs 45.7 GiB (34.3 GiB of weights, 10.0 GiB of KV" in error.message
    assert "3 workers offer 40.0 GiB" in error.message
    kinds = check_cures(LLAMA_65B, workers(16, 16, 8), asked)
    assert kinds == {"worker", "memory", "context"}


def test_smaller_kv_is_a_cure_if_it_is_enough() -> None:
    kinds = check_cures(LLAMA_65B, workers(16, 16, 10), Asked(4096))
    assert "q8" in kinds
    assert "use --kv-type q8" in refused(LLAMA_65B, workers(16, 16, 10), Asked(4096)).remedy
    q8 = replace(LLAMA_65B, kv_layer_bytes=LLAMA_65B.kv_q8_layer_bytes)
    assert "q8" not in refused(q8, workers(16, 12, 8), Asked(4096)).remedy


def test_smaller_weights_are_a_cure_if_they_are_enough() -> None:
    f16 = replace(LLAMA_65B, layer_bytes=(1_600_000_000,) * 80)
    assert "q4_0" in check_cures(f16, workers(16, 16, 16), Asked(2048))
    assert "q4_0" not in check_cures(LLAMA_65B, workers(16, 16), Asked(2048))


def test_cures_work_for_random_machines() -> None:
    rng = random.Random("cures")
    kinds: set[str] = set()
    for i in range(60):
        fleet = workers(*(rng.uniform(1, 14) for _ in range(rng.randint(1, 4))))
        asked = Asked(rng.choice([512, 2048, 4096, 8192]), every_worker=i % 3 == 0)
        if can(LLAMA_65B, fleet, asked) is None:
            kinds |= check_cures(LLAMA_65B, fleet, asked)
    assert kinds >= {"worker", "memory", "context", "q8"}


def test_a_worker_too_small_for_its_part_is_to_be_left_out() -> None:
    asked = Asked(2048, every_worker=True)
    error = refused(LLAMA_65B, workers(32, 16, 0.4), asked)
    assert "w3 offers 409.6 MiB, too little for its part" in error.message
    assert "leave" in check_cures(LLAMA_65B, workers(32, 16, 0.4), asked)
    assert can(LLAMA_65B, workers(32, 16, 0.4), Asked(2048)) is not None  # nobody asked for it


def test_memory_beside_mapped_weights_is_said() -> None:
    fleet = [worker("a", 60, room=1.2), worker("b", 60, room=1.2)]
    assert SCRATCH_BYTES < GIB
    error = refused(LLAMA_65B, fleet, Asked(4096))
    assert "of that 2.4 GiB are memory" in error.message
    assert "--memory" in error.remedy


def test_limits_that_forbid_every_plan_are_said() -> None:
    fleet = workers(40, 40)
    a, b = (w.id for w in fleet)

    def message(**limits: tuple[int, int]) -> str:
        given = {WorkerId(name): WorkerLimits(layers=layers) for name, layers in limits.items()}
        with pytest.raises(PlanError) as found:
            plan(LLAMA_65B, fleet, Asked(2048), limits=given)
        return found.value.message

    assert message(w1=(0, 30), w2=(0, 30)) == (
        "limits allow the workers 60 layers in all, the model has 80"
    )
    assert "ask the workers for 100 layers" in message(w1=(50, 60), w2=(50, 60))
    fleet = workers(40, 8)
    assert message(w2=(30, 40)) == "limits ask w2 for 30 layers at least, it has room for 15"
    with pytest.raises(PlanError, match="every worker is excluded"):
        plan(LLAMA_65B, fleet, Asked(2048), limits={i: WorkerLimits(exclude=True) for i in (a, b)})
