"""The cache's disk: measured within a second, without traces, once a day."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from potluck.plan import DiskFigures
from worker import disk, record
from worker.disk import disk_figures, with_free_now


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rates(figures: DiskFigures) -> tuple[float, float]:
    return figures.read_bytes_per_second, figures.write_bytes_per_second


def test_a_disk_is_measured_and_nothing_stays_behind(cache: Path) -> None:
    started = time.monotonic()
    figures = disk_figures("here")
    assert time.monotonic() - started < 3  # a loaded machine; 0.1 s alone
    assert min(rates(figures)) > 1e5
    assert abs(figures.free_bytes - shutil.disk_usage(cache).free) < 2**32
    assert [path.name for path in cache.iterdir()] == [record.FILE_NAME]


def test_what_is_read_comes_from_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, advise, read = os.fdatasync, os.posix_fadvise, os.readv

    def fdatasync(descriptor: int) -> None:
        order.append("sync")
        sync(descriptor)

    def posix_fadvise(descriptor: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            order.append("drop")
        advise(descriptor, offset, length, advice)

    def readv(descriptor: int, buffers: list[bytearray]) -> int:
        order.append("read")
        return read(descriptor, buffers)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    monkeypatch.setattr(os, "readv", readv)
    disk_figures("here")
    steps = list(dict.fromkeys(order))
    assert steps == ["sync", "drop", "read"]
    assert order.count("read") <= disk.SIZE_BYTES // 2**20 + 1


def test_a_second_start_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = disk_figures("here")
    monkeypatch.setattr(disk, "_measured", lambda *_: pytest.fail("measured again"))
    assert rates(disk_figures("here")) == rates(first)
    with pytest.raises(pytest.fail.Exception):
        disk_figures("there")


def test_a_slow_disk_gets_a_few_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """An SD card of 8 MiB/s."""
    clock = SimpleNamespace(now=0.0)
    written: list[int] = []
    pending = [0]

    class File:
        def write(self, data: bytes) -> int:
            pending[0] += len(data)
            return len(data)

        def fileno(self) -> int:
            return -1

    def fdatasync(descriptor: int) -> None:
        clock.now += pending[0] / (8 * 2**20)
        written.append(pending[0])
        pending[0] = 0

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(disk, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    assert disk._write_rate(File()) == pytest.approx(8 * 2**20)  # type: ignore[arg-type]  # a fake file
    assert written == [2**20, 2**20, 2 * 2**20]
    assert clock.now == disk.WRITE_SECONDS


def test_a_full_disk_is_said_and_does_not_stop_a_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    monkeypatch.setattr(os, "fdatasync", fails_with(28, "No space left on device"))
    with caplog.at_level("INFO", logger="worker.disk"):
        figures = disk_figures("here")
    assert rates(figures) == (0.0, 0.0)
    assert "No space left on device" in caplog.text
    monkeypatch.undo()
    monkeypatch.setenv("POTLUCK_CACHE", str(cache))
    assert min(rates(disk_figures("here"))) > 0  # a failure is not remembered


def test_a_nearly_full_disk_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100 * 2**20))
    monkeypatch.setattr(disk, "_write_rate", lambda *_: pytest.fail("written"))
    with caplog.at_level("INFO", logger="worker.disk"):
        assert disk_figures("here") == DiskFigures(100 * 2**20, 0.0, 0.0)
    assert "100 MiB are free" in caplog.text


def test_a_cache_that_can_not_be_made_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.joinpath("file").write_text("")
    monkeypatch.setenv("POTLUCK_CACHE", str(cache.parent / "file" / "cache"))
    with caplog.at_level("INFO", logger="worker.disk"):
        figures = disk_figures("here")
    assert figures == DiskFigures(0, 0.0, 0.0)
    assert "not measured" in caplog.text
    assert with_free_now(figures) == figures


def test_what_is_free_is_looked_up_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = disk_figures("here")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    assert with_free_now(figures) == DiskFigures(5, *rates(figures))


def fails_with(number: int, words: str) -> object:
    def fail(*arguments: object) -> Iterator[None]:
        raise OSError(number, words)

    return fail
