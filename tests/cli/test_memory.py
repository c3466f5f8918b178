"""How several workers of one machine share its memory."""

from __future__ import annotations

from pathlib import Path

from potluck.cli.memory import share_bytes


def machine(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_max", ".max").replace("_cur", ".current")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_workers_share_what_is_free_and_do_not_each_count_all(tmp_path: Path) -> None:
    root = machine(tmp_path, proc__meminfo="MemTotal: 9000 kB\nMemAvailable:    6000 kB\n")
    assert share_bytes(3, root) == 2000 * 1024


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        proc__meminfo="MemAvailable: 6000 kB\n",
        sys__fs__cgroup__memory_max="5000000\n",
        sys__fs__cgroup__memory_cur="1000000\n",
    )
    assert share_bytes(2, root) == 2_000_000


def test_no_limit_is_none(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        proc__meminfo="MemAvailable: 6000 kB\n",
        sys__fs__cgroup__memory_max="max\n",
        sys__fs__cgroup__memory_cur="1000000\n",
    )
    assert share_bytes(1, root) == 6000 * 1024


def test_where_the_system_does_not_say_nothing_is_shared(tmp_path: Path) -> None:
    assert share_bytes(2, tmp_path) is None
