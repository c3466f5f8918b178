"""`potluck status`: a table for people, one object for programs."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from potluck.cli import command_line as cli

if TYPE_CHECKING:
    from tests.cli.conftest import FakeService


def test_json_has_the_promised_names(
    service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--connect", service.address, "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    names = {"model", "epoch", "plan", "workers", "links", "sessions", "queue", "figures"}
    assert names <= report.keys()
    stage = {"stage", "worker", "span", "memory_bytes"}
    stage |= {"compute_seconds", "wire_seconds", "wait_seconds"}
    assert stage <= report["plan"][0].keys()
    worker = {"id", "address", "state", "isa", "threads", "memory_bytes", "memory_free_bytes"}
    assert worker | {"seen_seconds"} <= report["workers"][0].keys()
    assert {"from", "to", "rtt_seconds", "bytes_per_second"} <= report["links"][0].keys()
    assert report["plan"][0]["span"] == [0, 11]
    assert report["workers"][0]["state"] == "ready"
    assert report["figures"]["tokens_per_second"] == 12.5
    assert report["plan"][0]["predicted_seconds"] == 0.0021
    assert report["forecast"]["spares"] == ["w2", "w3"]
    assert report["forecast"]["tokens_per_second"] == 80.0
    assert report["measured_links"] == []
    assert (report["kv_type"], report["kv_bytes_per_token"]) == ("f16", 23_040)


def test_people_get_tables_of_stages_workers_and_links(
    service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--connect", service.address]) == 0
    shown = capsys.readouterr().out
    assert f"tiny at {service.address}: serving, epoch 3" in shown
    assert "12.5 tokens/s" in shown
    assert "KV f16" in shown
    assert "0-10    3.0 MiB     2.34       2.10" in shown
    assert "predicted 80.0 tokens/s for one answer, first token of a prompt of 512 after" in shown
    assert "spare w2, w3" in shown
    assert "advice w1 alone is faster" in shown
    assert "w1      ready  127.0.0.1:7690  avx2" in shown
    assert max(len(line) for line in shown.splitlines()) <= 100


@pytest.mark.cluster
def test_watch_goes_on_until_ctrl_c(service: FakeService, potluck: list[str]) -> None:
    watcher = subprocess.Popen(
        [*potluck, "status", "--connect", service.address, "--json", "--watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watcher.stdout is not None
    lines = [json.loads(watcher.stdout.readline()) for _ in range(2)]
    assert [line["epoch"] for line in lines] == [3, 3]
    watcher.send_signal(signal.SIGINT)
    _, said = watcher.communicate(timeout=20)
    assert (watcher.returncode, said) == (130, "")
