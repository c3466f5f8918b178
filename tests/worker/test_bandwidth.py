"""Read bandwidth: measured by one worker at a time, taken over by the others, never in the way."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from worker.bandwidth import SECONDS, VALID_SECONDS, read_bandwidth, tune_threads
from worker.record import FILE_NAME


class Engine:
    """Reads at `rate` and notes what it was asked."""

    isa = "scalar"

    def __init__(self, rate: float = 2e9, threads: int = 1) -> None:
        self.rate = rate
        self.threads = threads
        self.asked: list[tuple[int, int]] = []

    def read_bandwidth(self, size_bytes: int = 0, rounds: int = 0) -> float:
        time.sleep(0.005)
        self.asked.append((size_bytes, rounds))
        return self.rate


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path))
    return tmp_path


def test_a_machine_is_measured_over_what_is_free() -> None:
    engine = Engine(threads=3)
    assert read_bandwidth(engine, 16 * 2**20, "here") == 2e9
    assert [size for size, _ in engine.asked] == [4 * 2**20] * 2
    engine = Engine(threads=3)
    read_bandwidth(engine, 0, "here")  # a limit below what this process takes: no reason to fail
    assert engine.asked[0][0] == 3 * 2**20  # the engine wants 1 MiB a thread


@pytest.mark.parametrize("rate", [1e9, 200e9])
def test_the_reading_takes_as_long_on_slow_machines_as_on_fast_ones(rate: float) -> None:
    engine = Engine(rate)
    read_bandwidth(engine, 2**33, "here")
    size, rounds = engine.asked[1]
    assert SECONDS <= rounds * size / rate < 1.5 * SECONDS


def test_the_best_of_all_rounds_counts() -> None:
    class Disturbed(Engine):
        def read_bandwidth(self, size_bytes: int = 0, rounds: int = 0) -> float:
            return 3e9 if rounds == 3 else 2e9

    assert read_bandwidth(Disturbed(), 2**30, "here") == 3e9


def test_workers_that_start_together_get_the_figure_of_one() -> None:
    engines = [Engine(1e9 * (i + 1)) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        figures = list(pool.map(lambda e: read_bandwidth(e, 2**30, "here"), engines))
    assert len(set(figures)) == 1
    assert sum(bool(e.asked) for e in engines) == 1


def test_processes_share_it_too() -> None:
    code = (
        "from potluck import engine; from worker.bandwidth import read_bandwidth;"
        "print(read_bandwidth(engine.Engine(1), 2**26, 'here').hex())"
    )
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    figures = [process.communicate(timeout=60)[0] for process in running]
    assert len(set(figures)) == 1
    assert float.fromhex(figures[0]) > 1e8


def test_another_machine_thread_count_or_size_is_measured_anew() -> None:
    assert read_bandwidth(Engine(1e9), 2**30, "here") == 1e9
    assert read_bandwidth(Engine(2e9), 2**30, "there") == 2e9
    assert read_bandwidth(Engine(3e9, threads=2), 2**30, "here") == 3e9
    assert read_bandwidth(Engine(4e9), 2**26, "here") == 4e9
    assert read_bandwidth(Engine(5e9), 2**30, "here") == 1e9


@pytest.mark.parametrize("age", [VALID_SECONDS + 1, -5.0])
def test_an_old_figure_and_one_from_the_future_are_measured_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch, age: float
) -> None:
    read_bandwidth(Engine(1e9), 2**30, "here")
    now = time.time() + age
    monkeypatch.setattr(time, "time", lambda: now)
    assert read_bandwidth(Engine(2e9), 2**30, "here") == 2e9
    assert len(json.loads((cache / FILE_NAME).read_text())) == 1


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "7", '{"KEY": 3}', '{"KEY": [1, 2, 3]}', '{"KEY": ["a", 0]}', "nan", "inf"],
)
def test_a_damaged_record_is_measured_anew(cache: Path, damage: str) -> None:
    path = cache / FILE_NAME
    read_bandwidth(Engine(1e9), 2**30, "here")
    (key,) = json.loads(path.read_text())
    if damage in ("nan", "inf"):
        path.write_text(json.dumps({key: [float(damage), time.time()]}))
    else:
        path.write_text(damage.replace("KEY", key))
    assert read_bandwidth(Engine(2e9), 2**30, "here") == 2e9
    assert read_bandwidth(Engine(3e9), 2**30, "here") == 2e9


def test_a_cache_that_is_not_writable_does_not_stop_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("POTLUCK_CACHE", str(cache / "file" / "cache"))
    assert read_bandwidth(Engine(1e9), 2**30, "here") == 1e9
    assert read_bandwidth(Engine(2e9), 2**30, "here") == 2e9


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_does_not_stop_it(cache: Path) -> None:
    (cache / FILE_NAME).symlink_to("/dev/full")
    assert read_bandwidth(Engine(1e9), 2**30, "here") == 1e9


class Tuned:
    """Chooses one thread for decode and notes when it measured, and over what."""

    threads = 4
    decode_threads = 4
    prefill_threads = 4

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.times: tuple[float, float] = (0.0, 0.0)

    def tune_threads(self, weight_bytes: int = 0) -> None:
        start = time.monotonic()
        time.sleep(0.02)
        self.asked.append(weight_bytes)
        self.decode_threads = 1
        self.times = (start, time.monotonic())


def test_fewer_threads_that_are_as_fast_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    engine = Tuned()
    with caplog.at_level("INFO", logger="worker.bandwidth"):
        tune_threads(engine, 2**30)
        engine.threads = 1
        engine.prefill_threads = 1
        tune_threads(engine, 0)
    assert [r.getMessage() for r in caplog.records] == [
        "decode uses 1 of 4 threads, prompts 4: as fast as all"
    ]
    assert engine.asked == [128 * 2**20, 2**20]


def test_workers_that_start_together_tune_one_after_another() -> None:
    engines = [Tuned() for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda e: tune_threads(e, 2**30), engines))
    times = sorted(e.times for e in engines)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))
