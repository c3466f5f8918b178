"""What people are told of a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.planner import Asked, ModelSizes, plan
from potluck.plan import LayerTimes, LinkFigures, Links, WorkerId, WorkerInfo

GB = 10**9
LLAMA_7B = ModelSizes((113_800_000,) * 32, 74_000_000, 107_500_000, 16_384, GB // 2, 16_384)


def worker(name: str, speed: float, memory: float, *, timed: bool = True) -> WorkerInfo:
    """Rows cost nothing up to 6.8 of them, as where multiplying is 12 times as fast as reading."""
    t_mem, t_row = 0.1138 / speed, 0.1138 / speed / 6.754
    rows = (1, 2, 3, 4, 6, 8, 12, 16, 32)
    seconds = tuple((t_mem**4 + (m * t_row) ** 4) ** 0.25 for m in rows)
    times = LayerTimes(113_800_000, rows, seconds, 107_500_000, seconds[0] * 0.94)
    n_bytes = round(memory * GB)
    return WorkerInfo(
        WorkerId(name),
        "127.0.0.1:1",
        "avx2",
        4,
        n_bytes,
        n_bytes,
        speed * GB,
        times=times if timed else None,
    )


THREE = [worker("a", 50, 16), worker("b", 20, 16), worker("c", 8, 8)]


def test_one_machine_that_is_faster_is_named_with_the_number_up_to_which_it_is() -> None:
    pair = plan(LLAMA_7B, THREE, Asked(16, slowest_weight=3.0))
    assert {stage.worker for stage in pair.plan.stages} == {"a", "b"}
    words = pair.advice[0].split()
    assert " ".join(words[:7]) == "a alone is faster up to about"
    n = int(words[7])
    assert 7 <= n <= 11
    alone = plan(LLAMA_7B, THREE[:1], Asked(16)).forecast
    assert alone.tokens_per_second(n) > pair.forecast.tokens_per_second(n)
    assert alone.tokens_per_second(n + 1) <= pair.forecast.tokens_per_second(n + 1)
    single = plan(LLAMA_7B, THREE, Asked(16))
    assert len(single.plan.stages) == 1
    assert single.advice[0].startswith("a alone is faster up to about ")  # compared with a plan
    assert single.advice[0].endswith(" together are")  # for many answers


def test_of_a_machine_that_is_always_faster_no_number_is_said() -> None:
    fleet = [worker("a", 50, 64), worker("z", 0.5, 64)]
    found = plan(LLAMA_7B, fleet, Asked(16))
    assert found.advice == (
        "a alone is faster than any pipeline of these workers",
        "z holds nothing: with more stages answers would not be 3 % faster",
    )


def test_a_plan_of_every_worker_says_what_leaving_some_out_would_give() -> None:
    every = plan(LLAMA_7B, THREE, Asked(16, every_worker=True))
    best = plan(LLAMA_7B, THREE, Asked(16))
    gain = best.forecast.tokens_per_second() / every.forecast.tokens_per_second()
    assert every.advice == (f"a alone is faster: one answer would be {gain:.1f} times as fast",)
    small = [worker("a", 50, 3), worker("b", 50, 3), worker("c", 1, 3)]
    found = plan(LLAMA_7B, small, Asked(16, every_worker=True))
    assert found.advice[0].startswith("without c, one answer would be ")
    same = [worker(name, 50, 3) for name in "ab"]
    assert plan(LLAMA_7B, same, Asked(16, every_worker=True)).advice == ()


def test_slow_links_little_kv_and_guessed_times_are_said() -> None:
    fleet = [worker("a", 50, 3), worker("b", 50, 3, timed=False)]
    slow = Links(LinkFigures(0.2, 1e6))
    found = plan(LLAMA_7B, fleet, Asked(2048, 8), links=slow)
    text = "\n".join(found.advice)
    assert "% of an answer's time, the one from a to b " in text
    assert "KV has room for 1 session with a full context of 2048 tokens, not for 8" in text
    assert "b was not timed with several rows" in text
    fine = plan(LLAMA_7B, [worker("a", 50, 30)], Asked(2048, 8))
    assert fine.advice == ()


@pytest.mark.parametrize("n", [2, 5, 30])
def test_many_names_are_counted(n: int) -> None:
    fleet = [
        worker("a", 50, 64),
        *(replace(worker("z", 0.5, 64), id=WorkerId(f"z{i}")) for i in range(n)),
    ]
    spare = plan(LLAMA_7B, fleet, Asked(16)).advice[1]
    names = {
        2: "z0 and z1 hold",
        5: "z0, z1, z2 and 2 more hold",
        30: "z0, z1, z2 and 27 more hold",
    }
    assert spare.startswith(names[n])
