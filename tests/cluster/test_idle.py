"""A cluster that nobody asks uses no CPU: pools park, loops sleep, heartbeats are cheap."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from potluck.replies import AnswerOptions

if TYPE_CHECKING:
    from tests.cluster.conftest import StartCluster

SECONDS = 5.0
MOST_OF_A_CORE = 0.02  # measured: 0.003; one pool thread that spins: 1


def cpu_seconds(pid: int) -> float:
    """User and system time of a process with all its threads."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_cluster_uses_no_cpu(smollm2: Path, start_cluster: StartCluster) -> None:
    cluster = start_cluster(smollm2, workers=2, threads=2)
    busy_from = time.monotonic()
    pids = [process.pid for process in [cluster.coordinator, *cluster.workers]]
    before = [cpu_seconds(pid) for pid in pids]
    cluster.answer("Once upon a time", AnswerOptions(max_tokens=64, temperature=0.0))
    worked = sum(cpu_seconds(pid) for pid in pids) - sum(before)
    assert worked > 0.3 * (time.monotonic() - busy_from)  # the clock that is read here does run
    time.sleep(0.5)
    before = [cpu_seconds(pid) for pid in pids]
    time.sleep(SECONDS)
    used = [cpu_seconds(pid) - start for pid, start in zip(pids, before, strict=True)]
    assert max(used) < MOST_OF_A_CORE * SECONDS, used
