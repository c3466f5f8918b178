"""Which worker holds which layers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.planner import Asked, ModelSizes, kv_tokens, plan, plan_for, sizes_of
from potluck import gguf, model
from potluck.errors import PlanError
from potluck.model import SCRATCH_BYTES, passing_bytes
from potluck.plan import WorkerId, WorkerInfo
from potluck.testing import TinyShape, write_tiny

MB = 1_000_000


def worker(
    name: str, free: int = 1000 * MB, speed: float = 10e9, room: int | None = None
) -> WorkerInfo:
    return WorkerInfo(WorkerId(name), "127.0.0.1:1", "avx2", 2, free, free, speed, room_bytes=room)


def workers(*speeds: float, free: int = 1000 * MB) -> list[WorkerInfo]:
    return [worker(f"w{i + 1}", free, speed * 1e9) for i, speed in enumerate(speeds)]


def sizes(n_layers: int = 12, layer: int = 10 * MB, **changes: int) -> ModelSizes:
    given = {"embedding_bytes": 0, "head_bytes": 0, "kv_layer_bytes": 1000, "scratch_bytes": 0}
    return ModelSizes(layer_bytes=(layer,) * n_layers, **{**given, **changes})


def spans(sizes: ModelSizes, fleet: list[WorkerInfo], context: int = 64) -> dict[str, int]:
    plan = plan_for(sizes, fleet, context, max_sessions=1)
    return {stage.worker: stage.span.n_layers for stage in plan.stages}


def test_equal_workers_get_equal_spans_in_the_order_they_came() -> None:
    plan = plan_for(sizes(12), workers(10, 10, 10), 64, 1)
    assert [(s.worker, str(s.span)) for s in plan.stages] == [
        ("w1", "[0, 4)"),
        ("w2", "[4, 8)"),
        ("w3", "[8, 12)"),
    ]


def test_a_worker_of_twice_the_bandwidth_gets_twice_the_layers() -> None:
    assert spans(sizes(12), workers(10, 20)) == {"w1": 4, "w2": 8}


def test_the_head_counts_as_layers_of_its_stage() -> None:
    assert spans(sizes(10, head_bytes=20 * MB), workers(10, 10)) == {"w1": 6, "w2": 4}


def test_the_fastest_worker_takes_the_head_if_that_makes_the_slowest_stage_faster() -> None:
    plan = plan_for(sizes(2, head_bytes=100 * MB), workers(100, 10), 64, 1)
    assert [stage.worker for stage in plan.stages] == ["w2", "w1"]


def test_a_few_percent_of_bandwidth_change_no_order() -> None:
    plan = plan_for(sizes(9, head_bytes=10 * MB), workers(17.9, 17.8, 18.2), 64, 1)
    assert [stage.worker for stage in plan.stages] == ["w1", "w2", "w3"]


def test_a_small_worker_gets_what_it_has_room_for() -> None:
    fleet = [worker("small", free=25 * MB), worker("large")]
    assert spans(sizes(12), fleet) == {"small": 2, "large": 10}


def test_embeddings_lie_where_there_is_room_for_them() -> None:
    fleet = [worker("small", free=30 * MB), worker("large")]
    plan = plan_for(sizes(4, embedding_bytes=100 * MB), fleet, 64, 1)
    assert plan.stages[0].worker == "large"


def test_every_worker_gets_a_layer_however_slow() -> None:
    assert spans(sizes(4), workers(1000, 0.001)) == {"w1": 3, "w2": 1}


def test_a_bandwidth_that_was_not_measured_still_makes_a_plan() -> None:
    assert spans(sizes(4), workers(0, 0)) == {"w1": 2, "w2": 2}


def test_one_worker_holds_everything() -> None:
    plan = plan_for(sizes(12), workers(10), 64, 1)
    assert (plan.stages[0].embeds, plan.stages[0].has_head) == (True, True)


def test_memory_of_a_stage_is_weights_kv_scratch_and_its_end() -> None:
    s = sizes(2, layer=100, embedding_bytes=7, head_bytes=11, kv_layer_bytes=2, scratch_bytes=1000)
    plan = plan_for(s, workers(10, 10), context_tokens=16, max_sessions=1)
    assert [stage.kv_bytes for stage in plan.stages] == [32, 32]
    assert [stage.memory_bytes for stage in plan.stages] == [1139, 1143]


def test_kv_holds_all_sessions_if_there_is_room() -> None:
    s = sizes(4)
    assert kv_tokens(plan_for(s, workers(10, 10), 100, 8), s) == 8 * 112  # whole pages of 16


def test_kv_shrinks_before_the_plan_is_refused() -> None:
    s = sizes(1, layer=MB, kv_layer_bytes=1000)
    plan = plan_for(s, [worker("a", free=MB + 3 * 64_000)], context_tokens=64, max_sessions=8)
    assert kv_tokens(plan, s) == 2 * 64


def test_kv_is_never_planned_onto_the_disk_that_mapped_weights_may_use() -> None:
    s = sizes(10, kv_layer_bytes=10_000)
    fits = 20 * MB + SCRATCH_BYTES + 2 * 10 * 640_000  # two layers, buffers, two contexts
    on_disk = worker("a", room=fits)
    assert kv_tokens(plan_for(s, [worker("a")], 64, 8), s) == 8 * 64
    assert kv_tokens(plan_for(s, [on_disk], 64, 8), s) == 2 * 64
    # A head passes through memory as a layer does, and KV then moves to who has room for it.
    s = sizes(10, kv_layer_bytes=10_000, head_bytes=12 * MB)
    assert kv_tokens(plan_for(s, [on_disk], 64, 8), s) == 64
    plan = plan_for(s, [worker("b"), on_disk], 64, 8)
    assert kv_tokens(plan, s) == 8 * 64
    assert plan.stages[-1].kv_bytes <= fits - 2 * 12 * MB - SCRATCH_BYTES


def test_too_little_room_for_kv_beside_mapped_weights_is_said() -> None:
    fleet = [worker("a", room=SCRATCH_BYTES), worker("b", room=2 * MB)]
    with pytest.raises(PlanError, match=r"of that 145\.0 MiB are memory, which KV, buffers"):
        plan_for(sizes(12), fleet, 64, 1)


def test_too_little_memory_is_refused_with_numbers_and_a_remedy() -> None:
    with pytest.raises(PlanError, match=r"needs 1\.1 GiB .* 2 workers offer 190\.7 MiB") as refused:
        plan_for(sizes(12, layer=100 * MB), workers(10, 10, free=100 * MB), 64, 1)
    assert "--memory" in refused.value.remedy


def test_one_worker_that_is_too_small_is_named() -> None:
    fleet = [worker("tiny", free=MB), worker("large")]
    with pytest.raises(PlanError, match=r"tiny offers 1\.0 MiB, too little"):
        plan_for(sizes(12), fleet, 64, 1)


def test_a_single_worker_that_is_too_small_is_told_so() -> None:
    with pytest.raises(PlanError, match=r"1 worker offers"):
        plan_for(sizes(12), [worker("a", free=MB)], 64, 1)


def test_more_workers_than_layers_are_refused() -> None:
    with pytest.raises(PlanError, match="3 workers can't share 2 layers") as refused:
        plan_for(sizes(2), workers(1, 1, 1), 64, 1)
    assert "--workers 2" in refused.value.remedy


def test_no_worker_is_refused() -> None:
    with pytest.raises(PlanError, match="no worker"):
        plan_for(sizes(2), [], 64, 1)
    with pytest.raises(PlanError, match="no worker"):
        plan(sizes(2), [], Asked(64))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(PlanError, match="no layers"):
        sizes(0)


def test_sizes_come_from_the_file(tmp_path: Path) -> None:
    file = gguf.read(write_tiny(tmp_path / "tiny.gguf", TinyShape(n_layers=3)))
    config = model.config_of(file)
    found = sizes_of(file, config, step_tokens=64)
    assert found.n_layers == 3
    assert found.kv_layer_bytes == 2 * config.n_kv_heads * config.head_dim * 2
    q8 = sizes_of(file, config, 64, model.KvType.Q8)
    assert q8 == replace(found, kv_layer_bytes=2 * config.n_kv_heads * (config.head_dim + 4))
    assert found.row_bytes == 4 * config.dim
    assert sizes_of(file, config, 64, wire="f16").row_bytes == 2 * config.dim
    assert sizes_of(file, config, 64, wire="q8").row_bytes == config.dim * 34 // 32
    assert found.weight_bytes == sum(tensor.size_bytes for tensor in file.tensors.values())


fleets = st.lists(st.tuples(st.integers(1, 60), st.floats(0.5, 50)), min_size=1, max_size=5).map(
    lambda found: [worker(f"w{i}", m * MB, s * 1e9) for i, (m, s) in enumerate(found)]
)
models = st.builds(
    lambda layers, ends, kv: ModelSizes(tuple(n * MB for n in layers), ends[0], ends[1], kv, 1000),
    st.lists(st.integers(1, 6), min_size=5, max_size=14),
    st.tuples(st.integers(0, 5 * MB), st.integers(0, 5 * MB)),
    st.integers(1, 20_000),
)


@given(model=models, fleet=fleets, sessions=st.integers(1, 9))
def test_a_plan_is_never_over_a_workers_memory(
    model: ModelSizes, fleet: list[WorkerInfo], sessions: int
) -> None:
    try:
        plan = plan_for(model, fleet, 32, sessions)
    except PlanError:
        return
    free = {w.id: w.memory_free_bytes for w in fleet}
    assert {stage.worker for stage in plan.stages} == set(free)  # each is used; Plan checks layers
    assert all(stage.memory_bytes <= free[stage.worker] for stage in plan.stages)
    assert 32 <= kv_tokens(plan, model) <= 32 * sessions


@given(model=models, rooms=st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_kv_and_what_passes_fit_into_the_memory_of_workers_that_map(
    model: ModelSizes, rooms: list[int]
) -> None:
    room = {f"w{i}": SCRATCH_BYTES + n * MB for i, n in enumerate(rooms)}
    try:
        plan = plan_for(model, [worker(name, room=n) for name, n in room.items()], 32, 8)
    except PlanError:
        return
    for stage in plan.stages:
        units = [*model.layer_bytes[stage.span.start : stage.span.stop]]
        units += [model.head_bytes] if stage.has_head else []
        least = passing_bytes(units) + SCRATCH_BYTES
        assert stage.kv_bytes + least <= room[stage.worker]


@given(fleet=fleets, n_layers=st.integers(5, 9), head=st.integers(0, 3 * MB))
def test_no_other_split_of_equal_layers_has_a_faster_slowest_stage(
    fleet: list[WorkerInfo], n_layers: int, head: int
) -> None:
    model = sizes(n_layers, layer=MB, head_bytes=head, kv_layer_bytes=1)
    try:
        plan = plan_for(model, fleet, 16, 1)
    except PlanError:
        return
    order = [next(w for w in fleet if w.id == stage.worker) for stage in plan.stages]

    def slowest(counts: tuple[int, ...]) -> float:
        ends = [0] * (len(order) - 1) + [head]
        return max(
            (n * MB + end) / w.read_bytes_per_second
            for n, end, w in zip(counts, ends, order, strict=True)
        )

    rooms = [
        (w.memory_free_bytes - (head if i == len(order) - 1 else 0)) // (MB + 16)
        for i, w in enumerate(order)
    ]
    possible = (
        counts
        for counts in product(*(range(1, min(room, n_layers) + 1) for room in rooms))
        if sum(counts) == n_layers
    )
    best = min(slowest(counts) for counts in possible)
    found = slowest(tuple(stage.span.n_layers for stage in plan.stages))
    assert found == pytest.approx(best)
