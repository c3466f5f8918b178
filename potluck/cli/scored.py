"""What `perplexity` has found: a bar while it goes on, then lines for people or one object."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from potluck.cli import quantities, terminal
from potluck.perplexity import Comparison, Distance, Estimate, Tally, distance


@dataclass(slots=True)
class Scored:
    """What came of it. `parts` are of the comparison with a base, if there was one."""

    model: str
    kv_type: str
    window_tokens: int
    n_windows: int
    seconds: float = 0.0  # without loading
    tally: Tally = field(default_factory=Tally)
    parts: list[Comparison] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Read, scored or not."""
        return self.n_windows * (self.window_tokens - 1) / self.seconds


class Bar:
    """How far it is, with the figure so far and the time left; not faster than eyes can see."""

    def __init__(self, scored: Scored, board: terminal.Board) -> None:
        self._scored = scored
        self._board = board
        self._rate = quantities.Rate()
        self._total = scored.n_windows * scored.window_tokens
        self._done = 0
        self._shown = 0.0

    def read(self, n_tokens: int) -> None:
        """So many more tokens have been read."""
        self._done += n_tokens
        now = time.monotonic()
        self._rate.update(self._done, now)
        if now - self._shown < terminal.REDRAW_SECONDS:
            return
        self._shown = now
        parts = []
        if self._scored.tally.n_tokens:
            parts.append(f"perplexity {_figure(self._scored.tally.running)} so far")
        if (left := self._rate.seconds_left(self._total)) is not None:
            parts.append(f"{quantities.duration(left)} left")
        line = terminal.Line(
            self._scored.model, "scoring", self._done, self._total, ", ".join(parts)
        )
        self._board.show([line])


def show(scored: Scored, *, as_json: bool) -> None:
    """Prints it: a few lines for people, or one object."""
    found = distance(scored.parts) if scored.parts else None
    if as_json:
        print(json.dumps(_report(scored, found)))
        return
    windows = quantities.count(scored.n_windows, "window")
    print(
        f"perplexity {_shown(scored.tally.perplexity)},"
        f" {quantities.count(scored.tally.n_tokens, 'token')} scored in {windows} of"
        f" {scored.window_tokens:,}, {scored.tokens_per_second:,.0f} tokens/s"
    )
    for line in _lines(found) if found is not None else ():
        print(line)


def _lines(found: Distance) -> Iterator[str]:
    """Against the base, for people."""
    yield f"base       {_shown(found.base_perplexity)}, ratio {_shown(found.ratio, '.5f')}"
    yield (
        f"KL         {_shown(found.divergence, '.6f')},"
        f" median {_figure(found.divergence_median, '.6f')},"
        f" 99 % below {_figure(found.divergence_p99, '.6f')},"
        f" largest {_figure(found.divergence_max, '.6f')}"
    )
    yield f"same top   {_percent(found.same_top)}"
    yield (
        f"token's p  mean change {_percent(found.change_mean)}, RMS {_percent(found.change_rms)}"
    )


def _shown(estimate: Estimate, digits: str = ".4f") -> str:
    return f"{_figure(estimate.value, digits)} +- {_figure(estimate.error, digits)}"


def _figure(value: float, digits: str = ".4f") -> str:
    """An untrained model's perplexity has more digits than a line; "-0.0000" is 0."""
    if value >= 1e6:
        return f"{value:.4g}"
    text = f"{value:{digits}}"
    return text.lstrip("-") if float(text) == 0 else text


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.3f} +- {100 * estimate.error:.3f} %"


def _report(scored: Scored, found: Distance | None) -> dict[str, object]:
    """The object of --json; names never change once released."""
    surprise_, perplexity = scored.tally.surprise, scored.tally.perplexity
    return {
        "model": scored.model,
        "kv_type": scored.kv_type,
        "context": scored.window_tokens,
        "n_chunks": scored.n_windows,
        "n_tokens": scored.tally.n_tokens,
        "perplexity": _finite(perplexity.value),
        "standard_error": _finite(perplexity.error),
        "nll": surprise_.value,
        "nll_standard_error": surprise_.error,
        "seconds": scored.seconds,
        "tokens_per_second": scored.tokens_per_second,
        "kl": None if found is None else _kl_report(found),
    }


def _kl_report(found: Distance) -> dict[str, object]:
    return {
        "divergence": found.divergence.value,
        "divergence_standard_error": found.divergence.error,
        "divergence_median": found.divergence_median,
        "divergence_p99": found.divergence_p99,
        "divergence_max": found.divergence_max,
        "base_perplexity": _finite(found.base_perplexity.value),
        "base_standard_error": _finite(found.base_perplexity.error),
        "ratio": _finite(found.ratio.value),
        "ratio_standard_error": _finite(found.ratio.error),
        "same_top": found.same_top.value,
        "same_top_standard_error": found.same_top.error,
        "change_mean": found.change_mean.value,
        "change_mean_standard_error": found.change_mean.error,
        "change_rms": found.change_rms.value,
        "change_rms_standard_error": found.change_rms.error,
    }


def _finite(value: float) -> float | None:
    """JSON knows no infinity, which e ** surprise reaches for a model that is no model."""
    return value if math.isfinite(value) else None
