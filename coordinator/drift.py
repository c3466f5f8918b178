"""Whether stages take as long as was predicted, and which is to blame if they do not.

Pure. Owned by the engine, one for each plan that is served. Steps are compared one by one with what
the forecast says of their own rows and positions, so that a step of eight answers is no surprise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from coordinator.figures import StageSeconds
from coordinator.forecast import Forecast, StageForecast

STEPS = 100  # decode steps until a verdict
OFF = 0.2  # a part of what was predicted
_LEAST_SECONDS = 0.5e-3  # of difference: below, it is the noise of waking threads


def compute_seconds(stage: StageForecast, rows: int) -> float:
    """Of a step, in the engine alone: what stages measure does not have the handing over in it."""
    return replace(stage, fixed_seconds=0.0).seconds(rows)


@dataclass(frozen=True, slots=True)
class StageDrift:
    """One stage over the first STEPS decode steps: medians of a step."""

    worker: str
    measured_seconds: float
    predicted_seconds: float

    @property
    def is_off(self) -> bool:
        """Whether the prediction was wrong by more than OFF."""
        off = abs(self.measured_seconds - self.predicted_seconds)
        return off > max(OFF * self.predicted_seconds, _LEAST_SECONDS)

    def __str__(self) -> str:
        measured, predicted = self.measured_seconds * 1e3, self.predicted_seconds * 1e3
        return f"{self.worker} {measured:.2f} ms of {predicted:.2f}"


@dataclass(slots=True)
class Drift:
    """Gathers steps of one plan. `verdict` is empty until there are enough."""

    forecast: Forecast
    verdict: tuple[StageDrift, ...] = ()
    _steps: list[tuple[list[float], list[float]]] = field(default_factory=list)

    def note_step(self, timings: Sequence[StageSeconds], rows: int, positions: int) -> bool:
        """A decode step of `rows` rows and `positions` of KV in all. True: now it is judged."""
        stages = self.forecast.stages
        if self.verdict or len(timings) != len(stages) or rows < 1:
            return False
        each = round(positions / rows)
        predicted = [compute_seconds(replace(stage, positions=each), rows) for stage in stages]
        self._steps.append(([timing.compute for timing in timings], predicted))
        if len(self._steps) < STEPS:
            return False
        self.verdict = tuple(
            StageDrift(
                stage.worker,
                median(measured[i] for measured, _ in self._steps),
                median(predicted[i] for _, predicted in self._steps),
            )
            for i, stage in enumerate(stages)
        )
        self._steps.clear()
        return True

    def advice(self) -> tuple[str, ...]:
        """A line for people about the stage that is most to blame, if any is."""
        blamed = [stage for stage in self.verdict if stage.is_off]
        if not blamed or all(s.measured_seconds < s.predicted_seconds for s in self.verdict):
            return ()  # all faster: nothing is lost, and no other plan would gain
        worst = max(blamed, key=lambda s: abs(s.measured_seconds - s.predicted_seconds))
        measured, predicted = worst.measured_seconds, worst.predicted_seconds
        part = f"{abs(measured / predicted - 1):.0%}"
        took = f"{measured * 1e3:.1f} ms a step instead of {predicted * 1e3:.1f}"
        if measured > predicted:
            why = "is the machine busy with something else, or does it throttle?"
            return (f"{worst.worker} is {part} slower than predicted ({took}): {why}",)
        why = "measured again, it would get more layers: start its worker again"
        return (f"{worst.worker} is {part} faster than predicted ({took}): {why}",)
