"""SIGINT and SIGTERM as cancellation of the task that serves; each further one cancels again."""

from __future__ import annotations

import asyncio
import signal
from types import TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """While entered, a signal cancels the task that entered it. One a program."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []

    @property
    def interrupted(self) -> bool:
        """Whether the first signal was Ctrl-C."""
        return self.received[:1] == [signal.SIGINT]

    def __enter__(self) -> Self:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop(number: signal.Signals) -> None:
            self.received.append(number)
            task.cancel()

        for number in SIGNALS:
            loop.add_signal_handler(number, stop, number)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
