"""The program `potluck-worker`: wiring, signals, exit codes. Decides nothing else."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from potluck.errors import PotluckError, UsageError
from worker.config import Settings, settings_of

if TYPE_CHECKING:
    from potluck.engine import Engine
    from worker.probe import Machine, Memory

PROGRAM = "potluck-worker"
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs until a signal. 0: stopped cleanly; 1: it failed; 2: the command line was wrong."""
    try:
        settings = settings_of(arguments)
    except UsageError as e:
        return _explain(e, code=2)
    error: PotluckError | None = None
    # gRPC tells its own log of every connection that ends; ours says what matters.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    logging.basicConfig(
        stream=sys.stderr,
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
    )
    try:
        asyncio.run(describe(settings) if settings.describe else serve(settings))
    except* PotluckError as failed:
        error = _first(failed)
    return 0 if error is None else _explain(error, code=1)


async def serve(settings: Settings) -> None:
    """Measures the machine, opens the door, joins, and works until told to stop."""
    # Only now: a wrong command line is answered without the engine, which may not be built.
    from potluck import catalogue, packs
    from potluck.tensor_store import TensorStore
    from worker.membership import Membership
    from worker.server import Worker, open_door

    told = asyncio.Event()
    _listen(told, stop_with_stdin=settings.stop_with_stdin)
    store = TensorStore(catalogue.tensors_folder(), settings.tensor_space_bytes)
    folder = None
    if settings.weights == "mmap":
        folder = packs.PackFolder(catalogue.packs_folder(), settings.pack_space_bytes, store)
    await asyncio.to_thread(store.sweep)
    engine, machine, memory = await asyncio.to_thread(_measured, settings)
    async with asyncio.TaskGroup() as tasks:
        worker = Worker(engine, machine, memory, tasks, folder, store)
        try:
            async with open_door(worker, settings.host, settings.port) as address:
                membership = Membership(
                    worker,
                    settings.coordinator,
                    settings.token,
                    settings.name,
                    address,
                    lambda: _announce(worker.name, address),
                )
                staying = tasks.create_task(membership.run(), name="membership")
                await told.wait()
                staying.cancel()
                await asyncio.gather(staying, return_exceptions=True)
                await membership.leave()
        finally:
            await worker.close()


async def describe(settings: Settings) -> None:
    """Prints what this machine offers for a model."""
    from worker.description import description_of, shape_to_describe

    shape = await asyncio.to_thread(shape_to_describe, settings.describe)
    measured = await asyncio.to_thread(_measured, settings)
    said = await asyncio.to_thread(description_of, settings, shape, *measured)
    print(json.dumps(said), flush=True)  # noqa: T201  the one line on stdout


def _measured(settings: Settings) -> tuple[Engine, Machine, Memory]:
    """The engine and the machine that it runs on, in a second or two."""
    from potluck.engine import Engine
    from worker.bandwidth import tune_threads
    from worker.probe import Memory, machine_of

    memory = Memory(settings.memory_bytes, maps_weights=settings.weights == "mmap")
    engine = Engine(settings.threads, settings.isa, settings.pinned)
    free_bytes = memory.now().room_bytes
    if settings.threads == 0:
        tune_threads(engine, free_bytes)
    return engine, machine_of(engine, free_bytes), memory


def _announce(name: str, address: str) -> None:
    line = json.dumps({"worker": name, "address": address, "pid": os.getpid()})
    print(line, flush=True)  # noqa: T201  the one line on stdout


def _listen(told: asyncio.Event, *, stop_with_stdin: bool) -> None:
    """Sets `told` at a signal or at the end of standard input."""
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if told.is_set():
            os._exit(_INTERRUPTED)  # the second one: at once
        told.set()

    def on_stdin() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            loop.remove_reader(sys.stdin.fileno())
            told.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    if stop_with_stdin:
        try:
            loop.add_reader(sys.stdin.fileno(), on_stdin)
        except PermissionError:  # a file or /dev/null: there is nobody at the other end
            told.set()


def _first(group: BaseExceptionGroup[PotluckError]) -> PotluckError:
    """The first error of a group of groups."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _explain(error: PotluckError, *, code: int) -> int:
    """Two lines for people; the exit code."""
    print(f"{PROGRAM}: error: {error.message}", file=sys.stderr)  # noqa: T201  for people
    if error.remedy:
        print(f"  {error.remedy}", file=sys.stderr)  # noqa: T201  for people
    return code


if __name__ == "__main__":
    sys.exit(main())
