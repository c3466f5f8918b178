"""One answer on its way to one person: the engine fills it, a door empties it.

Bounded by max_tokens, so a slow reader holds a few kilobytes and no session waits for it. Both ends
belong to the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.answer import AnswerText
from coordinator.session import Ending, Session
from potluck.errors import PotluckError
from potluck.sampling import Pick

PATIENCE_SECONDS = 5.0  # a person's stream is never silent for longer (DESIGN invariant 7)
_PREFILL_SECONDS = 0.25  # progress is told at most so often
_MOST_PICKS = 1024  # of one update: a quarter of a megabyte with 20 log-probabilities each


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of an answer, with where its time went."""

    ending: Ending
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class Update:
    """What is new since the last one. Nothing at all is a sign of life."""

    text: str = ""
    picks: tuple[Pick, ...] = ()
    ended: Ended | None = None
    scores: tuple[Pick, ...] = ()  # of tokens of the prompt, which come before all picks


class AnswerStream:
    """A session's answer. Times are on the engine's clock."""

    def __init__(self, session: Session, text: AnswerText, now: float) -> None:
        self.session = session
        self._text = text
        self._asked_at = now
        self._started_at: float | None = None  # its first step was sent
        self._first_at: float | None = None  # its first token came
        self._told_at = now
        self._parts: list[str] = []
        self._picks: list[Pick] = []
        self._scores: list[Pick] = []
        self._ended: Ended | None = None
        self._error: PotluckError | None = None
        self._news = asyncio.Event()
        self._news.set()  # the first update says where it stands in the queue

    def start(self, now: float) -> None:
        """Its first rows go into a step."""
        if self._started_at is None:
            self._started_at = now
            self._tell(now)

    def note_prefill(self, now: float) -> None:
        """Rows of its prompt have come back."""
        if now - self._told_at >= _PREFILL_SECONDS:
            self._tell(now)

    def score(self, scores: Sequence[Pick], now: float) -> None:
        """The next tokens of the prompt have been scored."""
        self._scores += scores
        self._tell(now)

    def push(self, position: int, pick: Pick, now: float) -> None:
        """Commits a picked token to session and text. Raises StepError as Session.push does.

        Each pick brings one part of the text, be it empty; only the end may bring one more.
        """
        self._first_at = self._first_at if self._first_at is not None else now
        if self.session.push(position, pick.token):
            self._picks.append(pick)
            self._parts.append(self._text.push(pick.token))
            if self._text.is_stopped:
                self.session.end(Ending.STOP)
        if self.session.ending is not None:
            self._finish(self.session.ending, now)
        self._tell(now)

    def fail(self, error: PotluckError) -> None:
        """Ends it with an error, after what has come so far."""
        self.session.end(Ending.GIVEN_UP)
        self._error = error
        self._news.set()

    async def next(self) -> Update:
        """What is new, after 5 s at the latest. Raises the error that the answer ended with."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await self._news.wait()
        except TimeoutError:
            return Update()
        if self._scores:
            update = Update(scores=tuple(self._scores[:_MOST_PICKS]))
            del self._scores[:_MOST_PICKS]
            if not (self._scores or self._picks or self._ended or self._error):
                self._news.clear()
            return update
        if self._error is not None and not self._picks:
            raise self._error
        if len(self._picks) > _MOST_PICKS:  # who reads slowly gets several: messages are bounded
            update = Update("".join(self._parts[:_MOST_PICKS]), tuple(self._picks[:_MOST_PICKS]))
            del self._parts[:_MOST_PICKS], self._picks[:_MOST_PICKS]
            return update
        if self._error is None:
            self._news.clear()
        update = Update("".join(self._parts), tuple(self._picks), self._ended)
        self._parts.clear()
        self._picks.clear()
        return update

    def _finish(self, ending: Ending, now: float) -> None:
        self._parts.append(self._text.finish())
        started = self._started_at if self._started_at is not None else self._asked_at
        first = self._first_at if self._first_at is not None else now
        self._ended = Ended(
            ending=ending,
            queue_seconds=started - self._asked_at,
            prefill_seconds=first - started,
            decode_seconds=now - first,
        )

    def _tell(self, now: float) -> None:
        self._told_at = now
        self._news.set()
