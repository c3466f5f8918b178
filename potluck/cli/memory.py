"""What several workers on this machine may each take: each alone would count all that is free."""

from __future__ import annotations

import contextlib
from pathlib import Path

# Limit and use of the cgroup that a container sees as its own: v2, then v1.
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def share_bytes(n_workers: int, root: Path = Path("/")) -> int | None:
    """An even part of the memory that is free; None where the system does not say."""
    found = [n for n in (_available(root), *_cgroups(root)) if n is not None]
    return max(0, min(found)) // n_workers if found else None


def _available(root: Path) -> int | None:
    """MemAvailable: free, and what the system gives back when asked."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _cgroups(root: Path) -> list[int]:
    left = []
    for limit, used in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            folder = root / "sys/fs/cgroup"
            left.append(int((folder / limit).read_text()) - int((folder / used).read_text()))
    return left
