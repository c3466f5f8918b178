"""`potluck-coordinator --plan`: a plan as one JSON object, and what it says when there is none."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.__main__ import main
from coordinator.config import settings_of
from potluck.errors import UsageError

TWO = """
[network]
rtt_ms = 1
mbit_per_second = 800
[[worker]]
id = "a"
count = 2
memory = "2 GiB"
read_gb_per_second = 10
macs_per_second = 1e11
"""
MODEL = "synthetic:1b-q4_0"


@pytest.fixture
def planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """planned(text, options...): the JSON, or the exit code and what stderr says."""

    def run(text: str, *options: str, model: str = MODEL) -> Any:
        path = tmp_path / "home.toml"
        path.write_text(text, encoding="utf-8")
        code = main([model, "--plan", "--workers-file", str(path), *options])
        shown = capsys.readouterr()
        return json.loads(shown.out) if code == 0 else (code, shown.err)

    return run


def test_a_plan_names_every_layer_once_and_what_it_takes(planned: Any) -> None:
    found = planned(TWO, "--use", "all", "--context", "1024", "--max-sessions", "2")
    first, second = found["stages"]
    assert (first["span"], second["span"]) == ([0, 12], [12, 22])  # the head takes time too
    assert first["n_layers"] + second["n_layers"] == found["n_layers"] == 22
    assert found["kv"] == {"tokens": 2048, "bytes_per_token": 22 * 4 * 64 * 2 * 2}
    assert first["kv_bytes"] + second["kv_bytes"] == 2048 * found["kv"]["bytes_per_token"]
    assert first["memory_free_bytes"] == 2 * 2**30
    assert found["spares"] == found["replicas"] == []


def test_the_forecast_adds_up(planned: Any) -> None:
    found = planned(TWO, "--use", "all", "--sessions", "3")
    forecast = found["forecast"]
    whole = sum(s["predicted_seconds"] for s in (*found["stages"], *found["links"]))
    assert whole == pytest.approx(forecast["sweep_seconds"])
    assert [x["sessions"] for x in forecast["speeds"]] == [1, 2, 3, 4]
    alone = forecast["speeds"][0]
    assert alone["tokens_per_second"] == pytest.approx(1 / whole)
    for speed in forecast["speeds"]:
        assert speed["tokens_per_second_each"] * speed["sessions"] == pytest.approx(
            speed["tokens_per_second"]
        )
    assert [(x["from"], x["to"]) for x in found["links"]] == [
        ("coordinator", "a-1"),
        ("a-1", "a-2"),
        ("a-2", "coordinator"),
    ]
    # 1 ms round trip at 100 MB/s; a row of 2048 values in f32 and 100 bytes of the message.
    assert found["links"][1]["predicted_seconds"] == pytest.approx(0.0005 + 8292 / 1e8)


def test_a_machine_that_slows_the_others_is_a_spare(planned: Any) -> None:
    slow = '[[worker]]\nid = "slow"\nmemory = "4 GiB"\nread_gb_per_second = 1\n'
    assert planned(TWO + slow)["spares"] == ["a-2", "slow"]  # one answer: one fast machine
    everyone = planned(TWO + slow, "--use", "all")
    assert everyone["spares"] == []
    assert len(everyone["stages"]) == 3


def test_limits_hold_whichever_file_they_are_in(planned: Any, tmp_path: Path) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text('[[worker]]\nid = "a-1"\nexclude = true\n', encoding="utf-8")
    found = planned(TWO, "--limits", str(limits))
    assert [s["worker"] for s in found["stages"]] == ["a-2"]
    few = planned(TWO.replace('"a"', '"b"') + "layers = 11\n", "--use", "all")
    assert [s["n_layers"] for s in few["stages"]] == [11, 11]


def test_further_pipelines_are_planned_on_request_only(planned: Any) -> None:
    four = TWO.replace("count = 2", "count = 4").replace('"2 GiB"', '"1 GiB"')
    options = ("--sessions", "64", "--max-sessions", "64", "--context", "64")
    assert planned(four, *options)["replicas"] == []
    found = planned(four, *options, "--replicas")
    held = [found["stages"], *found["replicas"]]
    assert len(held) > 1
    for stages in held:
        assert [layer for s in stages for layer in range(*s["span"])] == list(range(22))
    workers = [s["worker"] for stages in held for s in stages]
    assert len(set(workers)) == len(workers)


def test_a_description_may_come_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"worker": [{"id": "w1", "memory": 2**31, "read_gb_per_second": 10}]}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(said)))
    assert main([MODEL, "--plan"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(s["worker"], s["span"]) for s in found["stages"]] == [("w1", [0, 22])]


def test_a_model_that_does_not_fit_is_refused_with_both_numbers(planned: Any) -> None:
    code, said = planned(TWO, model="synthetic:65b-q4_0")
    assert code == 1
    assert said.startswith("potluck-coordinator: error: ")
    assert "GiB" in said
    assert "2 workers offer 4.0" in said


def test_nobody_to_plan_is_said(planned: Any) -> None:
    code, said = planned("[network]\nrtt_ms = 1\n")
    assert (code, "home.toml: describes no worker" in said) == (2, True)
    code, said = planned(TWO + "exclude = true\n")
    assert (code, "every worker is excluded" in said) == (1, True)


def test_a_model_that_is_unknown_is_said(planned: Any) -> None:
    code, said = planned(TWO, model="synthetic:66b-q4_0")
    assert code == 1
    assert "synthetic:66b-q4_0" in said


def test_a_workers_file_goes_with_a_plan_only() -> None:
    with pytest.raises(UsageError, match="--workers-file goes with --plan"):
        settings_of(["m", "--workers-file", "x.toml"])
    with pytest.raises(UsageError, match="--replicas goes with --plan"):
        settings_of(["m", "--replicas"])
    with pytest.raises(UsageError, match="--sessions: 1 to 256, not 0"):
        settings_of(["m", "--sessions", "0"])
