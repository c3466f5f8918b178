"""What makes one plan better than another.

Pure. Everything follows from the sweep (Lambda) and the slot (tau) of a step of some rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coordinator.forecast import groups
from coordinator.pool import Floats

# Up to so many steps under way each number is tried, then every one that is so much larger.
_EVERY_WAY, _NEXT_WAY = 10, 1.3


@dataclass(frozen=True, slots=True)
class Rules:
    """How large a difference must be to matter. 0, 0: none is too small."""

    stage_worth: float = 0.03  # of the cost: what a further stage must save, else it is a spare
    near: float = 0.01  # of the cost: below that the better balanced plan is preferred


@dataclass(frozen=True, slots=True)
class Way:
    """One way to use a pipeline: steps of so many rows.

    Its cost is max(Lambda + weight tau, steps tau).
    """

    rows: int
    steps: float
    weight: float

    def costs(self, sweep: Floats, slot: Floats) -> Floats:
        """Of arrays of one shape."""
        return np.maximum(sweep + self.weight * slot, self.steps * slot)

    def most_slot(self, cost: float) -> float:
        """No slot above this has a cost of `cost` or less: a sweep is never below its slot."""
        return cost / max(self.steps, 1 + self.weight)

    @property
    def is_sweep_alone(self) -> bool:
        """Whether the slot does not matter."""
        return self.steps <= 1 and self.weight == 0


@dataclass(frozen=True, slots=True)
class Goal:
    """The least cost over all ways is minimised."""

    ways: tuple[Way, ...]
    rules: Rules

    def penalty(self, n_stages: int) -> float:
        """What a cost is multiplied by for comparison: each stage has to save its worth."""
        return float((1 - self.rules.stage_worth) ** -n_stages)


def goal_of(sessions: int, slowest_weight: float | None, rules: Rules) -> Goal:
    """One session: the sweep. U sessions: max(Lambda(m), G tau(m)) with G steps of m = ceil(U/G)
    rows, seconds for a token of each. Given the weight A: Lambda + A tau for steps of one row.
    """
    if slowest_weight is not None:
        return Goal((Way(1, 0.0, slowest_weight),), rules)
    ways, until = [], 0.0
    for steps, rows in groups(sessions):
        if steps <= _EVERY_WAY or steps >= until:
            ways.append(Way(rows, float(steps), 0.0))
            until = steps * _NEXT_WAY
    return Goal(tuple(ways), rules)
