"""Workers as numbers: what the search for a plan computes with.

Pure. Arrays have one entry a worker, in the order of registration (shape [n]), or one a pair
([n + 1, n + 1], the coordinator last). Workers between which no plan could tell stand together in a
class: the search counts them and does not list them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from coordinator.forecast import MESSAGE_BYTES, RESULT_BYTES
from coordinator.layer_times import Speed, speed_of
from coordinator.limits import PlanLimits, is_pinned, layer_range
from coordinator.sizes import ModelSizes, most_layers
from potluck.plan import COORDINATOR, Links, WorkerInfo

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

EMBEDS, HAS_HEAD = 1, 2  # roles of a stage, added: the column of `Pool.rooms`


@dataclass(frozen=True, slots=True)
class RowTimes:
    """Seconds for a step of some rows. Links: of latency, and of being occupied."""

    layer: Floats  # [n], KV included
    head: Floats  # [n]
    latency: Floats  # [n + 1, n + 1]
    busy: Floats  # [n + 1, n + 1]


@dataclass(frozen=True)
class Pool:
    """Workers that a plan may use, for one model and KV of one size."""

    workers: tuple[WorkerInfo, ...]
    n_layers: int
    fixed_seconds: float  # of a stage, whatever it holds
    positions: int  # that each row's KV holds, for the time of reading it
    row_bytes: int
    speeds: tuple[Speed, ...]
    rooms: Floats  # [n, 4]: layers that fit, by role; the most that people allow
    least: Floats  # [n]: layers it gets if it is used
    half_trip: Floats  # [n + 1, n + 1] seconds
    rate: Floats  # [n + 1, n + 1] bytes/s
    has_equal_links: bool  # between workers: their order then costs the same
    classes: tuple[tuple[int, ...], ...]  # workers that are alike, in the order of the first
    pinned: tuple[bool, ...]  # of each class: people want all of it used
    _times: dict[int, RowTimes] = field(default_factory=dict, compare=False)  # by rows

    def times(self, rows: int) -> RowTimes:
        """Of a step of `rows` rows; computed once."""
        if rows not in self._times:
            self._times[rows] = self._compute(rows)
        return self._times[rows]

    def _compute(self, rows: int) -> RowTimes:
        n = len(self.workers)
        layer = [
            speed.layer_seconds(rows) + rows * self.positions * speed.kv_position_seconds
            for speed in self.speeds
        ]
        head = [speed.head_seconds(rows) for speed in self.speeds]
        sent = np.full((n + 1, n + 1), MESSAGE_BYTES + rows * self.row_bytes, dtype=np.float64)
        sent[n, :] = sent[:, n] = MESSAGE_BYTES + rows * RESULT_BYTES
        busy = sent / self.rate
        return RowTimes(np.array(layer), np.array(head), self.half_trip + busy, busy)


def pool_of(
    sizes: ModelSizes,
    workers: Sequence[WorkerInfo],
    n_positions: int,
    links: Links,
    limits: PlanLimits,
    positions: int,
) -> Pool:
    """The pool for KV of `n_positions` positions; workers that no layer fits on are left out,
    unless people pinned them.
    """
    kept, rooms = [], []
    for worker in workers:
        room = _rooms(sizes, worker, n_positions, limits)
        if room[0] >= layer_range(limits, worker.id)[0] or is_pinned(limits, worker.id):
            kept.append(worker)
            rooms.append(room)
    least = [layer_range(limits, worker.id)[0] for worker in kept]
    speeds = tuple(speed_of(sizes, worker) for worker in kept)
    half_trip, rate = _link_matrices(kept, links)
    pins = [is_pinned(limits, worker.id) for worker in kept]
    keys = [(s, tuple(r), n, p) for s, r, n, p in zip(speeds, rooms, least, pins, strict=True)]
    classes = _classes(keys, half_trip, rate)
    return Pool(
        workers=tuple(kept),
        n_layers=sizes.n_layers,
        fixed_seconds=links.hand_over_seconds,
        positions=positions,
        row_bytes=sizes.row_bytes,
        speeds=speeds,
        rooms=np.array(rooms, dtype=np.float64).reshape(-1, 4),
        least=np.array(least, dtype=np.float64),
        half_trip=half_trip,
        rate=rate,
        has_equal_links=_are_equal(half_trip) and _are_equal(rate),
        classes=classes,
        pinned=tuple(pins[members[0]] for members in classes),
    )


def fits(pool: Pool) -> bool:
    """Whether any plan of the pool exists: if all workers have no room, fewer have none either."""
    need, pinned = pool.n_layers, _pinned(pool)
    if len(pool.workers) == 0 or (pool.rooms[pinned, 0] < pool.least[pinned]).any():
        return False
    alone = (pool.rooms[:, EMBEDS + HAS_HEAD] >= need) & (pool.least <= need)
    if pinned.any():
        alone &= pinned & (pinned.sum() == 1)
    if alone.any():
        return True
    middle, first, last = pool.rooms[:, 0], pool.rooms[:, EMBEDS], pool.rooms[:, HAS_HEAD]
    total = middle.sum() + (first - middle)[:, None] + (last - middle)[None, :]  # [first, last]
    more = np.where(pinned, 0, pool.least)  # layers that it gets for being an end
    needed = pool.least[pinned].sum() + more[:, None] + more[None, :]
    can = (first >= pool.least)[:, None] & (last >= pool.least)[None, :] & (needed <= need)
    np.fill_diagonal(can, val=False)
    return bool((can & (total >= need)).any())


def _pinned(pool: Pool) -> npt.NDArray[np.bool_]:
    found = np.zeros(len(pool.workers), dtype=np.bool_)
    for members, pinned in zip(pool.classes, pool.pinned, strict=True):
        found[list(members)] = pinned
    return found


def _rooms(
    sizes: ModelSizes, worker: WorkerInfo, n_positions: int, limits: PlanLimits
) -> tuple[int, ...]:
    """Layers that fit, by role: in the middle, first, last, alone."""
    _, most = layer_range(limits, worker.id)
    ceiling = sizes.n_layers if most is None else min(most, sizes.n_layers)
    return tuple(
        min(
            ceiling,
            most_layers(
                sizes,
                worker,
                n_positions,
                embeds=bool(role & EMBEDS),
                has_head=bool(role & HAS_HEAD),
            ),
        )
        for role in range(4)
    )


def _link_matrices(workers: Sequence[WorkerInfo], links: Links) -> tuple[Floats, Floats]:
    ids = [*(worker.id for worker in workers), COORDINATOR]
    n = len(ids)
    half_trip = np.full((n, n), links.default.rtt_seconds / 2, dtype=np.float64)
    rate = np.full((n, n), links.default.bytes_per_second, dtype=np.float64)
    if links.between:
        for i, a in enumerate(ids):
            for j, b in enumerate(ids):
                figures = links.of(a, b)
                half_trip[i, j] = figures.rtt_seconds / 2
                rate[i, j] = figures.bytes_per_second
    return half_trip, rate


def _are_equal(matrix: Floats) -> bool:
    """Whether every link between two workers has the same value."""
    n = len(matrix) - 1
    between = matrix[:n, :n][~np.eye(n, dtype=np.bool_)]
    return between.size == 0 or bool((between == between[0]).all())


def _classes(
    keys: Sequence[Hashable], half_trip: Floats, rate: Floats
) -> tuple[tuple[int, ...], ...]:
    """Workers with the same figures and the same links to all others."""
    found: dict[Hashable, list[list[int]]] = {}
    for i, key in enumerate(keys):
        candidates = found.setdefault((key, _link_key(half_trip, i), _link_key(rate, i)), [])
        for members in candidates:
            j = members[0]
            if _links_alike(half_trip, i, j) and _links_alike(rate, i, j):
                members.append(i)
                break
        else:
            candidates.append([i])
    classes = (tuple(members) for lists in found.values() for members in lists)
    return tuple(sorted(classes, key=lambda members: members[0]))


def _link_key(matrix: Floats, i: int) -> bytes:
    """Equal for workers with alike links; the links themselves then decide."""
    ends = np.delete(np.array([matrix[i], matrix[:, i]]), i, axis=1)
    return bytes(np.sort(ends, axis=1).tobytes())


def _links_alike(matrix: Floats, i: int, j: int) -> bool:
    others = np.ones(len(matrix), dtype=np.bool_)
    others[[i, j]] = False
    return bool(
        matrix[i, j] == matrix[j, i]
        and (matrix[i, others] == matrix[j, others]).all()
        and (matrix[others, i] == matrix[others, j]).all()
    )
