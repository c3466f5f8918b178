"""`potluck bench-cluster`: what it makes of readings, and a real cluster of a tiny model."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from potluck import testing
from potluck.cli import cluster_figures
from potluck.cli import command_line as cli
from potluck.errors import UsageError
from potluck.replies import ForecastReport, LinkReport, ServiceReport, StageReport
from potluck.testing import TinyShape

if TYPE_CHECKING:
    from tests.cli.conftest import FakeService

PATIENCE_SECONDS = 40.0
STAGE = StageReport(0, "w1", (0, 2), 0, 0, 0.006, 0.001, 0.002, 0.001)
LINK = LinkReport("w1", "w2", 0.001, 0.0, sent_bytes=1000, activation_bytes=800)


def a_report(**changes: Any) -> ServiceReport:
    fields: dict[str, Any] = {
        "model": "tiny",
        "state": "serving",
        "detail": "",
        "epoch": 1,
        "plan": (STAGE, replace(STAGE, stage=1)),
        "workers": (),
        "links": (),
        "sessions": 0,
        "queue": 0,
        "potluck_version": "",
        "protocol": 1,
        "context_tokens": 512,
        "expected_workers": 2,
        "kv_type": "f16",
        "wire": "f32",
        "kv_bytes_per_token": 1,
    }
    return ServiceReport(**{**fields, **changes})


def test_a_rate_counts_only_while_all_answers_run() -> None:
    early = [0.0, 1.0, 2.0, 3.0, 4.0]
    late = [2.0, 3.0, 4.0, 5.0, 6.0]
    assert cluster_figures.rate_together([early]) == pytest.approx(1.0)
    assert cluster_figures.rate_together([early, late]) == pytest.approx(2.0)
    with pytest.raises(UsageError, match="never ran at once"):
        cluster_figures.rate_together([[0.0, 1.0], [2.0, 3.0]])


def test_bytes_a_token_come_from_counters_that_went_on() -> None:
    after = replace(LINK, sent_bytes=3000, activation_bytes=2400)
    begun_again = replace(LINK, start="w2", end="coordinator", sent_bytes=10)
    before = [LINK, replace(begun_again, sent_bytes=20)]
    one, other = cluster_figures.link_bytes(before, [after, begun_again], 20)
    assert (one.bytes_per_token, one.activation_bytes_per_token) == (100, 80)
    assert other.bytes_per_token is None
    assert cluster_figures.link_bytes(before, [after], 0)[0].bytes_per_token is None


def test_shares_of_a_stage_add_up() -> None:
    assert cluster_figures.shares(STAGE) == pytest.approx(
        {"compute": 0.6, "serialise": 0.1, "wire": 0.2, "wait": 0.1}
    )
    idle = replace(STAGE, compute_seconds=0, serialise_seconds=0, wire_seconds=0, wait_seconds=0)
    assert set(cluster_figures.shares(idle).values()) == {0.0}


def test_predictions_stand_beside_what_they_are_of() -> None:
    report = a_report(forecast=ForecastReport(10, 18, 30, 2.5, 1))
    assert [cluster_figures.predicted_rate(report, n) for n in (1, 2, 3, 4)] == [10, 18, None, 30]
    assert cluster_figures.predicted_rate(a_report(), 1) is None
    streams = cluster_figures.StreamsFigures(1, (8.0, 9.0, 7.0), report.plan, 10)
    figures = cluster_figures.ClusterFigures(report, 512, 64, 3, (streams,), (2.0,), (), ())
    speed = cluster_figures.tables(figures)[0]
    assert ("1 stream", "7.00", "8.00", "9.00", "tokens/s", "10.00", "80%") in speed.rows
    assert ("first token of 512", "2.00", "2.00", "2.00", "s", "2.50", "80%") in speed.rows
    told = replace(STAGE, predicted_seconds=0.005)
    assert [replace(streams, streams=n).predicted_seconds(told) for n in (1, 4)] == [0.005, None]
    assert streams.predicted_seconds(STAGE) is None
    assert replace(figures, prompt_tokens=100).first_token_predicted is None


def failed(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    assert cli.main(["bench-cluster", *line]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_no_service_is_said_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    said = failed(capsys, "--connect", "127.0.0.1:1")
    assert "nobody answers at 127.0.0.1:1" in said
    assert "potluck serve" in said


def test_a_service_that_waits_is_not_measured(
    service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.state = "waiting"
    assert "tiny is waiting" in failed(capsys, "--connect", service.address)
    assert service.asked == []


def test_what_the_context_has_no_room_for_is_refused_first(
    service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.context_tokens = 100
    said = failed(capsys, "--connect", service.address)
    assert "--prompt-tokens needs 513 positions; the service's context is 100" in said
    said = failed(capsys, "--connect", service.address, "--prompt-tokens", "50", "--max-tokens=90")
    assert "--max-tokens needs 106 positions" in said
    assert service.asked == []


def test_wrong_options_end_before_anything_is_asked() -> None:
    for line in (["--max-tokens", "1"], ["--rounds", "0"], ["--prompt-tokens", "x"], ["smollm2"]):
        assert cli.main(["bench-cluster", *line]) == 2


@contextlib.contextmanager
def serving(model: Path, potluck: list[str], *more: str) -> Iterator[str]:
    """The address of a real service on two workers."""
    command = [*potluck, "serve", str(model), "--local-workers", "2", "--threads", "1", "--json"]
    server = subprocess.Popen(
        [*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line, server.communicate()[1]
        yield json.loads(line)["address"]
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=PATIENCE_SECONDS)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return testing.write_tiny(tmp_path / "tiny.gguf", TinyShape(n_layers=4))


FEW = ("--rounds", "2", "--max-tokens", "24", "--prompt-tokens", "40")


@pytest.mark.cluster
def test_a_real_cluster_is_measured(
    model: Path, potluck: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(model, potluck) as address:
        assert cli.main(["bench-cluster", "--connect", address, *FEW, "--json"]) == 0
        figures: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert cli.main(["bench-cluster", "--connect", address, *FEW]) == 0
        shown = capsys.readouterr().out
    assert [s["streams"] for s in figures["streams"]] == [1, 2, 4]
    for streams in figures["streams"]:
        assert len(streams["samples"]) == 2
        assert streams["tokens_per_second"] > 0
        for stage in streams["stages"]:
            parts = [stage[f"{part}_share"] for part in ("compute", "serialise", "wire", "wait")]
            assert sum(parts) == pytest.approx(1.0)
            assert stage["compute_seconds"] > 0
    assert figures["first_token"]["seconds"] > 0
    links = {(x["from"], x["to"]): x for x in figures["links"]}
    first, last = (s["worker"] for s in figures["streams"][0]["stages"])
    assert links.keys() == {("coordinator", first), (first, last), (last, "coordinator")}
    a_row = 4 * TinyShape().dim
    assert links[first, last]["activation_bytes_per_token"] == pytest.approx(a_row)
    assert links[first, last]["bytes_per_token"] > a_row
    assert links["coordinator", first]["activation_bytes_per_token"] == 0
    assert figures["notes"] == []
    assert "4 streams" in shown
    assert "first token of 40" in shown
    assert max(len(line) for line in shown.splitlines()) <= 100


@pytest.mark.cluster
def test_too_few_places_are_said_and_the_rest_is_measured(
    model: Path, potluck: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(model, potluck, "--max-sessions", "3", "--queue", "0") as address:
        assert cli.main(["bench-cluster", "--connect", address, *FEW, "--json"]) == 0
        out, err = capsys.readouterr()
    figures = json.loads(out)
    assert [s["streams"] for s in figures["streams"]] == [1, 2, 3]
    assert "places for 3 of 4 answers at once" in err
    assert len(figures["notes"]) == 1
