"""Plans that were worked out by hand: LLaMA-65B and 7B in Q4_0 on unequal machines.

0.3 ms a link, no KV, half a gigabyte of margin on each machine.
"""

from __future__ import annotations

import pytest

from coordinator.planner import Asked, ModelSizes, Planned, Rules, plan
from potluck.plan import LayerTimes, LinkFigures, Links, WorkerId, WorkerInfo

GB = 10**9
EXACT = Rules(stage_worth=0.0, near=0.0)
LINKS = Links(LinkFigures(0.6e-3, 1e15), hand_over_seconds=0.0)


def model(n_layers: int, layer: float, head: float, embedding: float) -> ModelSizes:
    sizes = [round(x * GB) for x in (layer, head, embedding, 0.5)]
    return ModelSizes((sizes[0],) * n_layers, sizes[2], sizes[1], 0, sizes[3], row_bytes=0)


LLAMA_65B = model(80, 0.4553, 0.215, 0.147)
LLAMA_7B = model(32, 0.1138, 0.1075, 0.074)


def worker(name: str, speed: float, memory: float, macs: float = 0.0) -> WorkerInfo:
    """GB/s, GB, and 1e12 multiplications a second: then the times of a 7B layer are known, too."""
    times = None
    if macs:
        t_mem, t_row = 0.1138 / speed, 0.1138 / 0.5625 / (1000 * macs)
        rows = tuple(range(1, 33))
        seconds = tuple((t_mem**4 + (m * t_row) ** 4) ** 0.25 for m in rows)
        times = LayerTimes(
            LLAMA_7B.layer_bytes[0], rows, seconds, LLAMA_7B.head_bytes, seconds[0] * 0.9446
        )
    n_bytes = round(memory * GB)
    return WorkerInfo(
        WorkerId(name), "127.0.0.1:1", "avx2", 4, n_bytes, n_bytes, speed * GB, times=times
    )


FOUR = [worker("a", 60, 32), worker("b", 50, 16), worker("c", 40, 16), worker("d", 20, 8)]
THREE = [
    worker("a", 50, 16, 0.6),
    worker("b", 20, 16, 0.24),
    worker("c", 8, 8, 0.096),
]


def layers(found: Planned) -> dict[str, int]:
    return {stage.worker: stage.span.n_layers for stage in found.plan.stages}


def exactly(sizes: ModelSizes, workers: list[WorkerInfo], weight: float) -> Planned:
    return plan(sizes, workers, Asked(16, slowest_weight=weight), links=LINKS, rules=EXACT)


# At 0.5 the plan for a little less costs the same: moving a layer from a to c, 3.794 ms either way.
@pytest.mark.parametrize(
    ("weight", "expected", "sweep_ms", "slot_ms", "one", "most"),
    [
        (0, {"a": 68, "b": 12}, 630, 520, 1.59, 1.9),
        (0.499, {"a": 45, "b": 34, "c": 1}, 667, 345, 1.50, 2.9),
        (1, {"a": 32, "b": 27, "c": 21}, 733, 246, 1.37, 4.1),
        (3, {"a": 32, "b": 27, "c": 21}, 733, 246, 1.37, 4.1),
        (100, {"a": 28, "b": 24, "c": 19, "d": 9}, 857, 219, 1.17, 4.6),
    ],
)
def test_65b_on_four_machines(
    weight: float,
    expected: dict[str, int],
    sweep_ms: float,
    slot_ms: float,
    one: float,
    most: float,
) -> None:
    found = exactly(LLAMA_65B, FOUR, weight)
    assert layers(found) == expected
    assert found.plan.stages[-1].worker == "a"
    sweep, slot = found.forecast.sweep_seconds(), found.forecast.slot_seconds()
    assert 1000 * sweep == pytest.approx(sweep_ms, abs=0.51)
    assert 1000 * slot == pytest.approx(slot_ms, abs=0.51)
    assert found.forecast.tokens_per_second(1) == pytest.approx(one, abs=0.005)
    assert 1 / slot == pytest.approx(most, abs=0.05)


def test_between_two_equal_costs_the_better_balanced_plan_is_taken() -> None:
    found = exactly(LLAMA_65B, FOUR, 0.5).forecast
    assert found.sweep_seconds() + found.slot_seconds() / 2 == pytest.approx(0.83977, abs=1e-5)
    assert found.slot_seconds() < 0.345


@pytest.mark.parametrize(
    ("weight", "expected", "one", "most"),
    [
        (0, {"a": 32}, 13.2, 13.3),
        (1, {"a": 32}, 13.2, 13.3),
        (3, {"a": 23, "b": 9}, 9.4, 18.4),
        (100, {"a": 21, "b": 8, "c": 3}, 7.2, 20.0),
    ],
)
def test_7b_on_three_machines(
    weight: float, expected: dict[str, int], one: float, most: float
) -> None:
    found = exactly(LLAMA_7B, THREE, weight)
    assert layers(found) == expected
    assert found.forecast.tokens_per_second(1) == pytest.approx(one, abs=0.06)
    assert 1 / found.forecast.slot_seconds() == pytest.approx(most, abs=0.06)


@pytest.mark.parametrize(
    ("weight", "totals"),
    [
        (0, {1: 13.2, 4: 51, 8: 81, 12: 88, 32: 90}),
        (3, {1: 9.4, 4: 37, 8: 71, 12: 98, 32: 123}),
        (100, {1: 7.2, 4: 29, 8: 56, 12: 78, 32: 127}),
    ],
)
def test_total_tokens_a_second_of_7b(weight: float, totals: dict[int, float]) -> None:
    found = exactly(LLAMA_7B, THREE, weight).forecast
    for sessions, total in totals.items():
        assert found.tokens_per_second(sessions) == pytest.approx(total, rel=0.02), sessions


def test_for_many_answers_at_once_more_machines_are_used() -> None:
    used = []
    for n in (1, 4, 8, 16, 32):
        found = plan(LLAMA_7B, THREE, Asked(16, sessions=n), links=LINKS)
        used.append(3 - len(found.spares))
    assert used[:2] == [1, 1]
    assert used[-1] > 1
    assert used == sorted(used)


def test_a_further_stage_has_to_pay_for_itself() -> None:
    assert layers(plan(LLAMA_65B, FOUR, Asked(16), links=LINKS)).keys() == {"a", "b"}
    generous = plan(LLAMA_65B, FOUR, Asked(16, slowest_weight=100.0), links=LINKS)
    assert len(layers(generous)) == 4  # 219 ms and not 246
    weak = [*THREE[:2], worker("c", 0.4, 8)]
    found = plan(LLAMA_7B, weak, Asked(16, slowest_weight=100.0), links=LINKS)
    assert layers(found).keys() == {"a", "b"}
    assert found.spares == ("c",)
