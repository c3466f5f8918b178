"""bench/rpc.py without any llama.cpp: rounds that count, medians, ratios, and what it refuses."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bench import cpu_time
from potluck.cli.measuring import Test as Measure
from potluck.errors import UsageError


@pytest.fixture
def rpc(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("rpc")


def runs(module: ModuleType, *seconds: float, foreign: float = 0.0) -> list[Any]:
    return [module.Run(s, foreign, 0.0) for s in seconds]


ABOUT: dict[str, object] = {
    "cpu": "a CPU",
    "isa": "scalar",
    "model": "a model",
    "sha256": "0",
    "workers": 2,
    "potluck": "0",
    "commit": "0",
    "llama_cpp_python": "0",
}
SETTINGS = {"potluck": "", "rpc": "flash attention on", "process": "flash attention off"}


def test_rates_are_medians_and_ratios_stay_within_a_round(rpc: ModuleType) -> None:
    measured = {
        "potluck": runs(rpc, 1.0, 2.0, 4.0),
        "rpc": runs(rpc, 3.0, 4.0, 6.0),  # in its rounds 3, 2 and 1.5 times as long
        "process": runs(rpc, 1.0, 1.0, 1.0),
    }
    row = rpc.row_of(Measure(0, 32), measured, SETTINGS, (40.0, 60.0), None, ABOUT)
    assert (row.potluck_tps, row.rpc_tps, row.process_tps) == (16.0, 8.0, 32.0)
    assert (row.over_rpc, row.over_rpc_min, row.over_rpc_max) == (2.0, 1.5, 3.0)
    assert (row.over_process, row.over_process_min, row.over_process_max) == (0.5, 0.25, 1.0)
    assert (row.rounds, row.potluck_over_one) == (3, None)
    assert "memory reads" not in str(row)


def test_several_sessions_stand_beside_one_and_beside_the_memory(rpc: ModuleType) -> None:
    one = {name: runs(rpc, 2.0) for name in SETTINGS}
    two = {"potluck": runs(rpc, 2.5), "rpc": runs(rpc, 4.0), "process": runs(rpc, 2.0)}
    read = (40.0, 64.0)
    first = rpc.row_of(Measure(0, 32), one, SETTINGS, read, None, ABOUT)
    row = rpc.row_of(Measure(0, 32, 0, 2), two, SETTINGS, read, first, ABOUT)
    assert (row.potluck_tps, row.potluck_over_one) == (25.6, 1.6)
    assert (row.rpc_over_one, row.process_over_one) == (1.0, 2.0)
    assert "total 1.60x one session's" in str(row)
    assert "memory reads 1.60x as fast" in str(row)


class Scripted:
    """Takes the next of its times; others take CPU time as long as it says."""

    def __init__(self, times: list[float]) -> None:
        self.pids: list[int] = []
        self.times = times
        self.order: list[int] = []

    def open(self, test: Measure) -> str:
        return ""

    def seconds(self) -> float:
        return self.times.pop(0)


def scripted(
    rpc: ModuleType, monkeypatch: pytest.MonkeyPatch, foreign: dict[float, float]
) -> list[str]:
    """Runs without clocks: `foreign` by seconds of a run, else none. Returns who ran, in order."""
    ran: list[str] = []

    def run_of(name: str, contenders: dict[str, Scripted]) -> Any:
        ran.append(name)
        seconds = contenders[name].seconds()
        return rpc.Run(seconds, foreign.get(seconds, 0.0), 0.0)

    monkeypatch.setattr(rpc, "run_of", run_of)
    return ran


def test_who_begins_changes_from_round_to_round(
    rpc: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = scripted(rpc, monkeypatch, {})
    three = {name: Scripted([1.0, 2.0, 3.0]) for name in "abc"}
    kept = rpc.rounds_of(three, 3, 0.04)
    assert "".join(ran) == "abcbcacab"
    assert {name: [run.seconds for run in kept[name]] for name in kept} == {
        name: [1.0, 2.0, 3.0] for name in "abc"
    }


def test_a_disturbed_round_is_run_again_whole(
    rpc: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(rpc, monkeypatch, {2.0: 0.5})
    two = {"a": Scripted([1.0, 2.0, 3.0]), "b": Scripted([11.0, 12.0, 13.0])}
    kept = rpc.rounds_of(two, 2, 0.04)
    assert [run.seconds for run in kept["a"]] == [1.0, 3.0]
    assert [run.seconds for run in kept["b"]] == [11.0, 13.0]
    assert "others took 50% of a CPU" in capsys.readouterr().err


def test_a_machine_that_stays_busy_ends_the_comparison(
    rpc: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(rpc, monkeypatch, {1.0: 0.5})
    one = {"a": Scripted([1.0] * 100)}
    with pytest.raises(rpc.SideLost, match="not quiet"):
        rpc.rounds_of(one, 2, 0.04)
    assert len(one["a"].times) == 100 - 2 * rpc.TRIES


def test_a_run_knows_what_others_and_resting_contenders_took(
    rpc: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = iter(
        [
            {"a": 10.0, "b": 20.0, "bench": 1.0, "": 100.0},
            {"a": 12.0, "b": 20.25, "bench": 1.25, "": 103.5},
        ]
    )
    clock = iter([5.0, 7.0])
    monkeypatch.setattr(rpc.cpu_time, "seconds_of", lambda groups: next(spent))
    monkeypatch.setattr(rpc.time, "perf_counter", lambda: next(clock))
    run = rpc.run_of("a", {"a": Scripted([2.0]), "b": Scripted([])})
    assert run == rpc.Run(seconds=2.0, foreign=0.5, idle=0.125)


def test_cpu_time_is_read_from_the_systems_files() -> None:
    machine = "cpu  100 20 30 4000 500 6 7 8 900 900\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert cpu_time.busy_seconds(machine) == pytest.approx(
        (100 + 20 + 30 + 6 + 7 + 8) / cpu_time.TICKS
    )
    fields_of = " ".join(["S", *map(str, range(4, 53))])  # state is the third, utime the 14th
    process = f"42 (a name) with) brackets) {fields_of}"
    assert cpu_time.process_seconds(process) == pytest.approx((14 + 15) / cpu_time.TICKS)


class ScriptedSide:
    """A llama.cpp whose settings take so long."""

    def __init__(self, seconds_of: dict[int, float]) -> None:
        self.pid = 1
        self.seconds_of = seconds_of
        self.opened: list[int] = []

    def ask(self, **order: Any) -> dict[str, Any]:
        self.opened = order["settings"]
        return {"seconds": [self.seconds_of[setting] for setting in self.opened]}

    def seconds(self, *, setting: int) -> float:
        assert setting in self.opened
        return self.seconds_of[setting]


def test_llama_takes_part_in_its_fastest_setting(rpc: ModuleType) -> None:
    side = ScriptedSide({0: 4.0, 1: 3.0, 3: 1.0, 4: 2.0})
    llama = rpc.Llama(side, list(rpc.SETTINGS), [7, 8])
    assert llama.pids == [1, 7, 8]
    assert llama.open(Measure(512, 0)) == "flash attention on, 128 rows at once"
    assert llama.seconds() == 1.0
    assert llama.open(Measure(0, 32)) == "flash attention on"  # fewer rows would change nothing
    assert llama.seconds() == 3.0


@pytest.mark.parametrize("name", ["pp512+tg32", "tg32@d512"])
def test_a_test_that_sides_would_run_differently_is_refused(rpc: ModuleType, name: str) -> None:
    with pytest.raises(UsageError, match="reads prompts or makes tokens"):
        rpc.tests_of([name])


def test_a_folder_without_the_server_is_named(rpc: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(rpc.SideLost, match="GGML_RPC=ON"), rpc.rpc_servers(tmp_path, 2):
        pass


def test_a_server_that_ends_is_noticed(rpc: ModuleType, tmp_path: Path) -> None:
    program = tmp_path / "rpc-server"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(rpc.SideLost, match="does not listen"), rpc.rpc_servers(tmp_path, 1):
        pass


def test_the_page_has_the_newest_figures_of_each_test(
    script: Callable[[str], ModuleType], rpc: ModuleType
) -> None:
    def line(tps: float, test: Measure, one: Any = None) -> tuple[Any, dict[str, str]]:
        measured = {name: runs(rpc, test.n_tokens / tps) for name in SETTINGS}
        row = rpc.row_of(test, measured, SETTINGS, (40.0, 64.0), one, ABOUT)
        return row, {name: "" if v is None else str(v) for name, v in rpc.asdict(row).items()}

    one, first = line(10.0, Measure(0, 32))
    lines = [line(9.0, Measure(0, 32))[1], first]
    lines += [line(16.0, Measure(0, 32, 0, 2), one)[1], line(90.0, Measure(512, 0))[1]]
    made = script("rpc_table").table(lines)
    equal = "**1.00** (1.00 to 1.00) | **1.00** (1.00 to 1.00)"
    assert made.splitlines()[4:] == [
        f"| 1 stream of 32 tokens | 10.00 | 10.00 | 10.00 | {equal} |",
        f"| 2 streams of 32 tokens | 16.00, 1.60x | 16.00, 1.60x | 16.00, 1.60x | {equal} |",
        f"| 1 prompt of 512 | 90.00 | 90.00 | 90.00 | {equal} |",
    ]
    assert "one thread reads 40.0 GB/s, 2 read 64.0: 1.60 times as much" in made


def test_the_page_has_the_kept_results(script: Callable[[str], ModuleType]) -> None:
    module = script("rpc_table")
    text = module.PAGE.read_text(encoding="utf-8")
    assert module.table(module.rows(module.ROOT / "bench" / "results" / "rpc")) in text


def test_the_kept_results_have_todays_columns(rpc: ModuleType) -> None:
    names = [field.name for field in fields(rpc.Row)]
    for path in sorted((Path(rpc.HERE) / "results" / "rpc").glob("*.csv")):
        with path.open(encoding="utf-8") as file:
            assert next(csv.reader(file)) == names, path.name
