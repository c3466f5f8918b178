"""What this machine offers: cores, memory, kernels, read bandwidth, disk.

Reads /proc and the cgroup files and keeps no state. Memory is the least of what the system can give
without swapping, what the cgroup has left and what the person allowed. Linux.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from potluck.plan import DiskFigures, LayerTimes
from potluck.rpc.measured import disk_message, layer_times_message
from potluck.rpc.v1 import types_pb2
from worker.bandwidth import Engine, read_bandwidth
from worker.disk import disk_figures, with_free_now


@dataclass(frozen=True, slots=True)
class Machine:
    """What does not change while a worker runs."""

    name: str
    platform: str  # "linux x86_64"
    cores: int
    threads: int
    isa: str
    read_bytes_per_second: float
    cpu_quota: float | None = None  # CPUs that the cgroup gives; None: no limit
    disk: DiskFigures | None = None  # None: nobody looked


@dataclass(frozen=True, slots=True)
class MemoryNow:
    """One reading. `free_bytes` is never negative."""

    total_bytes: int  # the most that this worker could ever have
    free_bytes: int  # what more it may take: weights and KV
    room_bytes: int  # what memory has room for; another number only if weights are mapped
    resident_bytes: int  # of this process


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of this process's machine, cgroup and `limit_bytes`; `root` is / but in tests.

    Mapped weights are on disk, and the system keeps of them what fits. So pages of files count as
    free, and `limit_bytes` bounds what is held and may be more than the machine has.
    """

    limit_bytes: int | None = None  # what the person allowed this worker
    root: Path = Path("/")
    maps_weights: bool = False

    def now(self, mapped_bytes: int = 0) -> MemoryNow:
        """Reads some small files of the system; takes 0.1 ms. `mapped_bytes`: of weights, held."""
        system = self._meminfo()
        statm = (self.root / "proc/self/statm").read_text(encoding="ascii").split()
        resident_bytes, file_bytes = (int(n) * os.sysconf("SC_PAGE_SIZE") for n in statm[1:3])
        limits = list(self._cgroups())
        total_bytes = min([system["MemTotal"], *(limit for limit, _ in limits)])
        room_bytes = min([system["MemAvailable"], *(lim - used for lim, used in limits)])
        free_bytes = room_bytes
        if (most := self.limit_bytes) is not None:
            left = most - resident_bytes + (file_bytes if self.maps_weights else 0)
            room_bytes = min(room_bytes, left)
            free_bytes = left if self.maps_weights else room_bytes
            total_bytes = most if self.maps_weights else min(total_bytes, most)
        if self.maps_weights:
            free_bytes -= mapped_bytes
        return MemoryNow(
            total_bytes=total_bytes,
            free_bytes=max(0, free_bytes),
            room_bytes=max(0, room_bytes),
            resident_bytes=resident_bytes,
        )

    def _meminfo(self) -> dict[str, int]:
        """/proc/meminfo in bytes."""
        lines = (self.root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        pairs = (line.split(":", 1) for line in lines if ":" in line)
        return {key: 1024 * int(value.split()[0]) for key, value in pairs}

    def _cgroups(self) -> Iterator[tuple[int, int]]:
        """(limit, used) of each cgroup around this process that has a limit."""
        for folder in cgroup_folders(self.root, "memory"):
            for limit_name, used_name, *caches in _MEMORY_FILES:
                limit, used = _number(folder / limit_name), _number(folder / used_name)
                # v1 says "no limit" with a number near 2^63.
                if limit is not None and used is not None and limit < 2**60:
                    pages = caches if self.maps_weights else caches[:1]
                    free = sum(_statistic(folder / "memory.stat", name) for name in pages)
                    yield limit, max(0, used - free)


# Limit, use, and the part of the use that the system would give back at once: file pages, those
# that nobody has used for a while and the others.
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file", "active_file"),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
        "total_active_file",
    ),
)


def machine_of(engine: Engine, free_bytes: int, root: Path = Path("/")) -> Machine:
    """Measures; see worker/bandwidth.py for the time that takes and for `free_bytes`."""
    name = platform.node() or "unnamed"
    return Machine(
        name=name,
        platform=f"{platform.system().lower()} {platform.machine()}",
        cores=cores(root),
        threads=engine.threads,
        isa=engine.isa,
        read_bytes_per_second=read_bandwidth(engine, free_bytes, name),
        cpu_quota=cpu_quota(root),
        disk=disk_figures(name),
    )


def resources(machine: Machine, now: MemoryNow, times: LayerTimes | None) -> types_pb2.Resources:
    """What this worker tells its coordinator, but for `room_bytes`."""
    return types_pb2.Resources(
        machine=machine.name,
        platform=machine.platform,
        cores=machine.cores,
        threads=machine.threads,
        isa=machine.isa,
        memory_bytes=now.total_bytes,
        memory_free_bytes=now.free_bytes,
        read_bytes_per_second=machine.read_bytes_per_second,
        layer_times=layer_times_message(times) if times else None,
        disk=disk_message(with_free_now(machine.disk)) if machine.disk else None,
    )


def cores(root: Path = Path("/")) -> int:
    """CPUs that affinity and the cgroup's quota allow; a part of one counts as one."""
    count = len(os.sched_getaffinity(0))
    quota = cpu_quota(root)
    return count if quota is None else min(count, max(1, math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs that the cgroups around this process give it, 0.5 for half a one; None: no limit."""
    quotas = (
        quota
        for folder in cgroup_folders(root, "cpu")
        for quota in (_quota_v2(folder), _quota_v1(folder))
        if quota is not None
    )
    return min(quotas, default=None)


def cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the cgroups around this process, innermost first; v2 and v1.

    In a container the path that the process sees may not exist below the mount; the mount does.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = mount / path.lstrip("/")
        while folder != mount and mount in folder.parents:
            yield folder
            folder = folder.parent
        yield mount


def _quota_v2(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


def _statistic(path: Path, name: str) -> int:
    """One line "name value" of a cgroup's statistics; 0 without it."""
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    """A file that holds one whole number; None for "max" and for no such file."""
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
