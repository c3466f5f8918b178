"""A cluster on this machine: a coordinator and local workers as children that are watched.

Starts them, shows how they get ready, starts a dead worker again, stops them all. The programs are
talked to like by anybody else: by the line they print when bound, and by the coordinator's Status.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from potluck.cli import load_progress, logs, memory, quantities, terminal
from potluck.cli.programs import Child, ChildDied
from potluck.cli.stopping import StopSignals
from potluck.errors import PotluckError
from potluck.rpc.options import DRAIN_SECONDS

if TYPE_CHECKING:
    from potluck.client import Client
    from potluck.replies import ServiceReport, WorkerReport

T = TypeVar("T")

ECHO_SECONDS = 2.0  # from the end of a program's doors to the end of the program
LOOK_SECONDS = 0.2  # between two looks at Status while people wait
RESTART_SECONDS = (0.5, 1.0, 2.0)  # waits before the tries to start a dead worker again
STEADY_SECONDS = 60.0  # a worker that lived so long has its tries back
STOP_SECONDS = 5.0  # for a worker; the coordinator also drains


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What is to be started. Options are passed on to the programs as they are."""

    model: str  # name or path, as the programs take it
    local_workers: int
    workers: int  # that the coordinator waits for, local ones included
    coordinator_options: tuple[str, ...] = ()
    worker_options: tuple[str, ...] = ()


@dataclass
class LocalCluster:
    """The children of one cluster. For one task; `stop` ends them whatever has happened."""

    settings: ClusterSettings
    address: str = ""  # of the public door, when the coordinator is bound
    coordinator: Child | None = None
    workers: dict[str, Child] = field(default_factory=dict)
    log: Path | None = None  # what the children say

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return {child.name: child.pid for child in self._children}

    @property
    def _children(self) -> list[Child]:
        return [c for c in (self.coordinator, *self.workers.values()) if c is not None]

    @contextlib.asynccontextmanager
    async def stopped_in_the_end(self) -> AsyncIterator[StopSignals]:
        """Ends all children when the block ends, also when a signal ends it (which is swallowed).

        An error that says nothing of what to do names the children's log.
        """
        with logs.of_children() as self.log, StopSignals() as signals:
            try:
                yield signals
            except asyncio.CancelledError:
                if not signals.received:
                    raise
                terminal.note("stopping; Ctrl-C again stops at once")
            except PotluckError as error:
                error.remedy = error.remedy or f"the log is {self.log}"
                raise
            finally:
                await self.stop()

    async def start(self) -> None:
        """Starts the coordinator, and when it is bound the workers; does not wait for these.

        Raises what the coordinator says if it ends before.
        """
        s = self.settings
        with terminal.board() as board:
            board.show([terminal.Line("service", "starting")])
            self.coordinator = await Child.start(
                "coordinator",
                "potluck-coordinator",
                s.model,
                *("--workers", str(s.workers), *s.coordinator_options),
            )
            self.address = str((await self.coordinator.ready()).get("grpc", ""))
        share = memory.share_bytes(s.local_workers) if s.local_workers > 1 else None
        if share is not None and "--memory" not in s.worker_options:
            options = (*s.worker_options, "--memory", str(share))
            self.settings = replace(s, worker_options=options)
        for i in range(s.local_workers):
            await self._start_worker(f"w{i + 1}")

    async def until_serving(self, client: Client) -> ServiceReport:
        """Shows what everyone does until the service serves. Raises what a child says if one ends:
        the coordinator does if the model fits on no plan.
        """
        with terminal.board() as board:
            return await _while_alive(self._children, self._look(client, board))

    async def keep(self, client: Client) -> None:
        """Runs until cancelled. A worker that dies is started again; raises if that does not help,
        or if the coordinator dies.
        """
        assert self.coordinator is not None
        tasks = [asyncio.create_task(self._keep_worker(client, name)) for name in self.workers]
        tasks.append(asyncio.create_task(_raise_end(self.coordinator)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await _cancel(tasks)

    async def stop(self) -> None:
        """Drains and ends all. If cancelled meanwhile it kills them, and re-raises."""
        try:
            if self.coordinator is not None:
                await self.coordinator.stop(DRAIN_SECONDS + STOP_SECONDS)
            await asyncio.gather(*(worker.stop(STOP_SECONDS) for worker in self.workers.values()))
        finally:
            await asyncio.gather(*(child.kill() for child in self._children if child.is_running))

    async def _start_worker(self, name: str) -> Child:
        self.workers[name] = await Child.start(
            name,
            "potluck-worker",
            *("--coordinator", self.address, "--name", name, "--port", "0"),
            *self.settings.worker_options,
        )
        return self.workers[name]

    async def _look(self, client: Client, board: terminal.Board) -> ServiceReport:
        view = _View(list(self.workers))
        while True:
            report = await client.status()
            board.show(view.lines(report))
            if report.is_serving:
                return report
            await asyncio.sleep(LOOK_SECONDS)

    async def _keep_worker(self, client: Client, name: str) -> None:
        tries = 0
        while True:
            started = time.monotonic()
            reason = await self.workers[name].end()
            died = time.monotonic()
            if died - started > STEADY_SECONDS:
                tries = 0
            if tries == len(RESTART_SECONDS):
                raise ChildDied(
                    f"{reason.message} (after {tries} restarts)", remedy=reason.remedy
                ) from reason
            terminal.note(f"{reason.message}; starting it again")
            await asyncio.sleep(RESTART_SECONDS[tries])
            tries += 1
            with contextlib.suppress(PotluckError):  # it died again: the next round says why
                worker = await self._start_worker(name)
                await _while_alive([worker], _serving_again(client, name))
                terminal.note(f"{name} is back after {_since(died)}: serving")


class _View:
    """Status as lines: the service, then each worker, also those that have not come yet."""

    def __init__(self, local: Sequence[str]) -> None:
        self._local = local
        self._started = time.monotonic()

    def lines(self, report: ServiceReport) -> list[terminal.Line]:
        here = {worker.id: worker for worker in report.workers}
        told = ", ".join(t for t in (report.detail, _since(self._started)) if t)
        lines = [terminal.Line("service", report.state, note=told)]
        for name in sorted({*self._local, *here}):
            worker = here.get(name)
            lines.append(self._line(worker) if worker else terminal.Line(name, "starting"))
        return lines

    def _line(self, worker: WorkerReport) -> terminal.Line:
        if (loading := load_progress.line(worker)) is not None:
            return loading
        reads = f"{quantities.size(worker.read_bytes_per_second)}/s"
        offers = f"{quantities.memory(worker.memory_free_bytes)} free"
        cores = quantities.count(worker.threads, "thread")
        return terminal.Line(
            worker.id, worker.state, note=f"{worker.isa}, {cores}, {offers}, reads {reads}"
        )


async def _raise_end(child: Child) -> None:
    raise await child.end()


async def _while_alive(children: Sequence[Child], work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, or what is to tell of a child that ended before."""
    working = asyncio.create_task(work)
    ends = [asyncio.create_task(_raise_end(child)) for child in children]
    try:
        done, _ = await asyncio.wait({working, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if working in done and working.exception() is not None:
            # "Nobody answers" is the echo of a death that is about to be seen.
            done, _ = await asyncio.wait(ends, timeout=ECHO_SECONDS)
        for end in ends:
            if end in done:
                end.result()
        return working.result()
    finally:
        await _cancel([working, *ends])


async def _serving_again(client: Client, name: str) -> None:
    """Until a new plan with the worker serves, or serves without it though it is here.

    People ask for that, so Status is asked for it.
    """
    while True:
        report = await client.status()
        spares = report.forecast.spares if report.forecast is not None else ()
        if report.is_serving and name in (*(stage.worker for stage in report.plan), *spares):
            return
        await asyncio.sleep(LOOK_SECONDS)


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _since(started: float) -> str:
    return quantities.duration(time.monotonic() - started)
