"""Which sets of workers are worth looking at in a pool of very many.

Pure. Sets of the cheapest and of the largest workers, of every size, then the best of them with one
worker swapped, added or dropped, again and again. Compared by their bounds, which cost little.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from coordinator.bounds import rough_bounds
from coordinator.goal import Goal
from coordinator.pool import Floats, Indices, Pool

_KEPT = 12  # sets that are filled in the end
_ROUNDS = 6  # of moves
_OFFERED = 8  # classes that may be swapped in at a time: the cheapest and the largest


def promising_sets(pool: Pool, goal: Goal) -> Indices:
    """[v, classes]: the best sets found, by their bounds."""
    sets = _beginnings(pool, goal)
    goal, scores = _likely(pool, goal, sets)
    for _ in range(_ROUNDS):
        best = sets[int(np.argmin(scores))]
        moved = _moved(pool, best)
        moved_scores = _scores(pool, goal, moved)
        better = moved_scores.min(initial=np.inf) < scores.min() * (1 - 1e-9)
        sets = np.concatenate([sets, moved])
        scores = np.concatenate([scores, moved_scores])
        keep = _best_unlike(sets, scores)
        sets, scores = sets[keep], scores[keep]
        if not better:
            break
    return sets


def _beginnings(pool: Pool, goal: Goal) -> Indices:
    """The first so many by cost, and by memory, of every size, with those that are pinned."""
    of = np.array([members[0] for members in pool.classes])
    sizes = np.array([len(members) for members in pool.classes])
    layer = pool.times(goal.ways[0].rows).layer[of]
    pinned = np.array(pool.pinned)
    found = []
    for key in (layer, -pool.rooms[of, 0], layer / np.maximum(pool.rooms[of, 0], 1)):
        order = np.lexsort((key, ~pinned))
        until = np.cumsum(sizes[order])
        for k in range(max(int(sizes[pinned].sum()), 1), min(int(sizes.sum()), pool.n_layers) + 1):
            row = np.zeros(len(sizes), dtype=np.int64)
            row[order] = np.clip(k - (until - sizes[order]), 0, sizes[order])
            found.append(row)
    return np.unique(np.array(found), axis=0)


def _likely(pool: Pool, goal: Goal, sets: Indices) -> tuple[Goal, Floats]:
    """The goal with those ways only that one of the best sets would be used in, and scores."""
    penalty = np.array([goal.penalty(int(k)) for k in sets.sum(axis=1)])
    scores = np.stack([rough_bounds(pool, sets, way) for way in goal.ways]) * penalty  # [w, v]
    best = np.argsort(scores.min(axis=0), kind="stable")[:_KEPT]
    ways = sorted({int(w) for w in scores[:, best].argmin(axis=0)})
    return replace(goal, ways=tuple(goal.ways[w] for w in ways)), scores.min(axis=0)


def _moved(pool: Pool, counts: Indices) -> Indices:
    """All sets that are one move away."""
    of = np.array([members[0] for members in pool.classes])
    sizes = np.array([len(members) for members in pool.classes])
    one = np.eye(len(counts), dtype=np.int64)
    out = np.flatnonzero((counts > 0) & ~np.array(pool.pinned))
    free = np.flatnonzero(counts < sizes)
    layer, room = pool.times(1).layer[of], pool.rooms[of, 0]
    cheap = free[np.argsort(layer[free], kind="stable")][:_OFFERED]
    large = free[np.argsort(-room[free], kind="stable")][:_OFFERED]
    into = np.unique(np.concatenate([cheap, large]))
    rows = [counts[None, :] - one[out], counts[None, :] + one[into]]
    rows += [counts[None, :] - one[out] + one[i] for i in into]
    moved = np.concatenate(rows)
    possible: Indices = moved[moved.sum(axis=1) > 0]
    return possible


def _scores(pool: Pool, goal: Goal, sets: Indices) -> Floats:
    penalty = np.array([goal.penalty(int(k)) for k in sets.sum(axis=1)])
    bounds: Floats = np.min([rough_bounds(pool, sets, way) for way in goal.ways], axis=0)
    scores: Floats = bounds * penalty
    return scores


def _best_unlike(sets: Indices, scores: Floats) -> Indices:
    """Places of the best sets, each once."""
    _, first = np.unique(sets, axis=0, return_index=True)
    order = first[np.argsort(scores[first], kind="stable")]
    return order[:_KEPT]
