"""What `potluck serve` hands on to the programs it starts."""

from __future__ import annotations

import argparse
from pathlib import Path

from potluck.cli import serve
from potluck.cli.cluster import ClusterSettings


def settings(*arguments: str) -> ClusterSettings:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.settings_of(parser.parse_args(["smollm2", *arguments]), Path("x.gguf"))


def test_every_option_of_the_service_reaches_the_coordinator() -> None:
    given = (
        *("--grpc-port", "1", "--fleet-port", "2", "--context", "3", "--prefill-chunk", "4"),
        *("--max-sessions", "5", "--queue", "6", "--chat-template", "alpaca"),
        *("--kv-type", "q8"),
        *("--sessions", "4", "--use", "best", "--limits", "l.toml"),
        *("--log-level", "debug", "--host", "127.0.0.1"),
    )
    passed = settings(*given).coordinator_options
    pairs = set(zip(passed[::2], passed[1::2], strict=True))
    assert pairs == set(zip(given[::2], given[1::2], strict=True))


def test_every_option_of_the_machine_reaches_the_workers() -> None:
    given = (
        *("--threads", "1", "--isa", "scalar", "--memory", "2", "--weights", "mmap"),
        *("--pack-space", "5", "--log-level", "debug"),
    )
    assert settings(*given).worker_options == given


def test_local_workers_take_any_free_ports() -> None:
    passed = settings("--local-workers", "2").coordinator_options
    assert dict(zip(passed[::2], passed[1::2], strict=True)) == {
        "--grpc-port": "0",
        "--fleet-port": "0",
        "--use": "all",
    }
    assert settings("--local-workers", "2").workers == 2
    assert settings().coordinator_options == ()


def test_workers_of_this_machine_alone_all_get_layers_and_others_are_chosen() -> None:
    assert "all" in settings("--local-workers", "2").coordinator_options
    assert "all" not in settings("--local-workers", "2", "--workers", "3").coordinator_options
    assert "best" in settings("--local-workers", "2", "--use", "best").coordinator_options
    assert "all" not in settings("--workers", "3").coordinator_options
