"""`potluck serve` and `demo` with the real programs and a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from potluck import testing
from potluck.testing import TinyShape

pytestmark = pytest.mark.cluster

PATIENCE_SECONDS = 40.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return testing.write_tiny(tmp_path / "tiny.gguf", TinyShape(n_layers=4))


@pytest.fixture
def served(model: Path, potluck: list[str]) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """`potluck serve` of a tiny model on two local workers, and what it said when it served."""
    server = subprocess.Popen(
        [*potluck, "serve", str(model), "--local-workers", "2", "--threads", "1", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line, server.communicate()[1]
    yield server, json.loads(line)
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=PATIENCE_SECONDS)


def ask(potluck: list[str], *line: str) -> dict[str, Any]:
    done = subprocess.run(
        [*potluck, *line, "--json"], capture_output=True, text=True, check=True, timeout=60
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def until(claim: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not claim():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


GREEDY = ("generate", "ab", "--max-tokens", "8", "--temperature", "0", "--logprobs", "1")


def test_an_answer_a_status_and_a_clean_end(
    served: tuple[subprocess.Popen[str], Any], potluck: list[str]
) -> None:
    server, said = served
    answer = ask(potluck, *GREEDY)  # found without an address: it is the one cluster here
    assert answer["usage"]["completion_tokens"] == len(answer["tokens"]) > 0
    assert answer["logprobs"][0]["logprob"] <= 0
    report = ask(potluck, "status")
    assert [stage["stage"] for stage in report["plan"]] == [0, 1]
    assert report["plan"][-1]["span"][1] == 4
    assert {worker["state"] for worker in report["workers"]} == {"ready"}
    assert report["figures"]["coordinator_activation_bytes"] == 0
    server.send_signal(signal.SIGINT)
    server.communicate(timeout=PATIENCE_SECONDS)
    assert server.returncode == 0
    assert not any(lives(pid) for pid in said["pids"].values())


def test_a_killed_worker_comes_back_with_the_same_answers(
    served: tuple[subprocess.Popen[str], Any], potluck: list[str]
) -> None:
    _, said = served
    before = ask(potluck, *GREEDY)
    os.kill(said["pids"]["w2"], signal.SIGKILL)

    def is_back() -> bool:
        report = ask(potluck, "status")
        return bool(report["state"] == "serving" and report["epoch"] > 1)

    until(is_back, "the service did not come back")
    after = ask(potluck, *GREEDY)
    assert (after["tokens"], after["logprobs"]) == (before["tokens"], before["logprobs"])


def test_kill_9_leaves_no_process(served: tuple[subprocess.Popen[str], Any]) -> None:
    server, said = served
    server.kill()
    server.communicate(timeout=PATIENCE_SECONDS)
    pids: list[int] = list(said["pids"].values())
    until(lambda: not any(lives(pid) for pid in pids), "a process was left behind")


def test_the_demo_answers_shows_its_stages_and_leaves(model: Path) -> None:
    code = (
        "import sys\n"
        "from potluck.cli import demo, main\n"
        f"demo.MODEL, demo.CONTEXT_TOKENS = {str(model)!r}, 256\n"
        "sys.exit(main(['demo', '--workers', '2', '--prompt', 'ab', '--max-tokens', '8']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "> ab"
    table = next(i for i, line in enumerate(lines) if line.startswith("worker"))
    assert [line.split()[0] for line in sorted(lines[table + 1 : table + 3])] == ["w1", "w2"]
    assert "tokens/s" in done.stdout
