"""How fast a plan will be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.asked import Asked
from coordinator.forecast import Forecast, chunk_of, forecast_of, groups, shared
from coordinator.layer_times import speed_of
from coordinator.sizes import ModelSizes
from potluck.errors import PlanError
from potluck.plan import (
    DiskFigures,
    LayerTimes,
    LinkFigures,
    Links,
    Plan,
    Span,
    Stage,
    WorkerId,
    WorkerInfo,
)

MB = 1_000_000
SIZES = ModelSizes((100 * MB,) * 4, 8 * MB, 50 * MB, 1000, 0, row_bytes=20_000)
NO_LINKS = Links(LinkFigures(0.0, 1e15), hand_over_seconds=0.0)


def worker(name: str, speed: float = 10e9, **changes: object) -> WorkerInfo:
    found = WorkerInfo(WorkerId(name), "127.0.0.1:1", "avx2", 2, 10**10, 10**10, speed)
    return replace(found, **changes)  # type: ignore[arg-type]  # by field name


def plan(*counts: int) -> Plan:
    stages, at, last = [], 0, len(counts) - 1
    for i, n in enumerate(counts):
        span = Span(at, at + n)
        stages.append(Stage(WorkerId(f"w{i + 1}"), span, i == 0, i == last, 0, 0))
        at += n
    return Plan(at, tuple(stages))


def forecast(
    plan: Plan,
    *workers: WorkerInfo,
    links: Links = NO_LINKS,
    positions: int = 0,
    stored: dict[WorkerId, frozenset[int]] | None = None,
) -> Forecast:
    return forecast_of(plan, SIZES, workers, links, positions, stored or {})


def test_one_row_takes_the_bytes_over_the_read_bandwidth_until_times_are_measured() -> None:
    speed = speed_of(SIZES, worker("w1"))
    assert speed.layer_seconds(1) == pytest.approx(0.010)
    assert speed.head_seconds(1) == pytest.approx(0.005)
    assert speed.layer_seconds(2) < 0.011  # few rows are nearly free,
    assert speed.layer_seconds(64) == pytest.approx(0.010 * 64 / 3, rel=0.01)  # many are not


def test_measured_times_are_interpolated_scaled_and_go_on_as_steep() -> None:
    times = LayerTimes(50 * MB, (1, 2, 4, 8), (0.004, 0.004, 0.006, 0.014), 25 * MB, 0.003)
    speed = speed_of(SIZES, worker("w1", times=times))
    found = [speed.layer_seconds(m) for m in (1, 2, 3, 4, 6, 8, 10)]
    assert found == pytest.approx([0.008, 0.008, 0.010, 0.012, 0.020, 0.028, 0.036])
    assert speed.head_seconds(1) == pytest.approx(0.006)
    assert speed.head_seconds(8) == pytest.approx(0.006 * 14 / 4)


def test_a_single_measured_count_of_rows_grows_as_assumed() -> None:
    times = LayerTimes(100 * MB, (1,), (0.02,), 0, 1.0)
    speed = speed_of(SIZES, worker("w1", times=times))
    assert speed.layer_seconds(1) == pytest.approx(0.02)
    assert speed.layer_seconds(30) == pytest.approx(0.2, rel=0.01)
    assert speed.head_seconds(1) == pytest.approx(0.01)  # no head was measured: by its bytes


def test_a_sweep_is_all_stages_and_links_and_a_slot_the_slowest() -> None:
    links = Links(
        LinkFigures(0.002, 1e15),
        {(WorkerId("w1"), WorkerId("w2")): LinkFigures(0.010, 1e6)},
        hand_over_seconds=0.0005,
    )
    found = forecast(plan(1, 3), worker("w1"), worker("w2"), links=links)
    between = 0.005 + 20_100 / 1e6
    assert found.sweep_seconds() == pytest.approx(0.0105 + 0.0355 + between + 2 * 0.001)
    assert found.slot_seconds() == pytest.approx(0.0355)
    assert found.slot_seconds(3) == pytest.approx(60_100 / 1e6)  # the link, now
    assert found.slowest_stage().worker == "w2"
    assert found.slowest_link().target == "w2"
    assert [link.source for link in found.links] == ["", "w1", "w2"]


def test_a_link_known_in_one_direction_is_as_fast_in_the_other() -> None:
    a, b, c = WorkerId("a"), WorkerId("b"), WorkerId("c")
    slow = LinkFigures(1.0, 1.0)
    assert Links(between={(a, b): slow}).of(b, a) is slow
    assert Links(between={(a, b): slow}).of(a, c) == Links().default


def test_kv_is_read_for_each_row_of_each_session() -> None:
    found = forecast(plan(4), worker("w1"), positions=1000)
    empty = forecast(plan(4), worker("w1"))
    kv = 1000 * 1000 * 4 / 10e9
    assert found.sweep_seconds(1) - empty.sweep_seconds(1) == pytest.approx(kv)
    assert found.sweep_seconds(3) - empty.sweep_seconds(3) == pytest.approx(3 * kv)


def test_sessions_are_spread_over_steps() -> None:
    assert groups(8) == [(1, 8), (2, 4), (3, 3), (4, 2), (8, 1)]
    flat = LayerTimes(100 * MB, (1, 64), (0.01, 0.01), 50 * MB, 0.005)
    found = forecast(plan(2, 2), worker("w1", times=flat), worker("w2", times=flat))
    assert found.tokens_per_second(1) == pytest.approx(1 / 0.045)
    assert found.steps(64) == (1, 64)
    assert found.tokens_per_second(64) == pytest.approx(64 / 0.045)  # rows are free here,
    steep = LayerTimes(100 * MB, (1, 2), (0.01, 0.02), 50 * MB, 0.005)
    found = forecast(plan(2, 2), worker("w1", times=steep), worker("w2", times=steep))
    assert found.steps(2) == (2, 1)
    assert found.tokens_per_second(2) == pytest.approx(2 / 0.050)  # and here only slots are shared


def test_chunks_of_a_prompt_follow_one_another_a_slot_apart() -> None:
    flat = LayerTimes(100 * MB, (1, 64), (0.01, 0.02), 50 * MB, 0.005)
    found = forecast(plan(2, 2), worker("w1", times=flat), worker("w2", times=flat))
    slot = 2 * (0.02 + 256 * 1000 / 10e9)  # a chunk's rows share the KV they read
    assert found.first_token_seconds(512, 64) == pytest.approx((8 + 2 - 1) * slot + 0.005)
    assert found.first_token_seconds(512) == found.first_token_seconds(512, chunk_of(2))
    assert found.first_token_seconds(1, 64) == pytest.approx(0.045)


def test_loading_takes_what_is_missing_over_the_slower_of_link_and_disk() -> None:
    disk = DiskFigures(10**12, 2e9, 0.5e9)
    fast = Links(LinkFigures(0.0, 1e9))
    workers = [worker("w1", disk=disk), worker("w2")]
    found = forecast(plan(2, 2), *workers, links=fast)
    assert found.load_seconds == pytest.approx({"w1": 0.208 / 0.5 + 0.208 / 2, "w2": 0.25})
    assert found.whole_load_seconds == pytest.approx(0.52)
    no_disk = forecast(plan(2, 2), worker("w1"), worker("w2"), links=fast)
    assert no_disk.whole_load_seconds == pytest.approx(0.208 + 0.25)  # both share one line
    stored = {WorkerId("w1"): frozenset({0, 1}), WorkerId("w2"): frozenset({2})}
    found = forecast(plan(2, 2), *workers, links=fast, stored=stored)
    assert found.load_seconds == pytest.approx({"w1": 0.208 / 2, "w2": 0.15})


def test_sessions_go_to_the_pipeline_where_they_add_most() -> None:
    steep = LayerTimes(100 * MB, (1, 2), (0.01, 0.02), 50 * MB, 0.005)
    fast = forecast(plan(4), worker("w1", times=steep))
    slow = forecast(plan(4), worker("w1", times=replace(steep, seconds=(0.02, 0.04))))
    assert shared([slow, fast], 1) == pytest.approx(fast.tokens_per_second(1))
    both = slow.tokens_per_second(1) + fast.tokens_per_second(1)
    assert shared([slow, fast], 2) == pytest.approx(both)
    assert shared([fast], 7) == pytest.approx(fast.tokens_per_second(7))


@pytest.mark.parametrize(
    "wrong",
    [
        {"context_tokens": 0},
        {"sessions": 0},
        {"max_sessions": 0},
        {"slowest_weight": -1.0},
        {"slowest_weight": float("nan")},
        {"positions": -1},
    ],
)
def test_what_cannot_be_asked_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError):
        Asked(**{"context_tokens": 64, **wrong})  # type: ignore[arg-type]  # by field name


def test_kv_is_timed_with_a_question_and_half_of_its_answer() -> None:
    assert Asked(64).timed_positions == 32
    assert Asked(4096).timed_positions == 256
    assert Asked(4096, positions=1000).timed_positions == 1000
