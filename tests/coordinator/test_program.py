"""The program as people meet it: its one line, its exit codes, how it stops."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.config import Settings, settings_of
from potluck.errors import UsageError
from potluck.testing import TinyShape, write_tiny

PROGRAM = str(Path(sys.executable).parent / "potluck-coordinator")
FREE = ("--grpc-port", "0", "--fleet-port", "0")
SECONDS = 30.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", TinyShape()))


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """The running program and what it announced."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [PROGRAM, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def failed(*arguments: str) -> tuple[int, list[str]]:
    """Exit code and lines on stderr of a program that does not come up."""
    done = subprocess.run(
        [PROGRAM, *arguments], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


@pytest.mark.cluster
def test_it_announces_its_addresses_in_one_line_of_json(tiny: str) -> None:
    with started(tiny, *FREE) as (process, said):
        assert said.keys() == {"grpc", "fleet", "pid"}
        assert said["pid"] == process.pid
        host, _, port = said["grpc"].rpartition(":")
        assert host == "127.0.0.1"
        with socket.create_connection((host, int(port)), timeout=5):
            pass


@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly(tiny: str, number: signal.Signals) -> None:
    with started(tiny, *FREE) as (process, _):
        process.send_signal(number)
        out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, out) == (0, "")
        assert "Traceback" not in err


@pytest.mark.cluster
def test_it_stops_when_standard_input_closes(tiny: str) -> None:
    with started(tiny, *FREE, "--stop-with-stdin") as (process, _):
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=SECONDS) == 0


@pytest.mark.cluster
def test_a_busy_port_is_named_with_its_option(tiny: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, lines = failed(tiny, "--grpc-port", str(port), "--fleet-port", "0")
    assert code == 1
    assert lines == [
        f"potluck-coordinator: error: port {port} on 127.0.0.1 is in use",
        "  choose another port with --grpc-port",
    ]


@pytest.mark.cluster
def test_what_is_wrong_at_the_start_takes_two_lines(tiny: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GG")
    cases = {
        ("no-such-model", *FREE): (1, "no-such-model"),
        (str(bad), *FREE): (1, "bad.gguf"),
        (tiny, *FREE, "--host", "0.0.0.0"): (2, "loopback"),
        (tiny, *FREE, "--context", "100000"): (2, "trained for 256"),
        (tiny, *FREE, "--chat-template", "nonsense"): (2, "--chat-template nonsense"),
    }
    for arguments, (code, words) in cases.items():
        found, lines = failed(*arguments)
        assert (found, len(lines) <= 2) == (code, True), lines
        assert lines[0].startswith("potluck-coordinator: error: ")
        assert words in lines[0]


@pytest.mark.cluster
def test_rows_that_are_no_whole_blocks_do_not_travel_as_q8(tmp_path: Path) -> None:
    shape = TinyShape(weight_type="f32", dim=40, n_heads=4, head_dim=10)
    code, lines = failed(str(write_tiny(tmp_path / "odd.gguf", shape)), *FREE, "--wire", "q8")
    assert code == 2
    assert "blocks of 32 values" in lines[0]
    assert lines[0].endswith(" have 40")
    assert lines[1] == "  use --wire f16"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "0"], "--workers: 1 to 256, not 0"),
        (["--prefill-chunk", "513"], "--prefill-chunk"),
        (["--max-sessions", "0"], "--max-sessions"),
        (["--queue", "-1"], "--queue"),
        (["--grpc-port", "70000"], "--grpc-port"),
        (["--grpc-port", "5000", "--fleet-port", "5000"], "are both 5000"),
        (["--host", "example.org"], "loopback"),
        (["--host", "192.168.1.2"], "loopback"),
    ],
)
def test_options_out_of_range_are_named(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        settings_of(["tiny.gguf", *arguments])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_every_loopback_address_may_be_served(host: str) -> None:
    assert settings_of(["tiny.gguf", "--host", host]).host == host


def test_without_options_the_defaults_of_the_manual_hold() -> None:
    assert settings_of(["tiny.gguf"]) == Settings(model="tiny.gguf")
    assert Settings(model="m").grpc_port == 7685
    assert Settings(model="m").fleet_port == 7684


@pytest.mark.parametrize("text", ["0", "-5", "many"])
def test_a_context_of_nothing_is_a_bad_command_line(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        settings_of(["tiny.gguf", "--context", text])
    assert ended.value.code == 2
    assert "--context" in capsys.readouterr().err
