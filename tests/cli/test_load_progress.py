"""How far a load is, in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck.cli import load_progress, terminal
from potluck.replies import WorkerReport

IDLE = WorkerReport("w1", "127.0.0.1:1", "ready", "avx2", 2, 0, 0, 0, 0.1, 1e9, 50, 50, "here")
FETCHING = replace(
    IDLE,
    state="fetching",
    load_done_bytes=0,
    load_total_bytes=9_200_000_000,
    fetched_bytes=2_821_000_000,
    fetch_total_bytes=9_100_000_000,
    load_bytes_per_second=112e6,
    load_seconds_left=52.0,
)


def test_a_fetch_is_told_with_rate_and_time_left() -> None:
    note = "2.8 GB of 9.1 GB, 112.0 MB/s, 0:52 left"
    found = load_progress.line(FETCHING)
    assert found == terminal.Line("w1", "fetching", 2_821_000_000, 9_100_000_000, note)
    assert load_progress.table((IDLE, FETCHING)).rows == (("w1", "fetching", "31%", note),)


def test_packing_after_a_fetch_is_a_load() -> None:
    packing = replace(
        FETCHING,
        state="loading",
        fetched_bytes=9_100_000_000,
        load_done_bytes=4_600_000_000,
        load_bytes_per_second=0.0,
        load_seconds_left=0.0,
    )
    found = load_progress.line(packing)
    assert found is not None
    assert (found.state, f"{found.share:.0%}", found.note) == ("loading", "50%", "4.6 GB of 9.2 GB")


@pytest.mark.parametrize("state", ["ready", "joining", "lost", "fetching"])
def test_who_loads_nothing_has_no_line(state: str) -> None:
    report = replace(IDLE, state=state, load_total_bytes=0)
    assert load_progress.line(report) is None
    assert load_progress.table((report,)).rows == ()
