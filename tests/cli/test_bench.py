"""`potluck bench`: llama-bench's field names, and figures that follow from each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from potluck import testing
from potluck.cli import command_line as cli

# What llama-bench prints with `-o json` and readers of its results use.
LLAMA_BENCH = {
    "build_commit",
    "build_number",
    "cpu_info",
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "n_batch",
    "n_ubatch",
    "n_threads",
    "type_k",
    "type_v",
    "n_prompt",
    "n_gen",
    "n_depth",
    "test_time",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
    "samples_ns",
    "samples_ts",
}
OURS = {"isa", "read_bandwidth", "gb_per_second", "gmac_per_second"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    testing.write_tiny(path)
    return path


def bench(model: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    line = ["bench", str(model), "-t", "1", "--isa", "scalar", "--json", *options]
    assert cli.main(line) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_json_has_the_names_of_llama_bench(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench(model, "-p", "7", "-n", "5", "-b", "3", "-r", "2", capsys=capsys)
    assert [row.keys() for row in rows] == [LLAMA_BENCH | OURS] * 3
    prompt, one, three = rows
    assert (prompt["n_prompt"], prompt["n_gen"], prompt["n_batch"]) == (7, 0, 7)
    assert (one["n_prompt"], one["n_gen"], one["n_batch"]) == (0, 5, 1)
    assert (three["n_prompt"], three["n_gen"], three["n_batch"]) == (0, 5, 3)
    assert {row["isa"] for row in rows} == {"scalar"}
    assert {row["n_threads"] for row in rows} == {1}


def test_the_figures_follow_from_the_samples(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = bench(model, "-p", "0", "-n", "4", "-r", "3", capsys=capsys)
    assert len(row["samples_ns"]) == len(row["samples_ts"]) == 3
    assert row["avg_ns"] == pytest.approx(sum(row["samples_ns"]) / 3, abs=1)
    assert row["samples_ts"][0] == pytest.approx(4e9 / row["samples_ns"][0], rel=1e-3)
    assert row["stddev_ts"] >= 0
    assert 0 < row["gb_per_second"] * 1e9 * row["avg_ns"] / 4e9 <= row["model_size"] * 1.001


def test_people_get_a_table(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(model), "-p", "4", "-n", "2", "-r", "1", "-t", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Memory reads" in shown
    assert "pp4" in shown
    assert "tg2" in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--isa", "nonsense"], "nonsense"),
        (["-n", "999999"], "999999 tokens; the model's context is"),
    ],
)
def test_what_can_not_be_measured_is_said(
    options: list[str], says: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", str(model), "-p", "4", *options]) in (1, 2)
    said = capsys.readouterr()
    assert says in said.err
    assert said.out == ""
