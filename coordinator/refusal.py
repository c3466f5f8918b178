"""What to say when a model does not fit: how much is missing, and what would cure it.

Pure. A cure is named only if a plan with it exists; the figures of cures are the least that do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from coordinator.layout import Task
from coordinator.limits import is_pinned, layer_range
from coordinator.sizes import most_layers, size_text
from potluck.errors import PlanError
from potluck.model import KV_PAGE_TOKENS
from potluck.plan import WorkerId, WorkerInfo

# Whether a plan exists: with this task, these workers.
Fits = Callable[[Task, Sequence[WorkerInfo]], bool]

_STEP_BYTES = 2**30 // 10  # memory is spoken of in tenths of a GiB
_SMALL_STEP_BYTES = 2**20  # and, of models below 4 GiB, in MiB
_ROUND_TOKENS = 256  # contexts above this are spoken of in multiples of it
_LESS_BYTES = 0.9  # of a layer: else another type of weights is no cure


def refusal(task: Task, workers: Sequence[WorkerInfo], fits: Fits) -> PlanError:
    """The error for a task that no plan of `workers` does."""
    by_limits = _limits_too_tight(task, workers)
    if by_limits is not None:
        return by_limits
    cures = list(_cures(task, workers, fits))
    remedy = ", ".join(cures[:-1]) + (" or " if len(cures) > 1 else "") + "".join(cures[-1:])
    return PlanError(
        _numbers(task, workers),
        remedy=remedy or "add workers, or serve a smaller model",
    )


def _limits_too_tight(task: Task, workers: Sequence[WorkerInfo]) -> PlanError | None:
    """If limits alone forbid every plan, whatever the memory."""
    n_layers = task.sizes.n_layers
    ranges = [layer_range(task.limits, worker.id) for worker in workers]
    most = sum(n_layers if m is None else m for _, m in ranges)
    if most < n_layers:
        return PlanError(
            f"limits allow the workers {most} layers in all, the model has {n_layers}",
            remedy="raise the most layers of a worker in the limits",
        )
    least = sum(
        low
        for worker, (low, _) in zip(workers, ranges, strict=True)
        if is_pinned(task.limits, worker.id)
    )
    if least > n_layers:
        return PlanError(
            f"limits ask the workers for {least} layers at least, the model has {n_layers}",
            remedy="lower the least layers of a worker in the limits",
        )
    for worker, (low, _) in zip(workers, ranges, strict=True):
        room = _room(task, worker)
        if is_pinned(task.limits, worker.id) and room < low:
            return PlanError(
                f"limits ask {worker.id} for {low} layers at least, it has room for {room}",
                remedy="lower the least layers of it in the limits",
            )
    return None


def _room(task: Task, worker: WorkerInfo) -> int:
    """Layers beside the KV of one context, in the middle of a pipeline."""
    room = most_layers(task.sizes, worker, task.context_tokens, embeds=False, has_head=False)
    return max(room, 0)


def _numbers(task: Task, workers: Sequence[WorkerInfo]) -> str:
    """Needed and offered."""
    sizes, context_tokens = task.sizes, task.context_tokens
    kv = context_tokens * sizes.kv_layer_bytes * sizes.n_layers
    needed = sizes.weight_bytes + kv + sizes.scratch_bytes * len(workers)
    offered = sum(worker.memory_free_bytes for worker in workers)
    least = min(workers, key=lambda worker: worker.memory_free_bytes)
    name = "worker offers" if len(workers) == 1 else "workers offer"
    message = (
        f"the model needs {size_text(needed)} ({size_text(sizes.weight_bytes)} of weights,"
        f" {size_text(kv)} of KV for one context of {context_tokens} tokens),"
        f" {len(workers)} {name} {size_text(offered)}"
    )
    if offered >= needed and task.asked.every_worker:
        message += (
            f", but {least.id} offers {size_text(least.memory_free_bytes)}, too little for its part"
        )
    elif offered >= needed:
        message += ", but in pieces that no whole layers fill"
    rooms = [worker.room_bytes for worker in workers if worker.room_bytes is not None]
    if rooms:
        message += (
            f"; of that {size_text(sum(rooms))} are memory, which KV, buffers and two layers at a"
            " time must fit into"
        )
    return message


def _cures(task: Task, workers: Sequence[WorkerInfo], fits: Fits) -> Iterator[str]:
    """Each alone is enough."""
    if (alone := _without_smallest(task, workers, fits)) is not None:
        yield alone
    if (missing := _another_worker(task, workers, fits)) is not None:
        yield f"add a worker with {missing}"
    if (each := _more_each(task, workers, fits)) is not None:
        whose = "the worker" if len(workers) == 1 else "each worker"
        yield f"give {whose} {each} more --memory"
    if (tokens := _largest_context(task, workers, fits)) is not None:
        yield f"lower --context to {tokens}"
    small_kv = _with_q8(task)
    if small_kv is not None:
        if fits(small_kv, workers):
            yield "use --kv-type q8"
        elif tokens is None and (t := _largest_context(small_kv, workers, fits)) is not None:
            yield f"use --kv-type q8 and --context {t}"
    small = _with_q4_0(task)
    if small is not None and fits(small, workers):
        yield "use q4_0"


def _without_smallest(task: Task, workers: Sequence[WorkerInfo], fits: Fits) -> str | None:
    """Where each worker must be a stage, one may be too small for its part."""
    if not task.asked.every_worker or len(workers) == 1:
        return None
    least = min(workers, key=lambda worker: worker.memory_free_bytes)
    others = [worker for worker in workers if worker is not least]
    return f"leave {least.id} out" if fits(task, others) else None


def _another_worker(task: Task, workers: Sequence[WorkerInfo], fits: Fits) -> str | None:
    """The least memory that one more worker must offer."""
    if task.asked.every_worker and len(workers) >= task.sizes.n_layers:
        return None
    like = max(workers, key=lambda worker: worker.memory_free_bytes)

    def can(n_bytes: int) -> bool:
        more = replace(like, id=WorkerId("one more"), memory_free_bytes=n_bytes, room_bytes=None)
        return fits(task, [*workers, more])

    return _least_memory(task, can)


def _more_each(task: Task, workers: Sequence[WorkerInfo], fits: Fits) -> str | None:
    """The least that each worker must offer beyond what it does."""

    def can(n_bytes: int) -> bool:
        return fits(task, [_with_more(worker, n_bytes) for worker in workers])

    return _least_memory(task, can)


def _with_more(worker: WorkerInfo, n_bytes: int) -> WorkerInfo:
    room = worker.room_bytes
    return replace(
        worker,
        memory_free_bytes=worker.memory_free_bytes + n_bytes,
        room_bytes=None if room is None else room + n_bytes,
    )


def _least_memory(task: Task, can: Callable[[int], bool]) -> str | None:
    """The least bytes for which `can` holds, in steps that people read; None: not even twice all
    that is needed.
    """
    kv = task.context_tokens * task.sizes.kv_layer_bytes * task.sizes.n_layers
    most = 2 * (task.sizes.weight_bytes + kv + task.sizes.scratch_bytes) + 2**30
    step = _STEP_BYTES if most > 2**33 else _SMALL_STEP_BYTES
    low, high = 0, most // step + 1  # steps
    if not can(_shown_bytes(high * step)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if can(_shown_bytes(middle * step)):
            high = middle
        else:
            low = middle
    return size_text(_shown_bytes(high * step))


def _shown_bytes(n_bytes: int) -> int:
    """What `size_text` says of so many, in bytes: people give what they read."""
    text, unit = size_text(n_bytes).split()
    return int(float(text) * {"MiB": 2**20, "GiB": 2**30}[unit])


def _largest_context(task: Task, workers: Sequence[WorkerInfo], fits: Fits) -> int | None:
    """Tokens of the longest shorter context that fits; round ones if they are many."""

    def can(n_tokens: int) -> bool:
        return fits(replace(task, asked=replace(task.asked, context_tokens=n_tokens)), workers)

    low, high = 0, (task.asked.context_tokens - 1) // KV_PAGE_TOKENS  # pages
    while low < high:
        middle = (low + high + 1) // 2
        if can(middle * KV_PAGE_TOKENS):
            low = middle
        else:
            high = middle - 1
    n_tokens = low * KV_PAGE_TOKENS
    return (n_tokens - n_tokens % _ROUND_TOKENS or n_tokens) if n_tokens else None


def _with_q8(task: Task) -> Task | None:
    sizes = task.sizes
    if not 0 < sizes.kv_q8_layer_bytes < sizes.kv_layer_bytes:
        return None
    return replace(task, sizes=replace(sizes, kv_layer_bytes=sizes.kv_q8_layer_bytes))


def _with_q4_0(task: Task) -> Task | None:
    """Layers in q4_0; the ends are counted as they are, though they may shrink, too."""
    sizes = task.sizes
    if not 0 < sizes.q4_0_layer_bytes < _LESS_BYTES * sizes.mean_layer_bytes:
        return None
    layers = tuple(min(n, sizes.q4_0_layer_bytes) for n in sizes.layer_bytes)
    return replace(task, sizes=replace(sizes, layer_bytes=layers))
