"""CPU time of the machine and of chosen processes, to see whether anything else ran meanwhile."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def busy_seconds(text: str) -> float:
    """CPU time of everything since the machine started; `text` is /proc/stat."""
    # user, nice, system, idle, iowait, irq, softirq, steal: another machine's time counts, too
    ticks = [int(word) for word in text.splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / TICKS


def process_seconds(text: str) -> float:
    """CPU time of a process; `text` is /proc/PID/stat, whose name may hold anything."""
    after_name = text.rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / TICKS


def seconds_of(groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """CPU time of each group of processes and, named "", of the machine."""
    proc = Path("/proc")
    spent = {
        name: sum(process_seconds((proc / str(pid) / "stat").read_text()) for pid in pids)
        for name, pids in groups.items()
    }
    return {**spent, "": busy_seconds((proc / "stat").read_text())}
