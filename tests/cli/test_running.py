"""Which cluster a command talks to, and the files that say which ones run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from potluck.cli.running import RunningCluster, address_of, announced, clusters, with_port
from potluck.errors import UsageError

HERE = RunningCluster(os.getpid(), "127.0.0.1:4001", "smollm2")


def folder(own_folders: Path) -> Path:
    return own_folders / "state" / "potluck" / "running"


def test_a_cluster_is_known_while_it_runs(own_folders: Path) -> None:
    with announced(HERE):
        assert json.loads((folder(own_folders) / f"{HERE.pid}.json").read_text()) == {
            "pid": HERE.pid,
            "address": "127.0.0.1:4001",
            "model": "smollm2",
        }
        assert clusters() == [HERE]
        assert address_of(None) == "127.0.0.1:4001"
    assert clusters() == []
    assert list(folder(own_folders).iterdir()) == []


def test_without_a_cluster_it_is_the_default_port() -> None:
    assert address_of(None) == "127.0.0.1:7685"


def test_an_option_wins_over_the_environment_and_that_over_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with announced(HERE):
        monkeypatch.setenv("POTLUCK_CONNECT", "pi1")
        assert address_of(None) == "pi1:7685"
        assert address_of("pi2:80") == "pi2:80"


def test_several_clusters_are_listed_and_none_is_guessed() -> None:
    other = RunningCluster(HERE.pid + 1, "127.0.0.1:4002", "7b")
    with announced(HERE), announced(other), pytest.raises(UsageError) as raised:
        address_of(None)
    assert raised.value.message == (
        "2 clusters run on this machine: smollm2 at 127.0.0.1:4001, 7b at 127.0.0.1:4002"
    )
    assert "--connect" in raised.value.remedy


def test_the_file_of_a_killed_program_is_ignored_and_removed(own_folders: Path) -> None:
    code = (
        "import os, signal\n"
        "from potluck.cli.running import RunningCluster, announced\n"
        "with announced(RunningCluster(os.getpid(), '127.0.0.1:4003', 'x')):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -9
    assert len(list(folder(own_folders).glob("*.json"))) == 1
    assert clusters() == []
    assert list(folder(own_folders).glob("*.json")) == []


def test_a_file_with_a_living_pid_and_no_owner_is_stale(own_folders: Path) -> None:
    """Pids are used again: another program's life does not make a cluster."""
    folder(own_folders).mkdir(parents=True)
    file = folder(own_folders) / f"{os.getppid()}.json"
    file.write_text('{"pid": 1, "address": "127.0.0.1:1", "model": "x"}')
    assert clusters() == []
    assert not file.exists()


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ("pi1", "pi1:7685"),
        ("pi1:1", "pi1:1"),
        ("[::1]", "[::1]:7685"),
        ("[::1]:9", "[::1]:9"),
    ],
)
def test_an_address_gets_the_default_port(given: str, means: str) -> None:
    assert with_port(given) == means


@pytest.mark.parametrize("given", ["", ":1", "a:0", "a:x", "a:70000", "http://a:1", "::1", "a/b"])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(UsageError):
        with_port(given)
