"""What people are told about speed: medians per stage, tokens per second, bytes.

Pure: time is an argument. Owned by the engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

WINDOW_SECONDS = 10.0
_STEPS = 64  # newest decode steps that the medians look at
_SHORTEST_SECONDS = 1.0  # less says nothing about a rate


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Where the time of a step went in one stage."""

    wait: float = 0.0  # from arrival to the start of compute
    compute: float = 0.0
    serialise: float = 0.0
    wire: float = 0.0


@dataclass(slots=True)
class Traffic:
    """Bytes of messages between the coordinator and the two ends of the pipeline."""

    sent_bytes: int = 0
    received_bytes: int = 0
    activation_bytes: int = 0  # values of activations in either direction: stays 0


@dataclass(slots=True)
class Figures:
    """Counts since start and the newest timings."""

    answer_tokens: int = 0
    prompt_tokens: int = 0
    steps: int = 0
    _tokens: deque[tuple[float, int]] = field(default_factory=deque)  # (when, how many)
    _stages: list[deque[StageSeconds]] = field(default_factory=list)

    def begin(self, n_stages: int) -> None:
        """A new pipeline: timings of another plan would mislead."""
        self._stages = [deque(maxlen=_STEPS) for _ in range(n_stages)]

    def note_answer(self, n_tokens: int, now: float) -> None:
        """Tokens of answers that came with one step."""
        self.answer_tokens += n_tokens
        self._tokens.append((now, n_tokens))
        self._forget(now)

    def note_step(self, timings: Sequence[StageSeconds], *, is_decode: bool) -> None:
        """A step has returned. Timings that don't name every stage are left out."""
        self.steps += 1
        if is_decode and len(timings) == len(self._stages):
            for stage, seconds in zip(self._stages, timings, strict=True):
                stage.append(seconds)

    def tokens_per_second(self, now: float) -> float:
        """Answer tokens a second, all sessions, over the newest 10 s or since the first of them."""
        self._forget(now)
        if not self._tokens:
            return 0.0
        seconds = max(_SHORTEST_SECONDS, now - self._tokens[0][0])
        return sum(n for _, n in self._tokens) / seconds

    def stage_seconds(self, stage: int) -> StageSeconds:
        """Medians over the newest decode steps; zeros before the first, or while the plan loads."""
        seen = self._stages[stage] if stage < len(self._stages) else ()
        if not seen:
            return StageSeconds()
        return StageSeconds(
            wait=median(s.wait for s in seen),
            compute=median(s.compute for s in seen),
            serialise=median(s.serialise for s in seen),
            wire=median(s.wire for s in seen),
        )

    def _forget(self, now: float) -> None:
        while self._tokens and now - self._tokens[0][0] > WINDOW_SECONDS:
            self._tokens.popleft()
