"""An answer as it comes: text to stdout, what the wait is about to stderr, all of it in the end."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from potluck.cli import quantities, terminal
from potluck.cli.wrapping import Wrapper
from potluck.replies import AnswerEvent, Done, Piece, Prefill, Token

SHORT_SECONDS = 0.5  # a wait that nobody needs to be told about


@dataclass(slots=True)
class Answer:
    """What has come so far; `done` is None until the end."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    done: Done | None = None


async def stream(
    events: AsyncGenerator[AnswerEvent, None],
    answer: Answer,
    *,
    shown: bool = True,
    wrapped: bool = False,
) -> None:
    """Fills `answer`, and writes its text to stdout as it comes if `shown`.

    `wrapped`: on a terminal lines break between words. On an error or a cancellation `answer` holds
    what came before; the line is ended in any case.
    """
    wrapper = Wrapper(terminal.columns(sys.stdout) if wrapped else 0)
    async with aclosing(events):
        with _waiting() as wait:
            try:
                async for event in events:
                    if isinstance(event, Prefill):
                        wait.show(event)
                    elif isinstance(event, Piece):
                        wait.close()
                        answer.text += event.text
                        answer.tokens.extend(event.tokens)
                        if shown:
                            text = wrapper.push(event.text) if wrapped else event.text
                            print(text, end="", flush=True)
                    elif isinstance(event, Done):
                        answer.done = event
            finally:
                if shown and answer.text:
                    end = "" if answer.text.endswith("\n") else "\n"
                    print(wrapper.finish() + end, end="", flush=True)


def speed(done: Done) -> str:
    """ "52 tokens, 81.2 tokens/s, first after 0.3 s": for people, after an answer."""
    parts = [quantities.count(done.answer_tokens, "token")]
    if done.tokens_per_second:
        parts.append(f"{done.tokens_per_second:.1f} tokens/s")
    first = done.queue_seconds + done.prefill_seconds
    parts.append(f"first after {quantities.duration(first)}")
    return ", ".join(parts)


class _Wait:
    """The line about the wait before the first token."""

    def __init__(self, board: terminal.Board) -> None:
        self._board = board
        self._started = time.monotonic()

    def show(self, prefill: Prefill) -> None:
        seconds = time.monotonic() - self._started
        if seconds < SHORT_SECONDS:
            return
        waited = quantities.duration(seconds)
        if prefill.queue:
            line = terminal.Line("waiting", f"place {prefill.queue} in the queue", note=waited)
        else:
            done, total = prefill.done_tokens, prefill.total_tokens
            told = f"{done:,} of {quantities.count(total, 'token')}, {waited}"
            line = terminal.Line("prompt", "reading", done, total, told)
        self._board.show([line])

    def close(self) -> None:
        self._board.close()

    def __enter__(self) -> _Wait:
        return self

    def __exit__(self, *_: object) -> None:
        self._board.close()


def _waiting() -> _Wait:
    return _Wait(terminal.board(sys.stderr))
