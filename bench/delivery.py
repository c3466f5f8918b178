"""How fast weights get to a worker that has not got the file, and what memory that takes.

A coordinator and one worker, real programs. The model's path leads nowhere for the worker: the
coordinator opens it by a link that is then removed. Lines: `loopback`, from the page cache; or
`1gbit`, two network namespaces joined by veth that tbf limits (needs root and iproute2). First the
coordinator has to hash the file as well, then its sums are known. Seconds are those that the
worker's log tells, from the first question to the last verified byte; memory is the worker's peak
beyond its shard, which begins at about 60 MB for Python, numpy and gRPC.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LINES = ("loopback", "1gbit")
LINE_BYTES_PER_SECOND = {"1gbit": 125e6}
COORDINATOR, WORKER = "ptb1", "ptb2"  # names of the namespaces
HOSTS = {COORDINATOR: "127.77.0.1", WORKER: "127.77.0.2"}
START_SECONDS = 600.0


@dataclass(frozen=True)
class Row:
    """One delivery."""

    line: str
    model: str
    sums: str  # "made" by the coordinator meanwhile, or "known"
    fetched_bytes: int
    seconds: float
    mb_per_second: float
    share_of_line: float  # 0: no limit
    shard_bytes: int
    peak_beyond_shard_bytes: int


@dataclass
class Programs:
    """A coordinator and a worker of one delivery; `hosts` are those they listen on."""

    folder: Path
    line: str

    def command(self, where: str, program: str, *options: str) -> list[str]:
        """In its namespace if the line is a limited one."""
        inside = [] if self.line == "loopback" else ["ip", "netns", "exec", where]
        return [*inside, str(Path(sys.executable).parent / program), *options]

    def listening(self, where: str, program: str, *options: str) -> list[str]:
        """A program that listens."""
        host = "127.0.0.1" if self.line == "loopback" else HOSTS[where]
        return self.command(where, program, *options, "--host", host, "--stop-with-stdin")

    def ask_status(self, address: str) -> dict[str, Any]:
        """What `potluck status --json` says; empty if nobody answers."""
        # From the other end: in the coordinator's namespace there is no way to its own address.
        command = self.command(WORKER, "potluck", "status", "--connect", address, "--json")
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
        )
        said: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return said

    def start(self, cache: str, command: list[str]) -> tuple[subprocess.Popen[str], dict[str, str]]:
        """The process and the line that it prints when it is bound."""
        with (self.folder / f"{cache}.log").open("w") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "POTLUCK_CACHE": str(self.folder / cache)},
            )
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said:
            raise SystemExit((self.folder / f"{cache}.log").read_text())
        return process, json.loads(said)


def deliver(model: Path, line: str, folder: Path, sums: str, number: int) -> Row:
    """One delivery to a worker with an empty cache."""
    programs = Programs(folder, line)
    link = folder / "model.gguf"
    os.link(model, link)
    coordinator, doors = programs.start(
        "coordinator",
        programs.listening(
            COORDINATOR,
            "potluck-coordinator",
            str(link),
            *("--grpc-port", "0", "--fleet-port", "0", "--context", "128", "--max-sessions", "1"),
        ),
    )
    link.unlink()
    cache = f"worker-{number}"
    worker, _ = programs.start(
        cache,
        programs.listening(
            WORKER,
            "potluck-worker",
            "--coordinator",
            doors["grpc"],
            "--port",
            "0",
            "--threads",
            "2",
        ),
    )
    try:
        shard = _until_serving(programs, doors["grpc"])
        peak = _peak_bytes(worker.pid)
    finally:
        for process in (coordinator, worker):
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
    said = (folder / f"{cache}.log").read_text()
    found = re.search(r"(\d+) bytes of weights came in ([\d.]+) s", said)
    if found is None:
        raise SystemExit(f"nothing was delivered:\n{said}")
    n_bytes, seconds = int(found[1]), float(found[2])
    shutil.rmtree(folder / cache)
    return Row(
        line=line,
        model=model.name,
        sums=sums,
        fetched_bytes=n_bytes,
        seconds=seconds,
        mb_per_second=round(n_bytes / seconds / 1e6, 1),
        share_of_line=round(n_bytes / seconds / LINE_BYTES_PER_SECOND.get(line, float("inf")), 3),
        shard_bytes=shard,
        peak_beyond_shard_bytes=peak - shard,
    )


def _until_serving(programs: Programs, address: str) -> int:
    """Bytes of the only shard, when it is loaded."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        report = programs.ask_status(address)
        if report.get("state") == "serving":
            return int(report["plan"][0]["shard_bytes"])
        time.sleep(0.5)
    raise SystemExit(f"no service within {START_SECONDS:g} s; see {programs.folder}")


def _peak_bytes(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None, "Linux says so of every process"
    return int(found[1]) * 1024


@contextmanager
def limited_line(line: str) -> Iterator[None]:
    """Two namespaces, joined and limited in both directions; loopback needs nothing."""
    if line == "loopback":
        yield
        return
    try:
        _run("ip netns add ptb1", "ip netns add ptb2")
        _run("ip link add eth0 netns ptb1 type veth peer name eth0 netns ptb2")
        for name, host in HOSTS.items():
            _run(
                # 127/8 is served between the two: this release listens on loopback addresses only.
                f"ip -n {name} addr add {host}/24 dev eth0",
                f"ip -n {name} link set eth0 up",
                f"ip netns exec {name} sysctl -qw net.ipv4.conf.all.route_localnet=1",
                f"ip netns exec {name} sysctl -qw net.ipv4.conf.eth0.route_localnet=1",
                f"tc -n {name} qdisc add dev eth0 root tbf rate 1gbit burst 256kb latency 20ms",
            )
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _run(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True)


def main() -> None:
    """Prints rows as CSV, and writes them to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF file; a link to it is made beside it")
    parser.add_argument("--lines", nargs="+", choices=LINES, default=["loopback"])
    parser.add_argument("--rounds", type=int, default=3, help="with known sums")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    print(",".join(Row.__dataclass_fields__), flush=True)
    for line in args.lines:
        with tempfile.TemporaryDirectory(dir=args.model.parent) as name, limited_line(line):
            for number in range(args.rounds + 1):
                sums = "known" if number else "made"
                rows.append(deliver(args.model, line, Path(name), sums, number))
                print(",".join(str(value) for value in asdict(rows[-1]).values()), flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(Row.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()
