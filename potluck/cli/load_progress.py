"""How far a worker's load is, in the words of `serve` and `status`. Pure."""

from __future__ import annotations

from potluck.cli import quantities, terminal
from potluck.replies import WorkerReport


def line(worker: WorkerReport) -> terminal.Line | None:
    """ "2.8 GB of 9.1 GB, 112.0 MB/s, 0:52 left"; None: it loads nothing, or has just begun.

    The rate is the coordinator's, so whoever looks for the first time sees it too.
    """
    if worker.state not in ("fetching", "loading"):
        return None
    is_fetching = worker.fetched_bytes < worker.fetch_total_bytes
    done, total = worker.load_done_bytes, worker.load_total_bytes
    if is_fetching:
        done, total = worker.fetched_bytes, worker.fetch_total_bytes
    if not total:
        return None
    parts = [f"{quantities.size(done)} of {quantities.size(total)}"]
    if worker.load_bytes_per_second > 0:
        parts.append(f"{quantities.size(worker.load_bytes_per_second)}/s")
    if worker.load_seconds_left > 0:
        parts.append(f"{quantities.duration(worker.load_seconds_left)} left")
    state = "fetching" if is_fetching else "loading"
    return terminal.Line(worker.id, state, done, total, ", ".join(parts))


def table(workers: tuple[WorkerReport, ...]) -> terminal.Table:
    """Loads that go on, a row each."""
    rows = tuple(
        (found.name, found.state, f"{found.share:.0%}", found.note)
        for worker in workers
        if (found := line(worker)) is not None
    )
    return terminal.Table(("worker", "does", "done", "so far"), rows, frozenset({"done"}), "Loads")
