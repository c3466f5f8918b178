"""The program `potluck-coordinator`: wiring, signals, exit codes. Decides nothing else."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from coordinator import workers_file
from coordinator.config import Settings, settings_of
from coordinator.engine import Engine
from coordinator.grpc_server import open_doors
from coordinator.limits import PlanLimits
from coordinator.loading import open_pipeline
from coordinator.planning import plan_only
from coordinator.served import open_model
from coordinator.templates import Conversations
from potluck.errors import PotluckError, UsageError
from potluck.plan import WIRE_Q8_BLOCK

PROGRAM = "potluck-coordinator"
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs until a signal. 0: stopped cleanly; 1: it failed; 2: the command line was wrong."""
    error: PotluckError | None = None
    try:
        settings = settings_of(arguments)
        logging.basicConfig(
            stream=sys.stderr,
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        )
        if settings.plan_only:
            print(json.dumps(plan_only(settings)))  # noqa: T201  the one line on stdout
        else:
            asyncio.run(serve(settings))
    except* PotluckError as failed:
        error = _first(failed)
    return 0 if error is None else _explain(error)


async def serve(settings: Settings) -> None:
    """Opens the model and the doors, announces them, and serves until told to stop."""
    told = _listen(settings)
    model = await asyncio.to_thread(
        open_model, settings.model, settings.context_tokens, settings.kv_type, settings.wire
    )
    if settings.wire == "q8" and model.config.dim % WIRE_Q8_BLOCK:
        raise UsageError(
            f"--wire q8: blocks of {WIRE_Q8_BLOCK} values, and rows of {model.name} have"
            f" {model.config.dim}",
            remedy="use --wire f16",
        )
    limits = await asyncio.to_thread(_limits, settings.limits)
    engine = Engine(model, settings, open_pipeline, limits=limits)
    conversations = Conversations(model.tokenizer, model.name, settings.chat_template)
    async with (
        AsyncExitStack() as at_end,
        open_doors(engine, conversations, settings) as doors,
    ):
        at_end.push_async_callback(conversations.close)
        engine.fleet_address = doors.fleet
        announcement = {"grpc": doors.public, "fleet": doors.fleet, "pid": os.getpid()}
        print(json.dumps(announcement), flush=True)  # noqa: T201  the one line on stdout
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(engine.run(), name="engine"),
                group.create_task(engine.watch(), name="watch"),
            ]
            group.create_task(_stop(told, engine, tasks), name="stop")


def _limits(file: str) -> PlanLimits:
    """What people say that workers may be used for. Raises UsageError."""
    return workers_file.read(Path(file)).limits if file else {}


def _listen(settings: Settings) -> asyncio.Event:
    """Set by the first signal, or by the end of standard input. The second signal ends at once."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if told.is_set():
            os._exit(_INTERRUPTED)
        told.set()

    def on_stdin() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            loop.remove_reader(sys.stdin.fileno())
            told.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    if settings.stop_with_stdin:
        try:
            loop.add_reader(sys.stdin.fileno(), on_stdin)
        except PermissionError:  # a file or /dev/null: there is nobody at the other end
            told.set()
    return told


async def _stop(told: asyncio.Event, engine: Engine, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Waits until told, then ends answers and `tasks`."""
    await told.wait()
    await engine.stop()
    for task in tasks:
        task.cancel()


def _first(group: BaseExceptionGroup[PotluckError]) -> PotluckError:
    """The first error of a group of groups."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _explain(error: PotluckError) -> int:
    """Two lines for people; the exit code."""
    print(f"{PROGRAM}: error: {error.message}", file=sys.stderr)  # noqa: T201  for people
    if error.remedy:
        print(f"  {error.remedy}", file=sys.stderr)  # noqa: T201  for people
    return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
