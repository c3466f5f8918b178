"""Plans of many workers: several pipelines, and few sets looked at."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from coordinator import arranging
from coordinator.goal import Rules, goal_of
from coordinator.layout import Task, lay_out
from coordinator.planner import Asked, ModelSizes, Planned, plan
from coordinator.pool import fits, pool_of
from coordinator.replicas import fleet_of
from coordinator.routes import Routes
from coordinator.search import search
from potluck.plan import LinkFigures, Links, WorkerId, WorkerInfo

GB = 10**9
LLAMA_65B = ModelSizes(
    (round(0.4553 * GB),) * 80, round(0.147 * GB), round(0.215 * GB), 32_768, GB // 2, 32_768
)
LLAMA_7B = ModelSizes(
    (round(0.1138 * GB),) * 32, round(0.074 * GB), round(0.1075 * GB), 16_384, GB // 5, 16_384
)


def worker(name: str, speed: float, memory: float) -> WorkerInfo:
    n_bytes = round(memory * GB)
    return WorkerInfo(WorkerId(name), "127.0.0.1:1", "avx2", 4, n_bytes, n_bytes, speed * GB)


def alike(n: int, speed: float = 40, memory: float = 16) -> list[WorkerInfo]:
    return [worker(f"w{i}", speed, memory) for i in range(n)]


def unlike(n: int, seed: int = 1) -> list[WorkerInfo]:
    rng = random.Random(seed)
    memories = [6, 8, 12, 16, 24, 32]
    return [worker(f"w{i}", rng.uniform(8, 60), rng.choice(memories)) for i in range(n)]


def measured(workers: list[WorkerInfo], seed: int = 2) -> Links:
    rng = random.Random(seed)
    ids = [WorkerId(""), *(w.id for w in workers)]
    return Links(
        between={
            (a, b): LinkFigures(rng.uniform(0.2e-3, 6e-3), rng.uniform(2e7, 1.2e8))
            for a in ids
            for b in ids
            if a != b
        }
    )


def check(found: Planned, workers: list[WorkerInfo]) -> None:
    """Plan itself checks that each layer is there once."""
    memory = {w.id: w.memory_free_bytes for w in workers}
    used = [stage for each in (found.plan, *found.replicas) for stage in each.stages]
    assert all(stage.memory_bytes <= memory[stage.worker] for stage in used)
    names = [stage.worker for stage in used] + list(found.spares)
    assert sorted(names) == sorted(memory)  # each once: disjoint pipelines, and the spares


@pytest.mark.parametrize("sessions", [1, 8, 40])
@pytest.mark.parametrize("kind", ["alike", "unlike", "unlike links"])
def test_two_hundred_workers_are_planned_from_few_sets(kind: str, sessions: int) -> None:
    workers = alike(200) if kind == "alike" else unlike(200)
    links = measured(workers) if kind == "unlike links" else Links()
    task = Task(LLAMA_65B, Asked(2048, 8, sessions), links)
    layout = lay_out(task, workers, sessions)
    assert layout is not None
    assert layout.evaluations <= 40  # of 2 ** 200 sets
    found = plan(LLAMA_65B, workers, task.asked, links=links)
    check(found, workers)
    assert found == plan(LLAMA_65B, workers, task.asked, links=links)  # and again the same


def test_moves_come_near_the_exact_search() -> None:
    """Nine unlike workers are searched exactly; a tenth to thirteenth that is useless are not."""
    for seed in range(12):
        few = unlike(9, seed)
        useless = [worker(f"x{i}", 0.01 + i * 1e-6, 3) for i in range(4)]
        for sessions in (1, 6):
            task = Task(LLAMA_65B, Asked(2048, 1, sessions))
            exact, near = (lay_out(task, ws, sessions) for ws in (few, [*few, *useless]))
            if exact is None:
                continue
            assert near is not None
            assert near.score <= exact.score * 1.02


def test_as_many_pipelines_as_give_the_best_total() -> None:
    """Four machines hold 65B; 40 of them ten times."""
    workers = alike(40)
    one = plan(LLAMA_65B, workers, Asked(2048, 1, 1))
    assert (len(one.plan.stages), one.replicas) == (3, ())
    many = plan(LLAMA_65B, workers, Asked(2048, 40, 40))
    check(many, workers)
    assert len(many.replicas) >= 5
    alone = many.forecast.tokens_per_second(40)
    assert many.tokens_per_second(40) > 2 * alone
    totals = [many.tokens_per_second(n) for n in (1, 2, 10, 40)]
    assert all(a < b for a, b in pairwise(totals))
    assert totals[0] == pytest.approx(many.forecast.tokens_per_second(1))


def test_on_a_tie_there_are_two_pipelines_unless_kv_is_short() -> None:
    """Eight machines that hold a third of 7B each: however they are joined they read as fast."""
    workers = alike(8, memory=1.6)
    links = Links(LinkFigures(1e-6, 1e12), hand_over_seconds=0.0)
    two = fleet_of(Task(LLAMA_7B, Asked(64, 64, 64), links), workers)
    assert two is not None
    assert [len(layout.plan.stages) for layout in two.layouts] == [4, 4]
    assert two.kv_sessions == 64
    one = fleet_of(Task(LLAMA_7B, Asked(1024, 64, 64), links), workers)
    assert one is not None  # contexts of half a gigabyte: weights must not be there twice
    assert len(one.layouts) == 1
    assert one.kv_sessions >= 9


def test_one_session_and_a_given_weight_make_one_pipeline() -> None:
    workers = alike(8)
    assert plan(LLAMA_7B, workers, Asked(64, 8, 1)).replicas == ()
    assert plan(LLAMA_7B, workers, Asked(64, 8, 8, slowest_weight=1.0)).replicas == ()


def test_orders_of_many_workers_are_near_the_best() -> None:
    """Points on a plane: the way over nine of them, cheap against cheapest."""
    rng = np.random.default_rng(5)
    worst = 1.0
    for _ in range(20):
        points = rng.uniform(size=(9, 2))
        assert points.std() > 0.1
        cost = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1))
        busy = np.zeros((11, 11))
        padded = np.full((11, 11), 9.0)  # two more make it a large pool
        padded[:9, :9] = cost
        cheapest = Routes(cost, busy[:9, :9]).order(tuple(range(9)), 0, 8)
        cheap = Routes(padded, busy).order(tuple(range(9)), 0, 8)
        assert sorted(cheap) == list(range(9))
        assert (cheap[0], cheap[-1]) == (0, 8)
        length = [cost[order[:-1], order[1:]].sum() for order in (cheap, cheapest)]
        worst = max(worst, length[0] / length[1])
    assert worst < 1.35


def test_workers_that_hold_layers_keep_them() -> None:
    workers = alike(5)
    first = plan(LLAMA_65B, workers, Asked(2048, 1, 5, slowest_weight=50.0)).plan
    assert len(first.stages) == 5
    stored = {
        stage.worker: frozenset(range(stage.span.start, stage.span.stop)) for stage in first.stages
    }
    back = [workers[3], workers[1], workers[4], workers[0], workers[2]]
    again = plan(LLAMA_65B, back, Asked(2048, 1, 5, slowest_weight=50.0), stored=stored).plan
    assert again == first
    without = plan(
        LLAMA_65B,
        [w for w in back if w.id != "w2"],
        Asked(2048, 1, 5, slowest_weight=50.0),
        stored=stored,
    ).plan
    kept = sum(
        len(stored[stage.worker] & set(range(stage.span.start, stage.span.stop)))
        for stage in without.stages
    )
    assert [stage.worker for stage in without.stages] == ["w0", "w1", "w3", "w4"]
    assert kept == 16 + 12 + 12 + 16  # of 64: [0,20) [20,40) [40,60) [60,80)


def test_alike_workers_are_counted_and_not_listed() -> None:
    workers = alike(30)
    pool = pool_of(LLAMA_65B, workers, 2048, Links(), {}, 0)
    assert [len(members) for members in pool.classes] == [30]
    assert fits(pool)
    found = search(pool, goal_of(1, None, Rules()))
    assert found is not None
    assert found.evaluations <= 3
    order = arranging.arranged(pool, found, LLAMA_65B.layer_bytes, {})
    assert [w.id for w, _ in order] == ["w0", "w1", "w2"]  # as they registered
    a, b = WorkerId("w7"), WorkerId("w9")
    near = Links(between={(a, b): LinkFigures(1e-5, 1e10)})
    pool = pool_of(LLAMA_65B, workers, 2048, near, {}, 0)
    assert sorted(len(members) for members in pool.classes) == [2, 28]
