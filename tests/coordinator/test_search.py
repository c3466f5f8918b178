"""The best pipeline, against every pipeline there is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise, permutations

import pytest

from coordinator import arranging
from coordinator.asked import Asked
from coordinator.forecast import forecast_of, groups
from coordinator.goal import Rules, goal_of
from coordinator.layout import Task, plan_of
from coordinator.limits import WorkerLimits, is_pinned, layer_range
from coordinator.pool import fits, pool_of
from coordinator.search import search
from coordinator.sizes import ModelSizes, most_layers
from potluck.plan import LayerTimes, LinkFigures, Links, WorkerId, WorkerInfo

MB = 1_000_000
EXACT = Rules(stage_worth=0.0, near=0.0)
CASES = 300


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    for cuts in combinations(range(1, total), parts - 1):
        edges = (0, *cuts, total)
        yield tuple(b - a for a, b in pairwise(edges))


def random_task(rng: random.Random) -> tuple[Task, list[WorkerInfo]]:
    """Few workers, often some alike, seldom with room for everything, over unlike links."""
    n = rng.randint(1, 4)
    layers = rng.randint(n, 7)
    sizes = ModelSizes(
        (10 * MB,) * layers,
        rng.choice([0, 15 * MB]),
        rng.choice([0, 5 * MB, 40 * MB]),
        kv_layer_bytes=rng.choice([1000, 50_000]),
        scratch_bytes=MB,
        row_bytes=rng.choice([100, 100_000]),
    )
    workers: list[WorkerInfo] = []
    for i in range(n):
        if workers and rng.random() < 0.3:
            workers.append(replace(workers[-1], id=WorkerId(f"w{i}")))
            continue
        rows = sorted(rng.uniform(0.001, 0.02) for _ in range(3))
        times = LayerTimes(10 * MB, (1, 2, 8), tuple(rows), 10 * MB, rng.uniform(0.001, 0.02))
        memory = rng.randint(10, 100) * MB
        workers.append(
            WorkerInfo(
                WorkerId(f"w{i}"),
                "127.0.0.1:1",
                "avx2",
                2,
                memory,
                memory,
                rng.uniform(1, 50) * 1e9,
                room_bytes=rng.choice([None, None, None, 400 * MB]),
                times=rng.choice([None, times]),
            )
        )
    ids = [WorkerId(""), *(w.id for w in workers)]
    between = {
        (a, b): LinkFigures(rng.choice([0.0002, 0.004, 0.02]), rng.choice([1e9, 20e6, 2e6]))
        for a in ids
        for b in ids
        if a != b and rng.random() < 0.7
    }
    links = Links(between=between if rng.random() < 0.7 else {}, hand_over_seconds=0.0003)
    limits = {
        w.id: WorkerLimits(layers=(rng.randint(0, 2), rng.randint(2, 6)))
        for w in workers
        if rng.random() < 0.15
    }
    asked = Asked(16, 1, rng.randint(1, 9), rng.choice([None, None, 0.0, 0.5, 3.0]), positions=200)
    return Task(sizes, asked, links, limits, {}, EXACT), workers


def least_cost(task: Task, workers: list[WorkerInfo]) -> float:
    """Of every subset, order and split. Infinite: nothing fits."""
    best = float("inf")
    for k in range(1, len(workers) + 1):
        for order in permutations(workers, k):
            if not all(w in order for w in workers if is_pinned(task.limits, w.id)):
                continue
            for counts in compositions(task.sizes.n_layers, k):
                if allowed(task, order, counts):
                    best = min(best, cost_of(task, order, counts))
    return best


def allowed(task: Task, order: tuple[WorkerInfo, ...], counts: tuple[int, ...]) -> bool:
    for i, (worker, n) in enumerate(zip(order, counts, strict=True)):
        least, most = layer_range(task.limits, worker.id)
        ends = {"embeds": i == 0, "has_head": i == len(order) - 1}
        room = most_layers(task.sizes, worker, task.context_tokens, **ends)
        if not least <= n <= min(room, most or room):
            return False
    return True


def cost_of(task: Task, order: tuple[WorkerInfo, ...], counts: tuple[int, ...]) -> float:
    plan = plan_of(task.sizes, list(zip(order, counts, strict=True)), task.context_tokens)
    found = forecast_of(plan, task.sizes, order, task.links, 200, {})
    if task.asked.slowest_weight is not None:
        return found.sweep_seconds() + task.asked.slowest_weight * found.slot_seconds()
    return min(
        max(found.sweep_seconds(rows), steps * found.slot_seconds(rows))
        for steps, rows in groups(task.asked.sessions)
    )


def test_no_pipeline_of_any_subset_order_and_split_is_better() -> None:
    rng = random.Random("brute force")
    seen = set()
    for _ in range(CASES):
        task, workers = random_task(rng)
        best = least_cost(task, workers)
        pool = pool_of(task.sizes, workers, task.context_tokens, task.links, task.limits, 200)
        found = search(pool, goal_of(task.asked.sessions, task.asked.slowest_weight, EXACT))
        assert fits(pool) == (found is not None)
        if found is None:
            assert best == float("inf")
            seen.add("refused")
            continue
        arranged = arranging.arranged(pool, found, task.sizes.layer_bytes, {})
        order, counts = zip(*arranged, strict=True)
        assert allowed(task, order, counts)
        assert cost_of(task, order, counts) == pytest.approx(best, rel=1e-6), (task, workers)
        seen.add(f"{len(order)} of {len(workers)}")
    assert {"refused", "1 of 1", "1 of 4", "2 of 3", "3 of 4"} <= seen
