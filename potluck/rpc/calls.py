"""Awaiting a gRPC call so that a call cancelled elsewhere is not taken for our own cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from potluck.errors import Unreachable

T = TypeVar("T")


async def finished(operation: Awaitable[T]) -> T:
    """The result of one operation of a call. Raises Unreachable if the call was cancelled.

    gRPC then raises asyncio.CancelledError as if this task were to end; a TaskGroup would drop the
    task without a word. Only a task that was really asked to end may pass it on.
    """
    try:
        return await operation
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Unreachable("it cancelled the call") from error
