"""Which worker holds which layers.

Pure: the same model and workers give the same plan. It starts nothing and reads no clock. First
version: every worker that is given becomes a stage, so that what people started is what is used;
layers are spread so that the slowest stage is as fast as it can be (decode reads a stage's weights
once a token, so a stage's time is its bytes over its machine's measured read bandwidth), never over
a worker's memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from potluck import model
from potluck.errors import PlanError
from potluck.gguf import GgufFile
from potluck.model import KV_PAGE_TOKENS, SCRATCH_BYTES, KvType, ModelConfig
from potluck.plan import Plan, Span, Stage, WorkerInfo

# Ends are tried among so many workers that have most memory or bandwidth: 132 orders of 80 layers
# plan in 20 to 50 ms (Zen 3), and a machine that is neither large nor fast makes no good end.
_ENDS_TRIED = 12

# Another order than that of registration must gain 3 %: two probes of one machine differ by 2.
_BETTER = 0.97


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a plan must know of a model. Raises PlanError if it has no layers."""

    layer_bytes: tuple[int, ...]  # weights of each layer
    embedding_bytes: int  # on the first stage; one row of it is read a token
    head_bytes: int  # on the last stage, read whole for each token; norm included
    kv_layer_bytes: int  # of one position in one layer
    scratch_bytes: int  # buffers of a step

    def __post_init__(self) -> None:
        if not self.layer_bytes:
            raise PlanError("the model has no layers")

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return len(self.layer_bytes)

    @property
    def weight_bytes(self) -> int:
        """All weights, each counted where it lies: tied embeddings lie at both ends."""
        return sum(self.layer_bytes) + self.embedding_bytes + self.head_bytes


def sizes_of(
    file: GgufFile, config: ModelConfig, step_tokens: int, kv_type: KvType = KvType.F16
) -> ModelSizes:
    """Sizes of a model in its file's types; `step_tokens` is the most rows of one step."""
    return ModelSizes(
        layer_bytes=tuple(model.layer_bytes(file, config, i) for i in range(config.n_layers)),
        embedding_bytes=model.embedding_bytes(file, config),
        head_bytes=model.head_bytes(file, config),
        kv_layer_bytes=model.kv_bytes_per_token(config, Span(0, 1), kv_type),
        scratch_bytes=model.scratch_bytes(config, step_tokens),
    )


def plan_for(
    sizes: ModelSizes, workers: Sequence[WorkerInfo], context_tokens: int, max_sessions: int
) -> Plan:
    """A stage for each worker, with KV for as many of `max_sessions` contexts as fit, at least one.

    Raises PlanError, with the bytes needed and offered, if the model does not fit even so.
    """
    if not workers:
        raise PlanError("no worker is here", remedy="start one with `potluck join`")
    if len(workers) > sizes.n_layers:
        raise PlanError(
            f"{len(workers)} workers can't share {sizes.n_layers} layers, each needs one",
            remedy=f"ask for --workers {sizes.n_layers} or fewer",
        )
    context_tokens = _whole_pages(context_tokens)
    sessions = max_sessions
    while sessions > 0:
        best = _best(sizes, workers, sessions * context_tokens)
        if best is not None:
            return best
        sessions //= 2
    raise _too_little(sizes, workers, context_tokens)


def kv_tokens(plan: Plan, sizes: ModelSizes) -> int:
    """Positions that the plan's KV has room for, all sessions together; whole pages."""
    first = plan.stages[0]
    return first.kv_bytes // (sizes.kv_layer_bytes * first.span.n_layers)


def _best(sizes: ModelSizes, workers: Sequence[WorkerInfo], n_positions: int) -> Plan | None:
    """The order and counts with the least slowest stage; the earliest order among near equals."""
    found: tuple[float, Plan] | None = None
    for order in _orders(workers):
        counts = _counts(sizes, order, n_positions)
        if counts is None:
            continue
        slowest = max(_seconds(sizes, order, i, count) for i, count in enumerate(counts))
        if found is None or slowest < found[0] * _BETTER:
            found = slowest, _plan(sizes, order, counts, n_positions)
    return found and found[1]


def _orders(workers: Sequence[WorkerInfo]) -> Iterator[list[WorkerInfo]]:
    """As they registered, then every choice of first and last; the rest stay in their order.

    Only the ends differ (embeddings, head), so the order between them changes nothing.
    """
    yield list(workers)
    if len(workers) == 1:
        return
    rank = sorted(
        workers, key=lambda w: (w.memory_free_bytes, w.read_bytes_per_second), reverse=True
    )
    fast = sorted(workers, key=lambda w: w.read_bytes_per_second, reverse=True)
    near = {w.id for w in (*rank[: _ENDS_TRIED // 2], *fast[: _ENDS_TRIED // 2])}
    ends = [w for w in workers if w.id in near]
    for last in reversed(ends):
        for first in ends:
            if first is not last:
                middle = [w for w in workers if w is not first and w is not last]
                yield [first, *middle, last]


def _counts(sizes: ModelSizes, order: Sequence[WorkerInfo], n_positions: int) -> list[int] | None:
    """Layers of each stage: one each, then one by one to whoever stays fastest; None: no room.

    Layers count as the largest of them for memory, so that any span of so many fits. For equal
    layers this greedy choice is the least possible slowest stage.
    """
    kv = n_positions * sizes.kv_layer_bytes
    layer = max(sizes.layer_bytes) + kv
    rooms = [
        (worker.memory_free_bytes - _fixed_bytes(sizes, i, len(order))) // layer
        for i, worker in enumerate(order)
    ]
    for i, worker in enumerate(order):
        if worker.room_bytes is not None:  # its weights may be on disk, KV is not
            left = worker.room_bytes - _unmapped_bytes(sizes, has_head=i == len(order) - 1)
            rooms[i] = min(rooms[i], left // kv)
    if min(rooms) < 1 or sum(rooms) < sizes.n_layers:
        return None
    counts = [1] * len(order)
    heap = [(_seconds(sizes, order, i, 2), i) for i in range(len(order)) if rooms[i] > 1]
    heapq.heapify(heap)
    for _ in range(sizes.n_layers - len(order)):
        _, i = heapq.heappop(heap)
        counts[i] += 1
        if counts[i] < rooms[i]:
            heapq.heappush(heap, (_seconds(sizes, order, i, counts[i] + 1), i))
    return counts


def _seconds(sizes: ModelSizes, order: Sequence[WorkerInfo], i: int, n_layers: int) -> float:
    """Time of stage i for one token: bytes read over read bandwidth.

    1 MB/s if none was measured.
    """
    mean = sum(sizes.layer_bytes) / sizes.n_layers
    read = n_layers * mean + (sizes.head_bytes if i == len(order) - 1 else 0)
    return read / max(order[i].read_bytes_per_second, 1e6)


def _fixed_bytes(sizes: ModelSizes, i: int, n_stages: int) -> int:
    """What stage i needs besides layers and their KV."""
    embedding = sizes.embedding_bytes if i == 0 else 0
    head = sizes.head_bytes if i == n_stages - 1 else 0
    return sizes.scratch_bytes + embedding + head


def _unmapped_bytes(sizes: ModelSizes, *, has_head: bool) -> int:
    """What a stage of mapped weights needs of memory besides KV; its worker asks for no more."""
    units = (*sizes.layer_bytes, sizes.head_bytes) if has_head else sizes.layer_bytes
    return max(sizes.scratch_bytes, SCRATCH_BYTES) + 2 * max(units)


def _plan(
    sizes: ModelSizes, order: Sequence[WorkerInfo], counts: Sequence[int], n_positions: int
) -> Plan:
    stops = list(accumulate(counts))
    stages = []
    for i, (worker, stop) in enumerate(zip(order, stops, strict=True)):
        span = Span(stop - counts[i], stop)
        kv = n_positions * sizes.kv_layer_bytes * span.n_layers
        weights = sum(sizes.layer_bytes[span.start : span.stop])
        memory = weights + kv + _fixed_bytes(sizes, i, len(order))
        stages.append(
            Stage(worker.id, span, i == 0, i == len(order) - 1, memory_bytes=memory, kv_bytes=kv)
        )
    return Plan(sizes.n_layers, tuple(stages))


def _too_little(sizes: ModelSizes, workers: Sequence[WorkerInfo], context_tokens: int) -> PlanError:
    kv = context_tokens * sizes.kv_layer_bytes * sizes.n_layers
    needed = sizes.weight_bytes + kv + sizes.scratch_bytes * len(workers)
    offered = sum(worker.memory_free_bytes for worker in workers)
    least = min(workers, key=lambda worker: worker.memory_free_bytes)
    name = "worker offers" if len(workers) == 1 else "workers offer"
    message = (
        f"the model needs {_size(needed)} ({_size(sizes.weight_bytes)} of weights, {_size(kv)} of"
        f" KV for one context of {context_tokens} tokens), {len(workers)} {name} {_size(offered)}"
    )
    if offered >= needed:
        message += (
            f", but {least.id} offers {_size(least.memory_free_bytes)}, too little for its part"
        )
    rooms = [worker.room_bytes for worker in workers if worker.room_bytes is not None]
    if rooms:
        message += (
            f"; of that {_size(sum(rooms))} are memory, which KV, buffers and two layers at a time"
            " must fit into"
        )
    return PlanError(message, remedy="add a worker, give workers more --memory or lower --context")


def _size(n_bytes: int) -> str:
    """For people: 18.2 GiB, 37.0 MiB."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def _whole_pages(n_tokens: int) -> int:
    return -(-n_tokens // KV_PAGE_TOKENS) * KV_PAGE_TOKENS
