"""What a plan is made for.

Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from potluck.errors import PlanError

# A session's KV is taken to hold so many positions, or half its context if that is shorter, when a
# forecast adds the time to read it: a question and half of its answer.
ASSUMED_POSITIONS = 256


@dataclass(frozen=True, slots=True)
class Asked:
    """Wishes of people. Raises PlanError if they are for nothing."""

    context_tokens: int
    max_sessions: int = 1  # sessions that KV is wanted for; as many as fit, at least one
    sessions: int = 1  # answers at once that the plan is made to be fast for
    slowest_weight: float | None = None  # A of Lambda + A tau; None: tokens/s of `sessions`
    every_worker: bool = False  # each worker is a stage, the slow ones too
    one_pipeline: bool = False  # no replicas, as one service has one pipeline
    positions: int | None = None  # that a session's KV holds when it is timed; None: assumed

    def __post_init__(self) -> None:
        if min(self.context_tokens, self.max_sessions, self.sessions) < 1:
            raise PlanError(f"a plan for nothing: {self}")
        if self.slowest_weight is not None and not 0 <= self.slowest_weight < inf:
            raise PlanError(f"the slowest stage weighs {self.slowest_weight}, expected 0 or more")
        if self.positions is not None and self.positions < 0:
            raise PlanError(f"KV is timed with {self.positions} positions, expected 0 or more")

    @property
    def timed_positions(self) -> int:
        """Positions of each session's KV in a forecast."""
        if self.positions is not None:
            return self.positions
        return min(self.context_tokens // 2, ASSUMED_POSITIONS)
