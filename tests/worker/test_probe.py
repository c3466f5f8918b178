"""What a machine offers, read from files that tests write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from worker.probe import Memory, cgroup_folders, cores, machine_of

GIB = 2**30


def system(root: Path, files: dict[str, str]) -> Path:
    base = {
        "proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable:  4194304 kB\n",
        "proc/self/statm": "9999 256 3 4 5 6 7\n",
        "proc/self/cgroup": "0::/\n",
    }
    for name, text in {**base, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_without_limits_the_system_says_what_is_free(tmp_path: Path) -> None:
    now = Memory(root=system(tmp_path, {})).now()
    assert (now.total_bytes, now.free_bytes) == (8 * GIB, 4 * GIB)
    assert now.resident_bytes == 256 * os.sysconf("SC_PAGE_SIZE")


def test_a_persons_limit_counts_what_the_process_has(tmp_path: Path) -> None:
    now = Memory(2 * GIB, system(tmp_path, {})).now()
    assert now.total_bytes == 2 * GIB
    assert now.free_bytes == 2 * GIB - now.resident_bytes
    assert Memory(1000, tmp_path).now().free_bytes == 0


def test_with_mapped_weights_a_limit_may_exceed_the_machine_and_file_pages_are_free(
    tmp_path: Path,
) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    files = {
        "proc/self/statm": "9999 256 200 4 5 6 7\n",
        "proc/self/cgroup": "0::/box\n",
        "sys/fs/cgroup/box/memory.max": f"{3 * GIB}\n",
        "sys/fs/cgroup/box/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/box/memory.stat": f"active_file {GIB}\ninactive_file {GIB}\n",
    }
    root = system(tmp_path, files)
    now = Memory(20 * GIB, root, maps_weights=True).now(15 * GIB)
    assert (now.total_bytes, now.room_bytes) == (20 * GIB, 2 * GIB)
    assert now.free_bytes == 5 * GIB - 56 * page
    assert Memory(20 * GIB, root).now().free_bytes == GIB
    assert Memory(GIB, root, maps_weights=True).now().room_bytes == GIB - 56 * page
    assert Memory(root=root, maps_weights=True).now(3 * GIB).free_bytes == 0


def test_a_cgroup_limits_and_its_file_pages_do_not_count(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/box/inner\n",
        "sys/fs/cgroup/box/inner/memory.max": "max\n",
        "sys/fs/cgroup/box/inner/memory.current": "5\n",
        "sys/fs/cgroup/box/memory.max": f"{3 * GIB}\n",
        "sys/fs/cgroup/box/memory.current": f"{2 * GIB}\n",
        "sys/fs/cgroup/box/memory.stat": f"anon 7\ninactive_file {GIB}\n",
    }
    now = Memory(root=system(tmp_path, files)).now()
    assert (now.total_bytes, now.free_bytes) == (3 * GIB, 2 * GIB)


def test_the_old_cgroups_are_read_too(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/box\n4:memory:/box\n1:name=systemd:/x\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{GIB // 2}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
    }
    root = system(tmp_path, files)
    now = Memory(root=root).now()
    assert (now.total_bytes, now.free_bytes) == (GIB, GIB // 2)
    assert cores(root) == 1


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 4), ("150000 100000", 2), ("1000 100000", 1), ("", 4)]
)
def test_a_quota_limits_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert cores(system(tmp_path, {"sys/fs/cgroup/cpu.max": quota})) == expected


def test_no_cgroup_file_is_no_limit(tmp_path: Path) -> None:
    assert list(cgroup_folders(tmp_path, "memory")) == []


def test_a_machine_is_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Engine:
        isa, threads = "scalar", 3

        def read_bandwidth(self, size_bytes: int = 0, rounds: int = 0) -> float:
            return 2e9

    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path))
    machine = machine_of(Engine(), 16 * 2**20)
    assert (machine.isa, machine.threads, machine.read_bytes_per_second) == ("scalar", 3, 2e9)
    assert machine.cores >= 1
    assert machine.platform.startswith("linux ")


def test_this_machine_has_memory() -> None:
    now = Memory().now()
    assert 0 < now.free_bytes <= now.total_bytes
    assert now.resident_bytes > 2**20
