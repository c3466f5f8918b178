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
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Self

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
    """Options of `args` that were given, as a program's arguments: log_level -> --log-level L."""
    given = ((name, getattr(args, name)) for name in names)
    return [
        word
        for name, value in given
        if value is not None
        for word in ("--" + name.replace("_", "-"), str(value))
    ]


class Child:
    """A program that runs. Made by `start`; ends by `stop` or by itself. For one event loop."""

    def __init__(self, name: str, process: Process) -> None:
        self.name = name
        self._process = process
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._stderr = asyncio.create_task(self._read_stderr())
        self._ended = asyncio.create_task(self._wait())

    @classmethod
    async def start(cls, name: str, program: str, *arguments: str) -> Self:
        """Starts the console script `program`; `name` is what people call this child."""
        process = await asyncio.create_subprocess_exec(
            path_of(program),
            *arguments,
            "--stop-with-stdin",
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            process_group=0,
            limit=1024 * 1024,
        )
        log.debug("started %s as process %d", name, process.pid)
        return cls(name, process)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return not self._ended.done()

    async def ready(self) -> Mapping[str, object]:
        """The one line it prints when it is bound. ChildDied if it ends before."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise await self.ended()
        try:
            announced = json.loads(line)
        except ValueError:
            announced = None
        if not isinstance(announced, dict):
            raise PotluckError(f"{self.name} said {line[:80]!r} instead of its address")
        return announced

    async def ended(self) -> PotluckError:
        """Waits until it ends by itself; the error to raise then: ChildDied or UsageError."""
        status = await asyncio.shield(self._ended)
        await self.kill()  # what is left of its group
        await self._rest_of_stderr()
        said = [line for line in self._last if line.strip()]
        for i, line in enumerate(said):
            program, marked, what = line.partition(": error: ")
            if marked and " " not in program:  # the two lines that our programs end with
                remedy = said[i + 1].strip() if i + 1 < len(said) else ""
                kind = UsageError if status == WRONG_COMMAND_LINE else ChildDied
                return kind(f"{self.name}: {what}", remedy=remedy)
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended ({status})"
        return ChildDied(f"{self.name} {how}" + (f": {said[-1]}" if said else ""))

    async def stop(self, patience_seconds: float) -> None:
        """SIGTERM, then after `patience_seconds` SIGKILL. Of an ended child: nothing."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(patience_seconds):
                await asyncio.shield(self._ended)
        except TimeoutError:
            log.warning("%s did not stop within %g s: killed", self.name, patience_seconds)
        await self.kill()
        await self._rest_of_stderr()

    async def kill(self) -> None:
        """SIGKILL, to whatever its group holds."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILL_SECONDS):
                await asyncio.shield(self._ended)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def _wait(self) -> int:
        return await self._process.wait()

    async def _rest_of_stderr(self) -> None:
        """Until the pipe closes; not for ever, as another process may hold it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILL_SECONDS):
                await asyncio.shield(self._stderr)

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            text = line.decode("utf-8", "replace").rstrip()
            self._last.append(text)
            CHILDREN.info("%s: %s", self.name, text)
