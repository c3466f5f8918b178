"""Times of layers: of the real engine, within memory and budget, once a day and machine."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from potluck import engine, gguf, synthetic
from potluck.errors import Cancelled
from potluck.layer_shape import LayerShape, bytes_of, shape_of
from potluck.model import config_of
from potluck.plan import LayerTimes
from potluck.testing import TinyShape, write_tiny
from worker import layer_times as module
from worker import record
from worker.layer_times import ROWS, Conditions, layer_times

PLENTY = Conditions("here", 2**32)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shape() -> LayerShape:
    return shape_named("synthetic:tiny-q4_0")


def shape_named(name: str) -> LayerShape:
    file = synthetic.open_synthetic(name)
    return shape_of(file, config_of(file))


def is_measured(times: LayerTimes | None, shape: LayerShape) -> bool:
    assert times is not None
    assert (times.layer_bytes, times.head_bytes) == (shape.layer_bytes, shape.head_bytes)
    assert all(a <= b for a, b in itertools.pairwise(times.seconds))
    return times.rows == ROWS and 0 < times.head_seconds < 1


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_engine_runs_layers_of_every_architecture(
    tmp_path: Path, one_thread: engine.Engine, architecture: str
) -> None:
    file = gguf.read(write_tiny(tmp_path / "m.gguf", TinyShape(architecture=architecture)))
    timed = shape_of(file, config_of(file))
    assert is_measured(layer_times(one_thread, timed, PLENTY), timed)


@pytest.mark.parametrize("kind", ["f32", "q4_k_m", "q5_1", "q8_0"])
def test_the_engine_runs_layers_of_mixed_types(one_thread: engine.Engine, kind: str) -> None:
    timed = shape_named(f"synthetic:tiny-{kind}")
    assert is_measured(layer_times(one_thread, timed, PLENTY), timed)


def test_more_work_takes_longer(one_thread: engine.Engine) -> None:
    small = layer_times(one_thread, shape_named("synthetic:tiny-q4_0"), PLENTY)
    large = layer_times(one_thread, shape_named("synthetic:1b-q4_0"), PLENTY)
    assert small is not None
    assert large is not None
    assert large.seconds[0] > 5 * small.seconds[0]
    assert large.seconds[-1] > 2 * large.seconds[0]


def test_so_many_layers_are_timed_as_are_beyond_the_caches() -> None:
    def n_timed(name: str, free_bytes: int = 2**36) -> int:
        return module._layers_that_fit(shape_named(name), Conditions("here", free_bytes))

    assert n_timed("synthetic:tiny-q4_0") == 4  # all of them: it runs in the caches, too
    assert n_timed("synthetic:7b-q4_0") == 2
    assert n_timed("synthetic:65b-q4_0") == 1
    assert n_timed("synthetic:7b-q4_0", 256 * 2**20) == 1  # and buffers
    assert n_timed("synthetic:7b-q4_0", 150 * 2**20) == 0


def test_without_room_for_a_layer_its_matrices_are_timed(
    one_thread: engine.Engine, shape: LayerShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_shard(*arguments: object, **more: object) -> None:
        raise AssertionError("a shard was made")

    asked: list[int] = []
    real = engine.benchmark_matmul

    def benchmark_matmul(*arguments: int, **more: int) -> float:
        _, _, rows, cols, _, _, weight_bytes = arguments
        asked.append(weight_bytes + bytes_of(("", "q4_0", rows, cols)))
        return real(*arguments, **more)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr(engine, "Shard", no_shard)
    monkeypatch.setattr(engine, "benchmark_matmul", benchmark_matmul)
    room = module._bytes_beside(shape, 0) + shape.layer_bytes
    bounds = Conditions("here", int(room / module._FREE_PART))
    assert is_measured(layer_times(one_thread, shape, bounds), shape)
    assert max(asked) <= shape.layer_bytes


@pytest.mark.parametrize("free_bytes", [0, 1, 100_000])
def test_without_any_room_nothing_is_timed(
    one_thread: engine.Engine, shape: LayerShape, free_bytes: int
) -> None:
    assert layer_times(one_thread, shape, Conditions("here", free_bytes)) is None


def test_a_huge_layer_is_not_allocated(one_thread: engine.Engine) -> None:
    """All sizes at the limits of what makes a model: petabytes."""
    most = {name: "q8_0" for name, _ in shape_named("synthetic:tiny-q8_0").types}
    norms = {name for name in most if "norm" in name}
    huge = LayerShape(
        dim=2**17,
        n_layers=2**12,
        n_heads=2**12,
        n_kv_heads=2**12,
        head_dim=2**12,
        ffn_dim=2**20,
        vocab=2**22,
        types=tuple((n, "f32" if n in norms else t) for n, t in most.items()),
        head_type="f32",
    )
    assert layer_times(one_thread, huge, PLENTY) is None


def test_a_second_worker_takes_the_times_over(
    one_thread: engine.Engine, shape: LayerShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = layer_times(one_thread, shape, PLENTY)
    monkeypatch.setattr(module, "_by_layers", lambda *_: pytest.fail("measured again"))
    assert layer_times(one_thread, shape, PLENTY) == first
    for other in (Conditions("there", 2**32), Conditions("here", 2**32, cpu_quota=0.5)):
        with pytest.raises(pytest.fail.Exception):
            layer_times(one_thread, shape, other)
    with pytest.raises(pytest.fail.Exception):
        layer_times(one_thread, shape_named("synthetic:tiny-q4_1"), PLENTY)
    with pytest.raises(pytest.fail.Exception):
        layer_times(engine.Engine(threads=2), shape, PLENTY)


def test_processes_that_start_together_measure_once(shape: LayerShape) -> None:
    code = (
        "import logging; logging.basicConfig(level='INFO');"
        "from potluck import engine, synthetic; from potluck.layer_shape import shape_of;"
        "from potluck.model import config_of; from worker.layer_times import *;"
        "file = synthetic.open_synthetic('synthetic:tiny-q4_0');"
        "shape = shape_of(file, config_of(file));"
        "print(layer_times(engine.Engine(1), shape, Conditions('here', 2**32)))"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) for _ in range(3)]
    said = [process.communicate(timeout=60) for process in running]
    assert len({out for out, _ in said}) == 1, said
    assert sorted(err.count("measured before") for _, err in said) == [0, 1, 1]


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept.clear(),
        lambda kept: kept.update(seconds=[1.0]),
        lambda kept: kept.update(seconds=["x"] * 5),
        lambda kept: kept.update(seconds=[math.nan] * 5),
        lambda kept: kept.update(seconds=[-1.0] * 5),
        lambda kept: kept.update(rows=None),
        lambda kept: kept.update(layer_bytes=7),
        lambda kept: kept.update(head_seconds=[]),
    ],
)
def test_a_damaged_record_is_measured_anew(
    one_thread: engine.Engine,
    shape: LayerShape,
    cache: Path,
    change: Callable[[dict[str, object]], None],
) -> None:
    first = layer_times(one_thread, shape, PLENTY)
    assert first is not None
    path = cache / record.FILE_NAME
    ((key, (kept, at)),) = json.loads(path.read_text()).items()
    change(kept)
    path.write_text(json.dumps({key: [kept, at]}))
    again = layer_times(one_thread, shape, PLENTY)
    assert is_measured(again, shape)
    assert again is not None
    assert json.loads(path.read_text())[key][0] == json.loads(json.dumps(asdict(again)))


def test_a_worker_that_is_told_to_stop_gives_up(
    one_thread: engine.Engine, shape: LayerShape, cache: Path
) -> None:
    answers = iter([False] * 20)
    conditions = Conditions("here", 2**32, gives_up=lambda: next(answers, True))
    with pytest.raises(Cancelled):
        layer_times(one_thread, shape, conditions)
    assert (cache / record.FILE_NAME).read_text() == ""


class Clock(SimpleNamespace):
    """A machine on which a step of `rows` takes rows * `row_seconds` of the clock."""

    def __init__(self, row_seconds: float, *, cpu_part: float = 1.0) -> None:
        super().__init__(now=0.0, cpu=0.0)
        self.row_seconds, self.cpu_part = row_seconds, cpu_part
        self.n_rounds = dict.fromkeys(ROWS, 0)

    def monotonic(self) -> float:
        return float(self.now)

    perf_counter = monotonic

    def process_time(self) -> float:
        return float(self.cpu)

    def step(self, rows: int) -> Callable[[], None]:
        def run() -> None:
            self.n_rounds[rows] += 1
            self.now += rows * self.row_seconds
            self.cpu += rows * self.row_seconds * self.cpu_part

        return run


def readings_on(clock: Clock, monkeypatch: pytest.MonkeyPatch, **more: float) -> list[float]:
    monkeypatch.setattr(module, "time", clock)
    conditions = Conditions("here", 2**32, **more)  # type: ignore[arg-type]  # the quota
    runs = [(rows, clock.step(rows)) for rows in ROWS]
    found = module._readings(runs, conditions, module.BUDGET_SECONDS)
    return [reading.seconds(conditions.cpu_quota) for reading in found]


def test_a_fast_machine_is_done_after_some_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(1e-4)
    assert readings_on(clock, monkeypatch) == pytest.approx([rows * 1e-4 for rows in ROWS])
    assert max(clock.n_rounds.values()) == module.MOST_ROUNDS
    assert min(clock.n_rounds.values()) >= module.FEWEST_ROUNDS
    assert clock.now < 0.5


@pytest.mark.parametrize("row_seconds", [0.01, 0.03, 0.1, 0.5, 1.0])
def test_a_slow_machine_leaves_steps_of_many_rows_out(
    monkeypatch: pytest.MonkeyPatch, row_seconds: float
) -> None:
    clock = Clock(row_seconds)
    found = readings_on(clock, monkeypatch)
    assert clock.now <= module.BUDGET_SECONDS
    assert found == pytest.approx([rows * row_seconds for rows in ROWS[: len(found)]])
    assert (len(found) == len(ROWS)) == (row_seconds < 0.05)
    assert found


def test_a_machine_beyond_all_patience_is_timed_with_one_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert readings_on(Clock(30.0), monkeypatch) == [30.0]


def test_under_a_quota_each_figure_takes_several_of_its_periods(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(1e-4)
    readings_on(clock, monkeypatch, cpu_quota=0.5)
    for rows, n in clock.n_rounds.items():
        assert n * rows * 1e-4 > 3 * 0.1


def test_under_a_quota_that_binds_a_step_takes_its_cpu_time_over_the_quota(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 5 % more of the quota than its share was there by chance: it is not counted twice.
    clock = Clock(2e-3, cpu_part=0.5 * 1.05)
    found = readings_on(clock, monkeypatch, cpu_quota=0.5)
    assert found[0] == pytest.approx(1.05 * 2e-3)


def test_a_quota_that_does_not_bind_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(2e-3, cpu_part=1.0)
    assert readings_on(clock, monkeypatch, cpu_quota=1.5)[0] == pytest.approx(2e-3)
