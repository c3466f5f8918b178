"""One token timeline: its prompt, its answer so far, and why it ended.

Pure. A session changes only after a step has returned, so at every moment it holds exactly the
tokens that are confirmed; what is under way is the scheduler's knowledge. Owned by the engine's
loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NewType

from potluck.errors import StepError
from potluck.sampling import Sampling

SessionId = NewType("SessionId", int)


class Ending(Enum):
    """Why a session takes no more tokens."""

    STOP = "stop"  # the model's end token, or a stop text
    LENGTH = "length"  # max_tokens, which is never beyond the context
    GIVEN_UP = "given up"  # its person went away, or its rows failed


class Session:
    """A prompt and the answer to it. `tokens[position]` is the token that stands at `position`."""

    def __init__(
        self,
        id: SessionId,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        end_ids: frozenset[int],
        scored_from: int | None = None,
    ) -> None:
        """`scored_from`: position, above 0, from which on the prompt's tokens are scored."""
        assert prompt, "the door refuses an empty prompt"
        assert max_tokens > 0, "the door gives every answer room"
        self.id = id
        self.tokens = list(prompt)
        self.n_prompt = len(prompt)
        self.max_tokens = max_tokens
        self.sampling = sampling
        self.end_ids = end_ids  # empty: go on after the model's end token
        self.scored_from = self.n_prompt if scored_from is None else scored_from
        self.n_computed = 0  # positions whose rows have come back: their KV is in every stage
        self.ending: Ending | None = None

    @property
    def is_live(self) -> bool:
        """Whether it still takes tokens."""
        return self.ending is None

    @property
    def is_reading(self) -> bool:
        """Whether rows of its prompt have still to come back."""
        return self.n_computed < self.n_prompt

    @property
    def first_wanted_row(self) -> int:
        """Position from which on rows want logits: the newest token, or to score the prompt."""
        is_scored = self.is_reading and self.scored_from < self.n_prompt
        return self.scored_from - 1 if is_scored else len(self.tokens) - 1

    @property
    def n_answer(self) -> int:
        """Tokens of the answer so far; the end token is not one of them."""
        return len(self.tokens) - self.n_prompt

    @property
    def room_tokens(self) -> int:
        """Positions that the session may take in all: prompt and longest answer."""
        return self.n_prompt + self.max_tokens

    def advance(self, start: int, n_rows: int) -> None:
        """Rows [start, start + n_rows) have passed the last stage. Raises StepError on a gap."""
        if start != self.n_computed:
            raise StepError(
                f"session {self.id} has {self.n_computed} positions and rows of {start} came back"
            )
        self.n_computed += n_rows

    def push(self, position: int, token: int) -> bool:
        """Confirms the token picked for `position`; False if it is an end token and not answer.

        Ends the session if it was the last one. Raises StepError if the pick is for another
        position than the next: a worker that invents tokens must not shift an answer.
        """
        if position != len(self.tokens) or position != self.n_computed:
            raise StepError(
                f"session {self.id} awaits position {len(self.tokens)} and was given {position}"
            )
        if token in self.end_ids:
            self.ending = Ending.STOP
            return False
        self.tokens.append(token)
        if self.n_answer == self.max_tokens:
            self.ending = Ending.LENGTH
        return True

    def end(self, ending: Ending) -> None:
        """Ends it from outside: a stop text, a person who left, a failure.

        The first ending stays.
        """
        self.ending = self.ending or ending
