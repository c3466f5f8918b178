"""The text of one answer: whole characters only, stop texts found across tokens and never sent.

Pure. All that `push` and `finish` return, joined, is the decoded answer up to its stop text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from potluck.errors import UsageError

STOPS = 8
STOP_BYTES = 128


class Decoder(Protocol):
    """Tokens to text, an incomplete character held back; potluck.tokenizer.StreamDecoder fits."""

    def push(self, token_id: int, /) -> str:
        """The characters that the token completes."""
        ...

    def finish(self) -> str:
        """What was held back, as well as it can be read."""
        ...


class AnswerText:
    """Text of an answer as it grows. A tail that may still become a stop text is held back."""

    def __init__(self, decoder: Decoder, stops: Sequence[str] = ()) -> None:
        check_stops(stops)
        self._decoder = decoder
        self._stops = tuple(stops)
        self._held = ""  # decoded and not sent; may be the start of a stop text
        self.is_stopped = False  # a stop text was met: nothing follows

    def push(self, token: int) -> str:
        """New text that may be sent after `token`, often empty."""
        self._held += self._decoder.push(token)
        return self._release(keep=self._unsure())

    def finish(self) -> str:
        """What is left at the end; empty if a stop text was met."""
        if self.is_stopped:
            return ""
        self._held += self._decoder.finish()
        return self._release(keep=0)

    def _release(self, keep: int) -> str:
        met = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if met:  # the one that is complete first, as if characters came one by one
            _, at = min(met)
            self.is_stopped = True
            text, self._held = self._held[:at], ""
            return text
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _unsure(self) -> int:
        """Length of the longest tail that some stop text starts with."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stops):
                return n
        return 0


def check_stops(stops: Sequence[str]) -> None:
    """Raises UsageError unless there are at most 8 stop texts of 1 to 128 bytes."""
    if len(stops) > STOPS:
        raise UsageError(f"stop: at most {STOPS} texts, not {len(stops)}")
    for stop in stops:
        n_bytes = len(stop.encode())
        if not 1 <= n_bytes <= STOP_BYTES:
            raise UsageError(f"stop: texts of 1 to {STOP_BYTES} bytes, not {n_bytes}")
