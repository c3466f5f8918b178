"""Clusters of described machines: the planner's forecast, the scheduler's work and the page."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

Script = Callable[[str], ModuleType]

SLOW_LINK = """
[network]
rtt_ms = 40
mbit_per_second = 100
"""
UNLIKE = """
[[worker]]
id = "large"
memory = "30 GiB"
read_gb_per_second = 60
macs_per_second = 1.2e12

[[worker]]
id = "small"
count = 2
memory = "10 GiB"
read_gb_per_second = 20
macs_per_second = 0.1e12
"""


@pytest.fixture
def simulate(script: Script) -> ModuleType:
    return script("simulate")


@pytest.mark.parametrize("network", ["", SLOW_LINK])
def test_the_scheduler_reaches_what_the_planner_forecasts(
    simulate: ModuleType, tmp_path: Path, network: str
) -> None:
    file = tmp_path / "machines.toml"
    file.write_text(network + UNLIKE, encoding="utf-8")
    shape = simulate.shape_of("synthetic:30b-q4_0", 0)
    result = simulate.result_of(simulate.Cluster("unlike", file), shape)
    assert [row.people for row in result.rows] == [1, 3, 6, 12]
    for row in result.rows:
        forecast = row.forecast.tokens_per_second(row.people)
        assert row.tokens_per_second == pytest.approx(forecast, rel=0.05), row.people
    first = result.first_token
    forecast = first.forecast.first_token_seconds(512)
    assert first.outcome.first_token_seconds == pytest.approx(forecast, rel=0.05)


def test_a_step_for_each_stage_is_slower_where_one_stage_is_long(simulate: ModuleType) -> None:
    shape = simulate.shape_of("synthetic:65b-q4_0", 0)
    household = simulate.machines(simulate.FOLDER / "household.toml", wifi=False)
    row = simulate.row_of(household, shape, 8, simulate.SESSION, wifi=False)
    limits = simulate.limits_of(row.plan, row.forecast, shape, 8)
    pipe = simulate.pipe_of(row.forecast, shape.sizes.row_bytes)
    each = simulate.simulate(pipe, replace(limits, spread=()), [simulate.SESSION] * 8)
    assert row.tokens_per_second > 1.2 * each.tokens_per_second


def test_links_that_share_a_radio_are_no_faster_than_those_that_do_not(
    simulate: ModuleType,
) -> None:
    shape = simulate.shape_of("synthetic:65b-q4_0", 0)
    by_wifi = simulate.machines(simulate.FOLDER / "four-laptops.toml", wifi=True)
    rates = [
        simulate.row_of(by_wifi, shape, 16, simulate.SESSION, wifi=shared).tokens_per_second
        for shared in (True, False)
    ]
    assert 0.9 * rates[1] < rates[0] <= rates[1]


def test_kv_for_fewer_than_ask_is_said(simulate: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "machines.toml"
    file.write_text(UNLIKE.replace("30 GiB", "2 GiB").replace("10 GiB", "9 GiB"), encoding="utf-8")
    shape = simulate.shape_of("synthetic:30b-q4_0", 0)
    result = simulate.result_of(simulate.Cluster("tight", file), shape)
    assert result.rows[-1].tokens_per_second is None
    assert "at once" in simulate.table([result]).splitlines()[-1]


def test_wrong_files_are_errors_of_two_lines(
    simulate: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for text in (None, "[[worker]]", UNLIKE.replace("30 GiB", "1 GiB")):
        file = tmp_path / "machines.toml"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["simulate", "--workers", str(file)])
        assert simulate.main() == 1
        assert capsys.readouterr().err.startswith("simulate: error: ")


def test_the_page_has_a_place_for_each_table(simulate: ModuleType) -> None:
    with pytest.raises(ValueError, match="no place for the table checked"):
        simulate.filled("<!-- clusters -->", [], "[]")


def test_the_page_says_what_the_simulator_says_now(
    simulate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--check"])
    assert simulate.main() == 0, "run python -m bench.simulate --write"
