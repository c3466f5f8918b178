"""bench/compare.py against a scripted other side: rounds, ratios and the file of results."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from potluck import testing
from potluck.cli.measuring import Test as Measure

ROOT = Path(__file__).resolve().parents[2]
# As bench/llama_side.py, but each token takes a tenth of a second without flash attention, half
# of that with it, and less with a KV in q8. Run as `PYTHON llama_side.py MODEL ...`, so the
# script's name is its first word.
OTHER_SIDE = """#!{python}
import json, sys
print(json.dumps({{"version": "0.0"}}), flush=True)
order = {{}}
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "open":
        order = asked
        print("{{}}", flush=True)
    elif {dies}:
        sys.exit(3)
    else:
        tokens = (order["n_prompt"] + order["n_gen"]) * order["n_sessions"]
        seconds = tokens * (0.1, 0.05, 0.04)[asked["setting"]]
        print(json.dumps({{"seconds": seconds}}), flush=True)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return testing.write_tiny(tmp_path / "tiny.gguf")


def other_side(folder: Path, *, dies: bool = False) -> Path:
    path = folder / "python"
    path.write_text(OTHER_SIDE.format(python=sys.executable, dies=dies))
    path.chmod(0o755)
    return path


def compare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "bench/compare.py", *map(str, arguments), "--rounds", "3"]
    line += ["--isa", "scalar"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_run_prints_its_rows_and_appends_them(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    tests = ["pp8", "tg4", "tg4x2", "tg4@d32"]
    llama = other_side(tmp_path)
    for threads in ("1", "2"):
        done = compare(
            *(model, "--llama-python", llama, "--threads", threads, "--csv", out, "--tests"), *tests
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == len(tests)
        assert "llama.cpp 1.00x" in done.stdout
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["threads"], r["test"]) for r in rows] == [(n, t) for n in ("1", "2") for t in tests]
    for row in rows:
        assert (row["type"], row["isa"], row["rounds"]) == ("Q4_0", "scalar", "3")
        assert (row["flash_attention"], row["llama_tps"]) == ("1", "20.0")
        ratio = float(row["potluck_tps"]) / 20
        assert float(row["ratio"]) == pytest.approx(ratio, rel=1e-3)
        assert float(row["ratio_min"]) <= float(row["ratio"]) <= float(row["ratio_max"])
        assert bool(row["potluck_of_bandwidth"]) == row["test"].startswith("tg")
        assert bool(row["potluck_over_one"]) == (row["test"] == "tg4x2")


@pytest.mark.parametrize(
    ("head_dim", "kv_type", "theirs", "rate"),
    [(32, "f16", "f16", "20.0"), (32, "q8", "q8_0", "25.0"), (16, "q8", "f16", "20.0")],
)
def test_a_kv_in_q8_is_compared_with_the_best_that_llama_can(
    head_dim: int, kv_type: str, theirs: str, rate: str, tmp_path: Path
) -> None:
    path = testing.write_tiny(tmp_path / "m.gguf", testing.TinyShape(head_dim=head_dim))
    out = tmp_path / "out.csv"
    done = compare(
        *(path, "--llama-python", other_side(tmp_path), "--threads", "1", "--csv", out),
        *("--tests", "tg4", "--kv-type", kv_type),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (f"KV q8 against {theirs}" in done.stdout) == (kv_type == "q8")
    with out.open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["kv_type"], row["llama_kv_type"], row["llama_tps"]) == (kv_type, theirs, rate)


def test_a_side_that_ends_fails_that_file_and_not_the_next(model: Path, tmp_path: Path) -> None:
    llama = other_side(tmp_path, dies=True)
    done = compare(model, model, "--llama-python", llama, "--threads", "1", "--tests", "pp4")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"{model}: llama_side.py ended with 3"] * 2
    assert done.stdout == ""


def test_results_with_other_columns_are_not_appended_to(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "old.csv"
    out.write_text("cpu,isa\n")
    done = compare(model, "--llama-python", other_side(tmp_path), "--csv", out)
    assert done.returncode == 1
    assert "other columns" in done.stderr
    assert out.read_text() == "cpu,isa\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tests", "pp512"], "the model's context is 256"),
        (["--tests", "tg"], "'tg' names no test"),
        (["--threads", "0"], "1 or more"),
    ],
)
def test_what_can_not_be_compared_is_said(
    options: list[str], says: str, model: Path, tmp_path: Path
) -> None:
    done = compare(model, "--llama-python", other_side(tmp_path), *options)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_the_better_setting_of_the_other_side_counts(
    script: Callable[[str], ModuleType],
) -> None:
    rounds = script("compare").Rounds(
        ours=[1.0, 2.0, 1.0], theirs=[[4.0, 4.0, 4.0], [9.0, 3.0, 3.0]]
    )
    assert rounds.best == 1  # by its median, though one round was worst
    assert rounds.ratios == [1.5, 3.0, 9.0]  # round by round, sorted


def test_who_begins_changes_from_round_to_round(script: Callable[[str], ModuleType]) -> None:
    asked: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self, **order: object) -> dict[str, object]:
            return {}

        def seconds(self, setting: int | None = None) -> float:
            asked.append(f"{self.name}{'' if setting is None else setting}")
            return 1.0

    test = Measure.named("tg8")
    script("compare").rounds_of(test, 8, Fake("ours"), Fake("theirs"), 3)
    assert asked == [
        *("ours", "theirs0", "theirs1"),
        *("theirs0", "theirs1", "ours"),
        *("theirs1", "ours", "theirs0"),
    ]
