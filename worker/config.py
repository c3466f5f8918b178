"""What a worker was told to do: its command line, as a frozen value."""

from __future__ import annotations

import argparse
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from potluck import __version__
from potluck.errors import UsageError
from potluck.plan import WEIGHTS
from potluck.rpc import PROTOCOL, options

DEFAULT_HOST = "127.0.0.1"
_ID = re.compile(r"[a-z0-9-]{1,32}")
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line. Raises UsageError, naming the option and its range."""

    coordinator: str  # host:port of its public port; empty if it describes
    token: str = ""
    name: str = ""  # wished id; empty: the coordinator gives one
    host: str = DEFAULT_HOST
    port: int = options.DEFAULT_WORKER_PORT  # 0: any free one
    threads: int = 0  # 0: as many as affinity and cgroup quota allow
    pinned: bool = False  # threads keep to CPUs of their own
    isa: str = "auto"
    memory_bytes: int | None = None  # None: what is free
    weights: str = "arena"  # one of WEIGHTS
    pack_space_bytes: int | None = None  # of weights on disk; None: what the disk has
    tensor_space_bytes: int | None = None  # of delivered tensors; None: what the disk has
    stop_with_stdin: bool = False
    describe: str = ""  # a MODEL: print what this machine offers for it, and end
    log_level: str = "info"

    def __post_init__(self) -> None:
        if self.coordinator or not self.describe:
            check_loopback("--coordinator", address_of(self.coordinator)[0])
        check_loopback("--host", self.host)
        if self.name and not _ID.fullmatch(self.name):
            raise UsageError(f"--name: 1 to 32 of a-z, 0-9 and -, not {self.name!r}")
        for name, value, low, high in (
            ("--port", self.port, 0, 65535),
            ("--threads", self.threads, 0, 1024),
        ):
            if not low <= value <= high:
                raise UsageError(f"{name}: {low} to {high}, not {value}")
        if self.weights not in WEIGHTS:
            raise UsageError(f"--weights: {' or '.join(WEIGHTS)}, not {self.weights!r}")
        if self.pack_space_bytes is not None and self.weights != "mmap":
            raise UsageError("--pack-space goes with --weights mmap: else nothing is on disk")


def settings_of(arguments: Sequence[str] | None = None) -> Settings:
    """Reads the command line (None: sys.argv). Raises UsageError; argparse exits on a bad one."""
    parser = argparse.ArgumentParser(
        prog="potluck-worker",
        description="Holds layers of a model for a coordinator. `potluck join` starts it for you.",
    )
    add = parser.add_argument
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--coordinator", metavar="HOST:PORT", help="what `potluck serve` printed")
    task.add_argument(
        "--describe",
        default="",
        metavar="MODEL",
        help="join nobody: measure this machine for a model, print one JSON object, and end",
    )
    add("--token", default="", metavar="T", help="join token; not needed on loopback")
    add("--name", default="", metavar="ID", help="a name for people; empty: any")
    add("--host", default=DEFAULT_HOST, help="address to listen on (loopback only)")
    add(
        "--port", type=int, default=options.DEFAULT_WORKER_PORT, metavar="N", help="0: any free one"
    )
    add(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="of the engine; 0: as many as a short measurement finds fastest",
    )
    add("--pin", action="store_true", help="keep each thread on a CPU of its own (one worker only)")
    add("--isa", default="auto", metavar="NAME", help="kernel table; auto: the best of this CPU")
    add("--memory", type=_size, metavar="SIZE", help="most memory to take, such as '2 GiB'")
    add(
        "--weights",
        default="arena",
        choices=WEIGHTS,
        help="arena: kept in memory; mmap: written to the cache once and mapped, so that the next"
        " start is quick and a shard may be larger than memory",
    )
    add(
        "--pack-space",
        type=_size,
        metavar="SIZE",
        help="most disk space for mmap (default: all but 1 GiB)",
    )
    add(
        "--tensor-space",
        type=_size,
        metavar="SIZE",
        help="most disk space for weights that are fetched from other machines (default: all but 1"
        " GiB)",
    )
    add("--stop-with-stdin", action="store_true", help="stop cleanly when standard input closes")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    version = f"potluck {__version__}, protocol {PROTOCOL}"
    add("--version", action="version", version=version)
    given = parser.parse_args(arguments)
    return Settings(
        coordinator=given.coordinator or "",
        token=given.token,
        name=given.name,
        host=given.host,
        port=given.port,
        threads=given.threads,
        pinned=given.pin,
        isa=given.isa,
        memory_bytes=given.memory,
        weights=given.weights,
        pack_space_bytes=given.pack_space,
        tensor_space_bytes=given.tensor_space,
        stop_with_stdin=given.stop_with_stdin,
        describe=given.describe,
        log_level=given.log_level,
    )


def address_of(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; IPv6 in brackets. Raises UsageError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise UsageError(f"--coordinator: HOST:PORT such as 127.0.0.1:7685, not {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def check_loopback(option: str, host: str) -> None:
    """Raises UsageError beyond loopback: without certificates nothing is said or served there."""
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise UsageError(
            f"{option} {host}: this release works on loopback only; it has no authentication yet",
            remedy="use 127.0.0.1, and an ssh tunnel to reach other machines",
        )


def _size(text: str) -> int:
    """Bytes: "2147483648", "2 GiB", "1.5GB"."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    unit = _UNITS.get(found[2] or "b") if found else None
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise argparse.ArgumentTypeError(f"bytes or a size such as '2 GiB', not {text!r}")
    return int(float(found[1]) * unit)
