"""Bad input at the command line: one clear message, the right exit code, no process left behind."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

POTLUCK = str(Path(sys.executable).parent / "potluck")


RUN = uuid.uuid4().hex  # in the environment of all that these tests start, and of nothing else


def processes() -> set[int]:
    """Ids of all living processes that these tests have started, at any depth."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"POTLUCK_TEST_RUN={RUN}".encode() in environment:
                found.add(int(entry.name))
    return found


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    if "service" in request.fixturenames:
        request.getfixturevalue("service")  # runs on after the test
    before = processes()
    yield
    assert processes() - before == set()


def potluck(*args: str, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [POTLUCK, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "POTLUCK_TEST_RUN": RUN, **env},
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One message with `words` in it, exit `code`, no traceback, nothing on standard output."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    errors = [
        line for line in done.stderr.splitlines() if re.match(r"potluck[\w-]*: error: ", line)
    ]
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word.lower() in done.stderr.lower()
    assert done.stdout == ""


def test_a_path_that_is_not_there() -> None:
    refused(
        potluck("serve", "/no/such/model.gguf", "--local-workers", "1"), 1, "/no/such/model.gguf"
    )


def test_an_unknown_model_name() -> None:
    refused(potluck("serve", "smallm3", "--local-workers", "1"), 1, "smallm3")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "0 bytes"),
        (b"GGU", "3 bytes"),
        (b"ggjt" + bytes(60), "ggjt"),
        (b"GGUF" + (999).to_bytes(4, "little") + bytes(56), "999"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16 + bytes(40), "tensors"),
    ],
)
def test_a_hostile_file_is_refused_by_serve(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    refused(potluck("serve", str(path), "--local-workers", "1"), 1, "x.gguf", word)


def test_a_port_in_use(smollm2: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = potluck("serve", str(smollm2), "--local-workers", "1", "--grpc-port", port)
    refused(done, 1, port, "in use", "--grpc-port")


def test_a_type_of_kv_that_there_is_not(smollm2: Path) -> None:
    done = potluck("serve", str(smollm2), "--local-workers", "1", "--kv-type", "q4")
    refused(done, 2, "--kv-type", "'q4'", "f16", "q8")
    assert len(done.stderr.splitlines()) <= 2


def test_a_port_out_of_range(smollm2: Path) -> None:
    done = potluck("serve", str(smollm2), "--local-workers", "1", "--grpc-port", "70000")
    refused(done, 2, "70000")


def test_nothing_is_served_beyond_loopback(smollm2: Path) -> None:
    done = potluck("serve", str(smollm2), "--local-workers", "1", "--host", "0.0.0.0")
    assert done.returncode in (1, 2)
    refused(done, done.returncode, "0.0.0.0", "loopback")


def test_workers_with_too_little_memory(smollm2: Path) -> None:
    done = potluck("serve", str(smollm2), "--local-workers", "2", "--memory", "20 MiB")
    refused(done, 1, "MiB", "--memory")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["generate", "Hi", "--temperature", "7"], 2, ["temperature", "0 to 2"]),
        (["generate", "Hi", "--temperature", "nan"], 2, ["temperature"]),
        (["generate", "Hi", "--top-p", "2"], 2, ["top-p", "1"]),
        (["generate", "Hi", "--top-k", "-1"], 2, ["top-k"]),
        (["generate", "Hi", "--min-p", "1.5"], 2, ["min-p"]),
        (["generate", "Hi", "--max-tokens", "-1"], 2, ["max-tokens"]),
        (["generate", "Hi", "--seed", "-1"], 2, ["seed"]),
        (["generate", "Hi", "--logprobs", "1000000"], 2, ["logprobs"]),
        (["generate", "Hi", "--stop", ""], 2, ["stop"]),
        (["generate", ""], 2, ["prompt"]),
        (["generate", "word " * 5000, "--max-tokens", "1"], 1, ["context", "2,048"]),
        (["generate", "Hi", "--max-tokens", "5000"], 1, ["context", "2,048"]),
        (["generate", "Hi", "--model", "llama-7b"], 1, ["llama-7b"]),
    ],
)
def test_a_running_service_refuses(
    service: str, args: list[str], code: int, words: list[str]
) -> None:
    words = [w.replace("-", "_") if w in ("top-p", "top-k", "min-p") else w for w in words]
    done = potluck(*args, "--connect", service)
    # Spelling of an option or of a field: both name it.
    done.stderr = done.stderr.replace("top-p", "top_p").replace("top-k", "top_k")
    done.stderr = done.stderr.replace("min-p", "min_p").replace("max_tokens", "max-tokens")
    refused(done, code, *words)


@pytest.fixture(scope="module")
def service(smollm2: Path) -> Iterator[str]:
    """Address of one cluster for all cases."""
    process = subprocess.Popen(
        [POTLUCK, "serve", str(smollm2), "--local-workers", "2", "--context", "2048", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "POTLUCK_TEST_RUN": RUN},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()
    yield str(json.loads(line)["address"])
    process.terminate()
    process.communicate(timeout=30)
