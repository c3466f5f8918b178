"""What people should know of a plan, in a line each.

Pure. Every number is computed from the forecasts of plans that exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from coordinator.forecast import Forecast
from coordinator.layout import Task, alone, lay_out
from potluck.plan import Plan, WorkerId, WorkerInfo

_MANY = 32  # answers at once that a plan for many is looked at with
_MOST = 64  # answers at once that plans are compared for
_EXACT = 20  # up to so many answers are spoken of exactly, above in fives
_NAMED = 4  # workers at most
_MUCH = 0.1  # of an answer's time, in links


def advice_for(
    task: Task, workers: Sequence[WorkerInfo], plans: Sequence[Plan], forecasts: Sequence[Forecast]
) -> tuple[str, ...]:
    """The most important line first."""
    if task.asked.every_worker:
        lines = [*_better_without(task, workers, forecasts[0])]
    else:
        lines = [*_one_machine(task, workers, plans, forecasts), *_spares(task, workers, plans)]
    lines += [*_slow_links(forecasts[0]), *_little_kv(task, plans), *_not_timed(workers, plans)]
    return tuple(lines)


def _one_machine(
    task: Task, workers: Sequence[WorkerInfo], plans: Sequence[Plan], forecasts: Sequence[Forecast]
) -> Iterator[str]:
    """Until how many answers at once one machine is as fast as all that it is compared with."""
    if len(workers) == 1 or len(plans) > 1:
        return
    single = alone(task, workers)
    if single is None:
        return
    name = single.stages[0].worker
    one = task.forecast(single, workers)
    others = forecasts[0]
    if len(plans[0].stages) == 1:
        many = replace(task, asked=replace(task.asked, sessions=_MANY), weighs_orders=False)
        for_many = lay_out(many, workers, _MANY)
        if for_many is None or len(for_many.plan.stages) == 1:
            yield f"{name} alone is faster than any pipeline of these workers"
            return
        others = task.forecast(for_many.plan, workers)
    until = _until(one, others)
    if until == _MOST:
        yield f"{name} alone is faster than any pipeline of these workers"
    elif until:
        number = until if until <= _EXACT else until - until % 5
        answers = "for one answer" if number == 1 else f"up to about {number} answers"
        more = _names([stage.worker for stage in others.stages])
        yield f"{name} alone is faster {answers} at once; for more, {more} together are"


def _until(one: Forecast, others: Forecast) -> int:
    """The most answers at once, up to _MOST, for which and below `one` gives more tokens/s."""
    for sessions in range(1, _MOST + 1):
        if one.tokens_per_second(sessions) <= others.tokens_per_second(sessions):
            return sessions - 1
    return _MOST


def _better_without(task: Task, workers: Sequence[WorkerInfo], forecast: Forecast) -> Iterator[str]:
    """Where each worker must be a stage: what leaving some out would give."""
    free = replace(task, asked=replace(task.asked, every_worker=False))
    best = lay_out(free, workers, task.asked.sessions)
    if best is None:
        return
    used = {stage.worker for stage in best.plan.stages}
    left_out = [worker.id for worker in workers if worker.id not in used]
    if not left_out:
        return
    sessions = task.asked.sessions
    now = forecast.tokens_per_second(sessions)
    then = task.forecast(best.plan, workers).tokens_per_second(min(sessions, best.kv_sessions))
    if then * (1 - task.rules.stage_worth) < now:
        return
    what = "one answer" if sessions == 1 else f"{sessions} answers at once"
    gain = _times_as_fast(then / now)
    if len(used) == 1:
        yield f"{next(iter(used))} alone is faster: {what} would be {gain}"
    else:
        yield f"without {_names(left_out)}, {what} would be {gain}"


def _times_as_fast(ratio: float) -> str:
    """4 % faster, 2.3 times as fast, 12 times as fast."""
    if ratio < 1.5:
        return f"{100 * (ratio - 1):.0f} % faster"
    return f"{ratio:.{1 if ratio < 10 else 0}f} times as fast"


def _spares(task: Task, workers: Sequence[WorkerInfo], plans: Sequence[Plan]) -> Iterator[str]:
    used = {stage.worker for plan in plans for stage in plan.stages}
    spares = [worker.id for worker in workers if worker.id not in used]
    if not spares:
        return
    holds = "holds" if len(spares) == 1 else "hold"
    worth = 100 * task.rules.stage_worth
    faster = f"{worth:.0f} % faster" if worth else "faster"
    yield f"{_names(spares)} {holds} nothing: with more stages answers would not be {faster}"


def _slow_links(forecast: Forecast) -> Iterator[str]:
    links = sum(link.seconds(1) for link in forecast.links)
    share = links / forecast.sweep_seconds(1)
    if share < _MUCH:
        return
    slowest = forecast.slowest_link()
    source, target = (end or "the coordinator" for end in (slowest.source, slowest.target))
    yield (
        f"links take {100 * share:.0f} % of an answer's time,"
        f" the one from {source} to {target} {1000 * slowest.seconds(1):.1f} ms"
    )


def _little_kv(task: Task, plans: Sequence[Plan]) -> Iterator[str]:
    """If not all sessions that were asked for can have a full context at once."""
    one = task.context_tokens * task.sizes.kv_layer_bytes
    if not one:
        return
    held = sum(plan.stages[0].kv_bytes // (one * plan.stages[0].span.n_layers) for plan in plans)
    if held < task.asked.max_sessions:
        contexts = f"{held} session" if held == 1 else f"{held} sessions"
        yield (
            f"KV has room for {contexts} with a full context of {task.asked.context_tokens} tokens,"
            f" not for {task.asked.max_sessions}"
        )


def _not_timed(workers: Sequence[WorkerInfo], plans: Sequence[Plan]) -> Iterator[str]:
    used = {stage.worker for plan in plans for stage in plan.stages}
    guessed = [w.id for w in workers if w.id in used and (w.times is None or len(w.times.rows) < 2)]
    if guessed:
        was = "was" if len(guessed) == 1 else "were"
        yield (
            f"{_names(guessed)} {was} not timed with several rows:"
            " what prompts and several answers get is assumed"
        )


def _names(ids: Sequence[WorkerId]) -> str:
    """`a`, `a and b`, `a, b and 7 more`."""
    if len(ids) == 1:
        return ids[0]
    if len(ids) <= _NAMED:
        return f"{', '.join(ids[:-1])} and {ids[-1]}"
    return f"{', '.join(ids[: _NAMED - 1])} and {len(ids) - _NAMED + 1} more"
