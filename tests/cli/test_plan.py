"""`potluck plan`: tables for people, JSON for programs, and one clear line for each wrong turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coordinator.described import workers_of
from coordinator.planner import ModelSizes
from coordinator.workers_file import from_json, read
from potluck.cli import command_line as cli
from potluck.cli import described, plan, programs, terminal
from potluck.errors import PotluckError
from potluck.plan import DiskFigures, LayerTimes
from potluck.rpc.measured import disk_message, layer_times_message
from potluck.rpc.v1 import inference_pb2

if TYPE_CHECKING:
    from tests.cli.conftest import FakeService

Captured = pytest.CaptureFixture[str]

HOME = """
[[worker]]
id = "laptop"
count = 4
memory = "12 GiB"
read_gb_per_second = 50
macs_per_second = 6e11
disk_read_mb_per_second = 3000

[[worker]]
id = "pi"
memory = "6 GiB"
read_gb_per_second = 8

[[link]]
between = ["laptop", "pi"]
rtt_ms = 3
mbit_per_second = 200
"""
MODEL = ("plan", "synthetic:65b-q4_0", "--context", "2048")

# What `potluck-worker --describe MODEL` prints: the fields of WorkerInfo.
SAID: dict[str, Any] = {
    "id": "",
    "address": "",
    "isa": "avx2",
    "threads": 4,
    "memory_bytes": 16 * 10**9,
    "memory_free_bytes": 12 * 10**9,
    "read_bytes_per_second": 40.04e9,
    "machine": "Anna's Laptop",
    "room_bytes": None,
    "times": {
        "layer_bytes": 455_409_664,
        "rows": [1, 8, 64],
        "seconds": [0.0114, 0.0152, 0.0911],
        "head_bytes": 215_072_768,
        "head_seconds": 0.0054,
    },
    "disk": {
        "free_bytes": 10**11,
        "read_bytes_per_second": 2e9,
        "write_bytes_per_second": 1e9,
    },
}


@pytest.fixture
def home(tmp_path: Path) -> str:
    path = tmp_path / "home.toml"
    path.write_text(HOME, encoding="utf-8")
    return str(path)


@pytest.mark.cluster
def test_people_get_who_holds_what_and_how_fast(home: str, capsys: Captured) -> None:
    assert cli.main([*MODEL, "--workers", home]) == 0
    shown = capsys.readouterr().out
    for words in (
        "synthetic:65b-q4_0 on",
        "context 2,048, KV f16, planned for 1 answer at once",
        "laptop-1",
        "of free",
        "ms a token",
        "answers at once  tokens/s each  tokens/s in total",
        "first token",
        "loading",
        "slowest stage",
        "slowest link",
        "room for KV",
    ):
        assert words in shown
    assert max(len(line) for line in shown.splitlines()) <= 100


@pytest.mark.cluster
def test_programs_get_the_same_as_one_object(home: str, capsys: Captured) -> None:
    options = ("--use", "all", "--sessions", "8", "--kv-type", "q8", "--max-sessions", "1")
    assert cli.main([*MODEL, "--workers", home, "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["stages"]) == 5
    assert (found["sessions"], found["kv_type"], found["use"]) == (8, "q8", "all")
    layers = [layer for s in found["stages"] for layer in range(*s["span"])]
    assert layers == list(range(80))
    assert plan.heading(found).startswith("synthetic:65b-q4_0 on 5 workers: 80 layers")
    assert "8 answers at once" in plan.heading(found)
    rows = [" ".join(row) for row in terminal.plain_rows(plan.stage_table(found))]
    assert len(rows) == 6


@pytest.mark.cluster
def test_a_model_that_does_not_fit_ends_with_1_and_the_numbers(home: str, capsys: Captured) -> None:
    assert cli.main(["plan", "synthetic:65b-f16", "--workers", home]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("potluck: error: ")
    assert "GiB" in shown.err
    assert "54.0" in shown.err  # 4 * 12 + 6 offered


@pytest.mark.cluster
def test_a_slip_in_the_file_ends_with_2_and_the_place(home: str, capsys: Captured) -> None:
    path = Path(home)
    path.write_text(HOME.replace("read_gb", "reads_gb", 1), encoding="utf-8")
    assert cli.main([*MODEL, "--workers", home]) == 2
    said = capsys.readouterr().err
    assert f"{home}: [[worker]] 1 'laptop': reads_gb_per_second: unknown key; did you mean" in said
    assert cli.main([*MODEL, "--workers", str(path.with_name("none.toml"))]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.cluster
def test_an_unknown_model_is_named(home: str, capsys: Captured) -> None:
    assert cli.main(["plan", "smolm2", "--workers", home]) == 1
    said = capsys.readouterr().err
    assert "no model is called smolm2" in said
    assert "did you mean smollm2?" in said


def test_a_number_of_workers_is_no_file(capsys: Captured) -> None:
    assert cli.main([*MODEL, "--workers", "0"]) == 2
    said = capsys.readouterr().err
    assert "--workers 0: a file that describes machines, not how many" in said
    assert "`count = N`" in said


def test_two_sources_of_workers_exclude_each_other(home: str, capsys: Captured) -> None:
    assert cli.main([*MODEL, "--workers", home, "--connect", "127.0.0.1:1"]) == 2
    assert "--workers and --connect exclude each other" in capsys.readouterr().err


def test_options_of_this_machine_do_not_pass_for_options_of_others(
    home: str, capsys: Captured
) -> None:
    assert cli.main([*MODEL, "--workers", home, "--memory", "2 GiB"]) == 2
    said = capsys.readouterr().err
    assert "--memory is of this machine, and --workers describes machines" in said


@pytest.mark.cluster
def test_the_workers_of_a_cluster_are_planned_as_they_were_measured(
    service: FakeService, capsys: Captured
) -> None:
    service.report = _status()
    assert cli.main([*MODEL, "--connect", service.address, "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert f"the workers of the cluster at {service.address}" in shown.err
    assert {s["worker"]: s["memory_free_bytes"] for s in found["stages"]} == {
        "w1": 30 * 10**9,
        "w2": 31 * 10**9,
    }  # what they offered before they held anything; w3 is lost
    between = next(x for x in found["links"] if {x["from"], x["to"]} == {"w1", "w2"})
    assert between["predicted_seconds"] > 0.002  # half of the measured round trip, at least


@pytest.mark.cluster
def test_a_cluster_without_workers_is_told(service: FakeService, capsys: Captured) -> None:
    service.report = inference_pb2.StatusReply()
    assert cli.main([*MODEL, "--connect", service.address]) == 1
    assert "has no worker yet" in capsys.readouterr().err


def test_a_machine_is_described_in_the_words_of_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    asked = []

    def output_of(program: str, *arguments: str, stdin: str = "") -> str:
        asked.append((program, *arguments))
        return json.dumps(SAID)

    monkeypatch.setattr(programs, "output_of", output_of)
    given = ("--memory", "12000000000", "--threads", "2")
    assert cli.main(["plan", "synthetic:65b-q4_0", "--describe", *given]) == 0
    ((program, *arguments),) = asked
    assert (program, arguments[:2]) == ("potluck-worker", ["--describe", "synthetic:65b-q4_0"])
    assert sorted(arguments[2:]) == sorted(given)
    text = capsys.readouterr().out
    assert text.startswith('[[worker]]\nid = "anna-s-laptop"\nmemory = 12_000_000_000\n')
    path = tmp_path / "here.toml"
    path.write_text(text, encoding="utf-8")
    (here,) = workers_of(read(path), ModelSizes((455_409_664,) * 80, 1, 2, 3, 4), 5)
    assert here.times == LayerTimes(
        455_409_664, (1, 8, 64), (0.0114, 0.0152, 0.0911), 215_072_768, 0.0054
    )
    assert here.disk == DiskFigures(10**11, 2e9, 1e9)
    assert (here.memory_free_bytes, here.room_bytes) == (12 * 10**9, None)
    assert here.read_bytes_per_second == 40.04e9


def test_a_description_reads_the_same_as_json_and_as_toml(tmp_path: Path) -> None:
    table = described.of_machine({**SAID, "room_bytes": 5 * 10**9})
    path = tmp_path / "x.toml"
    path.write_text(described.toml_of(table), encoding="utf-8")
    from_file, from_text = read(path), from_json(json.dumps({"worker": [table]}), str(path))
    assert from_file == from_text
    assert from_file.workers[0].room_bytes == 5 * 10**9


@pytest.mark.parametrize("wrong", [{"memory_free_bytes": "12"}, {"times": {"rows": 1}}])
def test_words_of_another_release_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PotluckError, match="in words of another release"):
        described.of_machine({**SAID, **wrong})


@pytest.mark.parametrize(
    ("name", "id"),
    [("Pi_5.local", "pi-5-local"), ("", "here"), ("\u00e9", "here"), ("x" * 40, "x" * 32)],
)
def test_a_machines_name_becomes_an_id(name: str, id: str) -> None:
    assert described.id_of(name) == id


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(0.0512, "0.0512"), (12.44, "12.4"), (230.1, "230"), (999.7, "1,000"), (1776.2, "1,776")],
)
def test_speeds_are_written_as_people_write_them(rate: float, shown: str) -> None:
    speed = {"sessions": 1, "tokens_per_second_each": rate, "tokens_per_second": rate}
    table = plan.speed_table({"forecast": {"speeds": [speed]}})
    assert table.rows == (("1", shown, shown),)


def _status() -> inference_pb2.StatusReply:
    times = LayerTimes(455_409_664, (1, 8), (0.0114, 0.0152), 215_072_768, 0.0054)
    reply = inference_pb2.StatusReply(model="x", state="serving")
    for name, state in (("w1", 5), ("w2", 5), ("w3", 7)):
        worker = reply.workers.add(id=name, memory_free_bytes=10**9, read_bytes_per_second=4e10)
        worker.state = state  # type: ignore[assignment]  # ready, ready, lost
        worker.offered_bytes = (30 if name == "w1" else 31) * 10**9
        worker.layer_times.CopyFrom(layer_times_message(times))
        worker.disk.CopyFrom(disk_message(DiskFigures(10**12, 2e9, 1e9)))
    for start, end in (("w1", "w2"), ("w2", "w1"), ("w1", "w3"), ("coordinator", "w1")):
        link = reply.measured_links.add(to=end, rtt_seconds=0.004, bytes_per_second=1e8)
        setattr(link, "from", start)  # a word of Python's
    return reply
