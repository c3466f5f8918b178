"""The programs beside `potluck`: where they are, one of them as a child that is watched.

A child runs in a process group of its own, so that the terminal's Ctrl-C reaches only us, and with
--stop-with-stdin on a pipe that we hold: when we die, however, the pipe closes and the child stops.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from potluck.cli.logs import CHILDREN
from potluck.errors import PotluckError, UsageError

log = logging.getLogger(__name__)

WRONG_COMMAND_LINE = 2  # exit code
LAST_LINES = 20  # of a child's stderr, kept to say why it died
KILL_SECONDS = 2.0  # for the kernel to take a killed process away


class ChildDied(PotluckError):
    """A program ended that should not have; the message says which, and why."""


def path_of(name: str) -> str:
    """The console script `name`: beside this Python, else on PATH. PotluckError if nowhere."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if not found:
        raise PotluckError(f"{name} is not installed", remedy="pip install 'potluck[server]'")
    return found


def options(args: argparse.Namespace, *names: str) -> list[str]:
    """Options of `args` that were given, as a program's arguments: log_level -> --log-level L.

    A flag has no value: pin -> --pin.
    """
    given = ((name, getattr(args, name)) for name in names)
    return [
        word
        for name, value in given
        if value is not None
        for word in ("--" + name.replace("_", "-"), *([] if value is True else [str(value)]))
    ]


def output_of(program: str, *arguments: str, stdin: str = "") -> str:
    """What the console script `program` prints when it is run to its end.

    If it fails, raises UsageError or ChildDied in its own words.
    """
    ran = subprocess.run(
        [path_of(program), *arguments], input=stdin, capture_output=True, text=True, check=False
    )
    for line in ran.stderr.splitlines():
        CHILDREN.info("%s: %s", program, line)
    if ran.returncode == 0:
        return ran.stdout
    said = [line for line in ran.stderr.splitlines() if line.strip()]
    end = f": {said[-1]}" if said else ""
    raise _told(ran.returncode, said) or ChildDied(f"{program} ended ({ran.returncode}){end}")


def _told(status: int, said: Sequence[str]) -> PotluckError | None:
    """The error of the two lines that our programs end with, if they are among `said`."""
    for i, line in enumerate(said):
        program, marked, what = line.partition(": error: ")
        if marked and " " not in program:
            remedy = said[i + 1].strip() if i + 1 < len(said) else ""
            kind = UsageError if status == WRONG_COMMAND_LINE else ChildDied
            return kind(what, remedy=remedy)
    return None


class Child:
    """A program that runs. Made by `start`; ends by `stop` or by itself. For one event loop."""

    def __init__(self, name: str, transport: asyncio.SubprocessTransport, watch: _Watch) -> None:
        self.name = name
        self._transport = transport
        self._watch = watch

    @classmethod
    async def start(cls, name: str, program: str, *arguments: str) -> Self:
        """Starts the console script `program`; `name` is what people call this child."""
        transport, watch = await asyncio.get_running_loop().subprocess_exec(
            lambda: _Watch(name),
            path_of(program),
            *arguments,
            "--stop-with-stdin",
            process_group=0,
        )
        log.debug("started %s as process %d", name, transport.get_pid())
        return cls(name, transport, watch)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._transport.get_pid()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return not self._watch.ended.done()

    async def ready(self) -> Mapping[str, object]:
        """The one line it prints when it is bound. ChildDied if it ends before."""
        watch = self._watch
        either: set[asyncio.Future[Any]] = {watch.first_line, watch.ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not watch.first_line.done():
            raise await self.end()
        line = watch.first_line.result()
        try:
            announced = json.loads(line)
        except ValueError:
            announced = None
        if not isinstance(announced, dict):
            raise PotluckError(f"{self.name} said {line[:80]!r} instead of its address")
        return announced

    async def end(self) -> PotluckError:
        """Waits until it ends by itself; the error to raise then: ChildDied or UsageError."""
        status = await asyncio.shield(self._watch.ended)
        await self._clear_away()
        said = [line for line in self._watch.last_lines if line.strip()]
        if (told := _told(status, said)) is not None:
            told.message = f"{self.name}: {told.message}"
            return told
        if status < 0:  # its last words are about something else
            return ChildDied(f"{self.name} was killed by {signal.Signals(-status).name}")
        return ChildDied(f"{self.name} ended ({status})" + (f": {said[-1]}" if said else ""))

    async def stop(self, patience_seconds: float) -> None:
        """SIGTERM, then after `patience_seconds` SIGKILL. Of an ended child: nothing."""
        with contextlib.suppress(ProcessLookupError):
            self._transport.terminate()
        try:
            async with asyncio.timeout(patience_seconds):
                await asyncio.shield(self._watch.ended)
        except TimeoutError:
            log.warning("%s did not stop within %g s: killed", self.name, patience_seconds)
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL, to whatever its group holds."""
        self._kill_group()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILL_SECONDS):
                await asyncio.shield(self._watch.ended)
        await self._clear_away()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def _clear_away(self) -> None:
        """What is left of its group, and our ends of its pipes, after its last words."""
        self._kill_group()
        with contextlib.suppress(TimeoutError):  # another process may hold the pipe
            async with asyncio.timeout(KILL_SECONDS):
                await asyncio.shield(self._watch.stderr_closed)
        self._transport.close()


class _Watch(asyncio.SubprocessProtocol):
    """What a child says and when it ends. Not the streams of asyncio.subprocess: their `wait`
    waits for the pipes too, and these stay open as long as any grandchild lives.
    """

    def __init__(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        self.first_line: asyncio.Future[bytes] = loop.create_future()
        self.ended: asyncio.Future[int] = loop.create_future()  # exit status, -N: by signal N
        self.stderr_closed: asyncio.Future[None] = loop.create_future()
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._name = name
        self._transport: asyncio.SubprocessTransport | None = None
        self._pending = {1: b"", 2: b""}  # file descriptor: begun line

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.SubprocessTransport)
        self._transport = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, self._pending[fd] = (self._pending[fd] + data).split(b"\n")
        for line in lines:
            if fd == 1:
                if not self.first_line.done():
                    self.first_line.set_result(line)
            else:
                self._note(line)

    def pipe_connection_lost(self, fd: int, _exc: Exception | None) -> None:
        if fd == 2 and not self.stderr_closed.done():
            if self._pending[2]:
                self._note(self._pending[2])
            self.stderr_closed.set_result(None)

    def process_exited(self) -> None:
        assert self._transport is not None
        status = self._transport.get_returncode()
        self.ended.set_result(0 if status is None else status)

    def _note(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        self.last_lines.append(text)
        CHILDREN.info("%s: %s", self._name, text)
