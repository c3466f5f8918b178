"""Which clusters run on this machine: one small file each, so that commands find theirs.

`$XDG_STATE_HOME/potluck/running/<pid>.json`, written by `potluck serve`. The program that wrote it
holds a lock on it for as long as it lives: the lock goes with the process, whatever killed it, so a
file without one is stale and is removed by whoever meets it. A pid alone can be another's by then.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from potluck.errors import UsageError
from potluck.rpc.options import DEFAULT_GRPC_PORT


def state_folder() -> Path:
    """`$XDG_STATE_HOME/potluck`: running clusters, logs, history."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "potluck"


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """A cluster that `potluck serve` keeps on this machine."""

    pid: int
    address: str  # of the public gRPC door, host:port
    model: str


def _folder() -> Path:
    return state_folder() / "running"


@contextlib.contextmanager
def announced(cluster: RunningCluster) -> Iterator[None]:
    """Makes the cluster known while the block runs."""
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cluster.pid}.json"
    draft = folder / f"{cluster.pid}.draft"
    with draft.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump(asdict(cluster), file)
        file.flush()
        draft.rename(path)  # whole or not at all, and locked already
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def clusters() -> list[RunningCluster]:
    """Those that live, by pid. Removes the files of those that don't."""
    found = (_read(path) for path in sorted(_folder().glob("*.json")))
    return [cluster for cluster in found if cluster is not None]


def _read(path: Path) -> RunningCluster | None:
    try:
        with path.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # its program lives
                return _parsed(file.read())
            path.unlink(missing_ok=True)
    except OSError:  # gone meanwhile, or not ours to read
        return None
    return None


def _parsed(text: str) -> RunningCluster | None:
    try:
        fields = json.loads(text)
        return RunningCluster(int(fields["pid"]), str(fields["address"]), str(fields["model"]))
    except (ValueError, KeyError, TypeError):  # written by another release
        return None


def address_of(asked: str | None) -> str:
    """Where to connect: as asked, POTLUCK_CONNECT, the one cluster here, or the default port.

    Raises UsageError if several run here, or if the address is none.
    """
    wanted = asked or os.environ.get("POTLUCK_CONNECT")
    if wanted:
        return with_port(wanted)
    here = clusters()
    if len(here) > 1:
        listed = ", ".join(f"{c.model} at {c.address}" for c in here)
        raise UsageError(
            f"{len(here)} clusters run on this machine: {listed}",
            remedy="say which one with --connect HOST:PORT or POTLUCK_CONNECT",
        )
    return here[0].address if here else f"127.0.0.1:{DEFAULT_GRPC_PORT}"


def with_port(address: str) -> str:
    """host, host:port, [v6] or [v6]:port, with the default port where there is none. UsageError."""
    host, port = address, ""
    if address.startswith("["):
        host, _, port = address.partition("]")
        host += "]"
        port = port.removeprefix(":")
    elif address.count(":") == 1:
        host, _, port = address.partition(":")
    if not host or "/" in host or (address.count(":") > 1 and not address.startswith("[")):
        raise UsageError(f"{address!r} is no address", remedy="write HOST:PORT, such as pi1:7685")
    if port and not (port.isdecimal() and 0 < int(port) < 65536):
        raise UsageError(f"{address!r}: port {port} is not between 1 and 65535")
    return f"{host}:{port or DEFAULT_GRPC_PORT}"
