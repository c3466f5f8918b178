"""What a service predicts in the windows of a text: each is a prompt whose tokens are scored."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING

import numpy as np

from potluck.errors import UsageError
from potluck.perplexity import F64, I32, first_scored_row, n_scored
from potluck.replies import AnswerOptions, Prefill, PromptTokens
from potluck.rpc.options import MESSAGE_BYTES

if TYPE_CHECKING:
    from potluck.client import Client
    from potluck.replies import ServiceReport

_MOST_TEXT_BYTES = MESSAGE_BYTES - 4096  # the rest is for the message around it


def check(report: ServiceReport, window_tokens: int) -> None:
    """Raises UsageError if a window and one token of an answer are beyond the service's context."""
    room = report.context_tokens
    if window_tokens >= room:
        raise UsageError(
            f"windows of {window_tokens:,} tokens and one more that is made; the service's"
            f" context is {room:,}",
            remedy=f"ask for --context {room - 1} or less, or serve with a larger one",
        )


async def tokens_of(client: Client, text: str) -> tuple[list[int], int | None]:
    """Tokens of the text, and the start token if the model wants one. UsageError: too long."""
    n_bytes = len(text.encode())
    if n_bytes > _MOST_TEXT_BYTES:
        raise UsageError(
            f"the text has {n_bytes:,} bytes; a service cuts at most {_MOST_TEXT_BYTES:,} at once",
            remedy="take the first part of it",
        )
    start = await client.tokenize("")
    return await client.tokenize(text), start[0] if start else None


async def surprises(
    client: Client, windows: Iterable[I32], in_flight: int, on_read: Callable[[int], None]
) -> AsyncGenerator[F64, None]:
    """-ln(probability) of the scored tokens of each window [size], in their order.

    So many windows are asked for at once that no stage is idle. `on_read` gets how many more tokens
    have been read. Raises what the client raises.
    """
    asked: deque[asyncio.Task[F64]] = deque()
    try:
        for window in windows:
            asked.append(asyncio.create_task(_surprise(client, window, on_read)))
            if len(asked) == in_flight:
                yield await asked.popleft()
        while asked:
            yield await asked.popleft()
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def _surprise(client: Client, window: I32, on_read: Callable[[int], None]) -> F64:
    options = AnswerOptions(
        max_tokens=1,
        temperature=0.0,
        ignore_end=True,
        prompt_logprobs=0,
        prompt_logprobs_start=first_scored_row(len(window)) + 1,
    )
    found: list[float] = []
    n_read = 0
    async with aclosing(client.generate(window.tolist(), options)) as events:
        async for event in events:
            if isinstance(event, PromptTokens):
                found += [-(token.logprob or 0.0) for token in event.tokens]
            elif isinstance(event, Prefill) and event.done_tokens > n_read:
                on_read(event.done_tokens - n_read)
                n_read = event.done_tokens
    if len(found) != n_scored(len(window)):
        raise UsageError(
            f"the service scored {len(found)} of {n_scored(len(window))} tokens of a window",
            remedy="is it of an older release? update the coordinator",
        )
    on_read(len(window) - n_read)
    return np.array(found, np.float64)
