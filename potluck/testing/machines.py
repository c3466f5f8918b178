"""Several machines made of this one, for tests and benches: network namespaces and control groups.

Each has a loopback of its own and an address in 127.77.0.0/24 on a virtual cable to a switch, so
that programs which serve loopback only reach each other as over a network and nothing of it
leaves this machine. Memory and CPU are bounded by control groups (v1 or v2), the cable by tbf.
Linux, root, `ip` and `tc` of iproute2. What is made is taken away again, also after a failure;
the processes on a machine end with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

SUBNET = "127.77.0"
_CGROUPS = Path("/sys/fs/cgroup")
_PERIOD_US = 10_000  # of a CPU quota: short, so that a step of 20 ms is slowed evenly
_STOP_SECONDS = 15.0


class CannotMake(Exception):
    """This system lets us make no machines; says why."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a machine has. None: what this one has."""

    name: str
    memory_bytes: int | None = None
    cpus: float | None = None  # 0.5: half of one
    mbit_per_second: float | None = None  # of its cable, each way


@dataclass
class Machine:
    """One of them. `run` starts programs on it."""

    kind: Kind
    address: str  # empty: without a network of its own
    _namespace: str
    _groups: Sequence[Path]
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(
        self,
        *command: str,
        environment: Mapping[str, str] | None = None,
        stdout: int | IO[str] | None = None,
        stderr: int | IO[str] | None = None,
    ) -> subprocess.Popen[str]:
        """A program on this machine; it is stopped with the machine."""
        joins = "".join(f"echo $$ > {group / _members(group)}; " for group in self._groups)
        # Not `ip netns exec`: its /sys has no control groups, and the bounds would not be seen.
        inside = ["nsenter", f"--net=/run/netns/{self._namespace}"] if self._namespace else []
        process = subprocess.Popen(
            [*inside, "sh", "-c", f'{joins}exec "$@"', "sh", *command],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )
        self._processes.append(process)
        return process

    def peak_memory_bytes(self) -> int:
        """The most that all its processes together took, pages of files included; 0: unknown."""
        for group in self._groups:
            for name in ("memory.max_usage_in_bytes", "memory.peak"):
                if (group / name).is_file():
                    return int((group / name).read_text())
        return 0

    def stop(self) -> None:
        """Ends its processes, gently at first."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def machines(kinds: Sequence[Kind], *, networked: bool = True) -> Iterator[list[Machine]]:
    """These machines, until the context ends; networked ones reach each other and nobody else.

    Raises CannotMake.
    """
    with contextlib.ExitStack() as undo:
        label = f"pl{os.getpid()}"
        try:
            switch = _switch(label, undo) if networked else ""
            made = [_machine(kind, i, label, switch, undo) for i, kind in enumerate(kinds, start=1)]
        except (OSError, subprocess.CalledProcessError) as e:
            said = (getattr(e, "stderr", "") or str(e)).strip()
            raise CannotMake(f"machines can't be made here: {said}") from e
        yield made


def _machine(
    kind: Kind, number: int, label: str, switch: str, undo: contextlib.ExitStack
) -> Machine:
    groups = _groups(kind, f"{label}-{number}", undo)
    namespace = _namespace(kind, number, label, switch, undo) if switch else ""
    address = f"{SUBNET}.{number}" if switch else ""
    machine = Machine(kind, address, namespace, groups)
    undo.callback(machine.stop)
    return machine


def _switch(label: str, undo: contextlib.ExitStack) -> str:
    _ip("link", "add", label, "type", "bridge")
    undo.callback(_ip, "link", "del", label)
    _ip("link", "set", label, "up")
    return label


def _namespace(kind: Kind, number: int, label: str, switch: str, undo: contextlib.ExitStack) -> str:
    """A network of its own, plugged into the switch."""
    namespace, plug = f"{label}-{number}", f"{label}v{number}"
    _ip("netns", "add", namespace)
    undo.callback(_ip, "netns", "del", namespace)
    _ip("link", "add", plug, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("link", "set", plug, "master", switch, "up")

    def inside(*words: str) -> None:
        _ip("-n", namespace, *words)

    # All of 127.0.0.0/8 is this machine itself unless that route goes.
    inside("link", "set", "lo", "up")
    inside("addr", "del", "127.0.0.1/8", "dev", "lo")
    inside("addr", "add", "127.0.0.1/32", "dev", "lo")
    for where in ("all", "eth0"):
        _run("ip", "netns", "exec", namespace, "sysctl", "-qw", _localnet(where))
    inside("addr", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
    inside("link", "set", "eth0", "up")
    if kind.mbit_per_second is not None:
        shape = ["root", "tbf", "rate", f"{kind.mbit_per_second}mbit", "burst", "256kb"]
        shape += ["latency", "50ms"]
        _run("tc", "qdisc", "add", "dev", plug, *shape)
        _run("tc", "-n", namespace, "qdisc", "add", "dev", "eth0", *shape)
    return namespace


def _localnet(where: str) -> str:
    return f"net.ipv4.conf.{where}.route_localnet=1"


def _groups(kind: Kind, name: str, undo: contextlib.ExitStack) -> list[Path]:
    """Control groups for its bounds."""
    is_v2 = (_CGROUPS / "cgroup.controllers").is_file()
    bounds: dict[str, str] = {}
    if kind.memory_bytes is not None:
        key = "memory.max" if is_v2 else "memory/memory.limit_in_bytes"
        bounds[key] = str(kind.memory_bytes)
    if kind.cpus is not None:
        quota = str(int(kind.cpus * _PERIOD_US))
        if is_v2:
            bounds["cpu.max"] = f"{quota} {_PERIOD_US}"
        else:
            bounds["cpu/cpu.cfs_period_us"] = str(_PERIOD_US)
            bounds["cpu/cpu.cfs_quota_us"] = quota
    groups: list[Path] = []
    for key, value in bounds.items():
        controller, _, file = key.rpartition("/")
        group = _CGROUPS / controller / name
        if group not in groups:
            group.mkdir()
            undo.callback(_remove_group, group)
            groups.append(group)
        (group / file).write_text(value)
    return groups


def _members(group: Path) -> str:
    return "cgroup.procs" if (group / "cgroup.procs").exists() else "tasks"


def _remove_group(group: Path) -> None:
    """Its processes have ended; the system may take a moment to notice."""
    for _ in range(50):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
