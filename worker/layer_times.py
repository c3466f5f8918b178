"""How long this machine takes for a layer of the model that is to be served, and for its head.

The real engine runs layers of the model's shape with random weights: as many as are beyond the
caches, or all of a small model, whose weights are in the caches when it runs, too. If memory has
no room for one layer, its matrices are timed one by one. A shape that the engine does not know is
refused before this (potluck/layer_shape.py). Blocks for some seconds: for the engine thread.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate

import numpy as np

from potluck import __version__, engine
from potluck.errors import Cancelled, PlanError
from potluck.layer_shape import CONTEXT_TOKENS, LayerShape, Tensor, bytes_of
from potluck.model import KV_PAGE_TOKENS, kv_bytes_per_token, scratch_bytes
from potluck.plan import LayerTimes, Span
from worker import record

ROWS = (1, 2, 4, 8, 64)
VALID_SECONDS = 24 * 3600.0
WEIGHT_BYTES = 128 * 2**20  # of timed layers: beyond most caches, as of a model's own
FIGURE_SECONDS = 0.12  # of rounds for each figure, if there are not MOST_ROUNDS before
# A CPU quota is given out every 0.1 s, all at once: less than three periods tell of chance.
THROTTLED_SECONDS = 0.35
FEWEST_ROUNDS, MOST_ROUNDS = 3, 25
BUDGET_SECONDS = 4.0  # for all rounds together; what would take longer is left out
_SEED = 1
_FREE_PART = 0.75  # of what is free may be taken: another program may want some, too
_QUOTA_BINDS = 0.8  # of the quota was used: then it is what the work waited for

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Conditions:
    """What bounds a measurement. `cpu_quota` in CPUs, None: as many as there are."""

    machine: str
    free_bytes: int
    cpu_quota: float | None = None
    gives_up: Callable[[], bool] = record.never  # asked between rounds; any thread


def layer_times(
    engine_: engine.Engine, shape: LayerShape, conditions: Conditions
) -> LayerTimes | None:
    """Times for steps of ROWS, or for fewer of them on slow machines; None: no memory at all.

    Taken over if this machine measured the same today. Raises Cancelled if `gives_up` says so.
    """
    n_layers = _layers_that_fit(shape, conditions)
    key = _key(engine_, shape, conditions, n_layers)
    with record.opened(conditions.gives_up) as figures:
        times = _times_of(figures.get(key, VALID_SECONDS), shape)
        if times is None:
            started = time.monotonic()
            log.info("probing: timing layers of the model that is to be served")
            if n_layers:
                times = _by_layers(engine_, shape, conditions, n_layers)
            else:
                times = _by_matrices(engine_, shape, conditions)
            if times is not None:
                figures.put(key, asdict(times))
                log.info("%s, measured in %.1f s", shown(times), time.monotonic() - started)
        else:
            log.info("%s, measured before", shown(times))
    return times


def shown(times: LayerTimes) -> str:
    """For logs: "a layer takes 2.52, 2.80 ms for 1, 2 rows, the head 2.38 ms"."""
    ms = ", ".join(f"{1e3 * seconds:.2f}" for seconds in times.seconds)
    rows = ", ".join(map(str, times.rows))
    return f"a layer takes {ms} ms for {rows} rows, the head {1e3 * times.head_seconds:.2f} ms"


def _layers_that_fit(shape: LayerShape, conditions: Conditions) -> int:
    """How many layers are timed; 0: not one has room."""
    wanted = min(shape.n_layers, -(-WEIGHT_BYTES // shape.layer_bytes))
    least = _bytes_beside(shape, 0)
    each = shape.layer_bytes + _bytes_beside(shape, 1) - least
    room = int(conditions.free_bytes * _FREE_PART) - least
    return max(0, min(wanted, room // each))


def _bytes_beside(shape: LayerShape, n_layers: int) -> int:
    """KV of so many layers, and the buffers of the largest step."""
    kv_bytes = kv_bytes_per_token(shape.config, Span(0, 1)) * CONTEXT_TOKENS
    return n_layers * kv_bytes + scratch_bytes(shape.config, max(ROWS))


def _key(engine_: engine.Engine, shape: LayerShape, conditions: Conditions, n_layers: int) -> str:
    """Everything that the figures depend on."""
    threads = f"{engine_.decode_threads}/{engine_.prefill_threads}/{engine_.threads} threads"
    quota = f"quota {conditions.cpu_quota or 0:.3g}"
    build = f"{__version__} {engine.build()}"
    digest = hashlib.sha256(repr(shape).encode()).hexdigest()[:32]
    what = f"{n_layers} layers of {digest}"
    return f"{conditions.machine} {engine_.isa} {threads} {quota} {build} {what}"


def _times_of(value: object, shape: LayerShape) -> LayerTimes | None:
    """What an earlier measurement left; None if it is no such thing."""
    if not isinstance(value, dict):
        return None
    try:
        times = LayerTimes(
            layer_bytes=int(value["layer_bytes"]),
            rows=tuple(int(n) for n in value["rows"]),
            seconds=tuple(float(s) for s in value["seconds"]),
            head_bytes=int(value["head_bytes"]),
            head_seconds=float(value["head_seconds"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError, PlanError):
        return None
    return times if times.layer_bytes == shape.layer_bytes else None


@dataclass
class _Reading:
    """Rounds of one kind of step, and what they took of the clock and of all CPUs."""

    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)

    def add(self, run: Callable[[], None]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        self.walls.append(time.perf_counter() - wall)
        self.cpus.append(time.process_time() - cpu)

    def is_enough(self, seconds: float, *, is_throttled: bool) -> bool:
        """Whether `seconds` of rounds, not counting the first, are done, or enough rounds."""
        n, total = len(self.walls), sum(self.walls)
        if n < FEWEST_ROUNDS and total < FEWEST_ROUNDS * seconds:
            return False
        return total - self.walls[0] >= seconds or (n >= MOST_ROUNDS and not is_throttled)

    def seconds(self, cpu_quota: float | None) -> float:
        """Of one round. The first one wakes threads and touches buffers: it counts if alone.

        The median; under a quota that binds, CPU time over quota: how a window of the clock lies
        to the quota's periods is chance, what the work costs is not.
        """
        walls, cpus = self.walls[1:] or self.walls, self.cpus[1:] or self.cpus
        if cpu_quota is None:
            return statistics.median(walls)
        wall, cpu = sum(walls), sum(cpus)
        binds = cpu >= _QUOTA_BINDS * cpu_quota * wall
        return (cpu / cpu_quota if binds else wall) / len(walls)


def _readings(
    runs: Sequence[tuple[int, Callable[[], None]]], conditions: Conditions, deadline: float
) -> list[_Reading]:
    """Rounds of each of `runs` (rows, step) in turns, so that a disturbance touches a few of all.

    Fewer readings if the next step would not end before the deadline, but at least one.
    """
    is_throttled = conditions.cpu_quota is not None
    needed = THROTTLED_SECONDS if is_throttled else FIGURE_SECONDS
    readings: list[_Reading] = []
    before = 0
    for rows, run in runs:
        if readings:
            # Twice the rows take at most twice the time.
            predicted = readings[-1].walls[-1] * max(1.0, rows / before)
            if time.monotonic() + predicted > deadline:
                break
        _check(conditions)
        readings.append(_Reading())
        readings[-1].add(run)
        before = rows
    open_ = list(range(len(readings)))
    while open_:
        for i in list(open_):
            _check(conditions)
            reading = readings[i]
            late = time.monotonic() + reading.walls[-1] > deadline
            if late or reading.is_enough(needed, is_throttled=is_throttled):
                open_.remove(i)
            else:
                reading.add(runs[i][1])
    return readings


def _by_layers(
    engine_: engine.Engine, shape: LayerShape, conditions: Conditions, n_layers: int
) -> LayerTimes:
    """By steps of a shard. The head is what a step with logits takes longer."""
    left = conditions.free_bytes * _FREE_PART - n_layers * shape.layer_bytes
    has_head = left - _bytes_beside(shape, n_layers) >= shape.head_bytes
    shard = _shard(engine_, shape, n_layers, conditions, has_head=has_head)
    values = np.random.default_rng(_SEED).standard_normal((max(ROWS), shape.dim), np.float32)
    hidden = np.empty((max(ROWS), shape.dim), np.float32)
    logits = np.empty((1, shape.vocab), np.float32)

    def step(rows: int, *, wants: bool) -> Callable[[], None]:
        spans = [engine.RowSpan(1, 0, rows, int(wants))]
        output = logits[: int(wants)] if has_head else hidden[:rows]

        def run() -> None:
            shard.forward(values[:rows], spans, output)

        return run

    runs = [(rows, step(rows, wants=False)) for rows in ROWS]
    if has_head:
        runs.insert(0, (1, step(1, wants=True)))
    readings = _readings(runs, conditions, time.monotonic() + BUDGET_SECONDS)
    seconds = [reading.seconds(conditions.cpu_quota) for reading in readings]
    whole = seconds.pop(0) if has_head and len(seconds) > 1 else 0.0
    return _times(shape, [s / n_layers for s in seconds], whole - seconds[0])


def _shard(
    engine_: engine.Engine,
    shape: LayerShape,
    n_layers: int,
    conditions: Conditions,
    *,
    has_head: bool,
) -> engine.Shard:
    """Layers of random weights with an open session."""
    config = replace(shape.config, n_layers=n_layers)
    span = Span(0, n_layers)
    shard = engine.Shard(
        engine_,
        engine.config_for(config),
        span.start,
        span.stop,
        embeds=False,
        has_head=has_head,
        kv_bytes=kv_bytes_per_token(config, span) * CONTEXT_TOKENS,
        max_sessions=1,
    )
    tensors = [tensor for number in range(n_layers) for tensor in shape.layer(number)]
    if has_head:
        tensors += shape.head()
    # The more layers a model has, the less each of them adds: so values stay of order 1.
    origin = engine.Synthetic(seed=_SEED, n_layers=shape.n_layers)
    for name, type_name, rows, cols in tensors:
        _check(conditions)
        shard.put_file(name, type_name, rows, cols, origin, 0)
    shard.seal()
    shard.open(1, -(-max(ROWS) // KV_PAGE_TOKENS) * KV_PAGE_TOKENS)
    return shard


def _by_matrices(
    engine_: engine.Engine, shape: LayerShape, conditions: Conditions
) -> LayerTimes | None:
    """By products of single matrices, added up: without attention and norms, a little too short.

    None if the largest has no room.
    """
    matrices = [tensor for tensor in shape.layer(0) if tensor[2] > 1]
    room = int(conditions.free_bytes * _FREE_PART) - _bytes_beside(shape, 0)
    largest = max(bytes_of(tensor) for tensor in matrices)
    if room < largest:
        log.info("no memory to time layers: %d MiB are free", conditions.free_bytes >> 20)
        return None
    deadline = time.monotonic() + BUDGET_SECONDS
    seconds: list[float] = []
    for i, rows in enumerate(ROWS):
        growth = rows / ROWS[i - 1] if i else 0.0
        if i and time.monotonic() + seconds[-1] * growth > deadline:
            break
        seconds.append(_sum_of(matrices, engine_, rows, room, conditions))
    head = list(shape.head())[-1:]
    fits = bytes_of(head[0]) <= room
    head_seconds = _sum_of(head, engine_, 1, room, conditions) if fits else 0.0
    return _times(shape, seconds, head_seconds)


def _sum_of(
    matrices: Iterable[Tensor],
    engine_: engine.Engine,
    batch: int,
    room: int,
    conditions: Conditions,
) -> float:
    """Seconds of one product with each of the matrices, equal ones timed once."""
    counts: dict[tuple[str, int, int], int] = {}
    for _, type_name, rows, cols in matrices:
        counts[type_name, rows, cols] = counts.get((type_name, rows, cols), 0) + 1
    total = 0.0
    for (type_name, rows, cols), count in counts.items():
        _check(conditions)
        beside = room - bytes_of(("", type_name, rows, cols))
        weight_bytes = max(0, min(WEIGHT_BYTES, beside))

        def timed(
            rounds: int,
            matrix: tuple[str, int, int] = (type_name, rows, cols),
            weight_bytes: int = weight_bytes,
        ) -> float:
            return engine.benchmark_matmul(engine_, *matrix, batch, rounds, weight_bytes)

        once = timed(1)
        rounds = int(FIGURE_SECONDS / len(counts) / once)
        total += count * timed(max(1, min(MOST_ROUNDS, rounds)))
    # A few products end within a period of the quota: they don't see it, a step after another will.
    quota = conditions.cpu_quota or float(engine_.threads)
    return total * max(1.0, engine_.threads / quota)


def _times(shape: LayerShape, seconds: Sequence[float], head_seconds: float) -> LayerTimes:
    """Seconds of a layer for the first of ROWS; of the head, if not above 0, by its bytes."""
    rising = tuple(accumulate(seconds, max))
    by_bytes = rising[0] * shape.head_bytes / shape.layer_bytes
    return LayerTimes(
        layer_bytes=shape.layer_bytes,
        rows=ROWS[: len(rising)],
        seconds=rising,
        head_bytes=shape.head_bytes,
        head_seconds=head_seconds if head_seconds > 0 else by_bytes,
    )


def _check(conditions: Conditions) -> None:
    if conditions.gives_up():
        raise Cancelled("timing layers was given up")
