"""How well a model predicts a text, and how far its predictions are from those of a base model.

Pure: windows of a text, then logits to figures; it reads no clock and loads no engine. The rules
are those of llama.cpp's perplexity tool, so that the figures compare: windows of equal size that
do not overlap, a rest that fills none left out; of each window only the second half is scored, so
that every token has half a window before it; where the model wants a start token it takes the
place of the window's first token. Perplexity is e to the mean of -ln(probability).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from potluck.errors import FrameError, UsageError
from potluck.sampling import Maths

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]

LEAST_WINDOW_TOKENS = 4  # of which one is scored
# llama.cpp leaves tokens that the base holds less likely than e ** -16 out of the sum: its file has
# no smaller value within 16 of the most likely one.
_LEAST_LOG_PROB = -16.0


def first_scored_row(window_tokens: int) -> int:
    """Row, so position, whose logits are the first that count: of 512 it is 256."""
    return window_tokens // 2


def n_scored(window_tokens: int) -> int:
    """Tokens of a window whose prediction counts: of 512 the last 255."""
    return window_tokens - 1 - window_tokens // 2


def windows_of(ids: Sequence[int], window_tokens: int, most: int | None = None) -> I32:
    """The text as [n, window_tokens], at most `most` windows. UsageError: too short for one."""
    n = len(ids) // window_tokens
    if n == 0:
        raise UsageError(
            f"the text has {len(ids):,} tokens; one window takes {window_tokens:,}",
            remedy="take a longer text, or lower --context",
        )
    n = n if most is None else min(n, most)
    return np.array(ids[: n * window_tokens], np.int32).reshape(n, window_tokens)


def as_read(window: I32, start_id: int | None) -> I32:
    """What the model reads of a window [size]: with the start token first, if there is one."""
    read = window.copy()
    if start_id is not None:
        read[0] = start_id
    return read


@dataclass(frozen=True, slots=True)
class RowsToRead:
    """Rows [start, stop) of a window; the last `wanted` want logits."""

    start: int
    stop: int
    wanted: int


def rows_to_read(window_tokens: int, most_rows: int, most_logits: int) -> list[RowsToRead]:
    """A window in steps of bounded size. Its last token predicts nothing and is not read.

    512 with at most 512 rows and 100 logits a step: [0, 356), [356, 456), [456, 511).
    """
    first, at = first_scored_row(window_tokens), 0
    steps: list[RowsToRead] = []
    while at < window_tokens - 1:
        stop = min(at + most_rows, window_tokens - 1, max(at, first) + most_logits)
        steps.append(RowsToRead(at, stop, max(0, stop - max(at, first))))
        at = stop
    return steps


def surprise(logits: F32, targets: I32, maths: Maths) -> F64:
    """-ln(probability) of each target [n], from its row of logits [n, vocab], which is not changed.

    In f64. Raises FrameError if one is not finite.
    """
    sums = np.array([maths.log_sum_exp(row.data) for row in logits], np.float64)
    found = sums - logits[np.arange(len(targets)), targets].astype(np.float64)
    if not np.isfinite(found).all():
        raise FrameError("the model gives logits that are not finite: it predicts nothing")
    return found


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error, or what follows from one."""

    value: float
    error: float

    @classmethod
    def of(cls, samples: F64) -> Estimate:
        """Mean of [n], n > 0; of one sample the error is 0. The two of 1, 3 are 2 and 1."""
        n = len(samples)
        return cls(float(samples.mean()), float(np.sqrt(samples.var() / (n - 1))) if n > 1 else 0.0)

    def exp(self) -> Estimate:
        """e to it; the error to first order."""
        with np.errstate(over="ignore"):
            value = float(np.exp(self.value))
        return Estimate(value, value * self.error)


class Tally:
    """Surprises so far. For one owner; the order of `add` is the order of the text."""

    def __init__(self) -> None:
        self._parts: list[F64] = []
        self._sum = 0.0
        self.n_tokens = 0

    def add(self, surprises: F64) -> None:
        """Those of some more tokens."""
        self._parts.append(surprises)
        self._sum += float(surprises.sum())
        self.n_tokens += len(surprises)

    @property
    def running(self) -> float:
        """Perplexity so far; infinite before the first token."""
        with np.errstate(over="ignore"):
            return float(np.exp(self._sum / self.n_tokens)) if self.n_tokens else float("inf")

    @property
    def surprise(self) -> Estimate:
        """Mean -ln(probability) of a token."""
        return Estimate.of(np.concatenate(self._parts))

    @property
    def perplexity(self) -> Estimate:
        """Of all tokens so far."""
        return self.surprise.exp()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Some tokens as two models predict them: one entry a token, all [n].

    `divergence` is KL(base || model) in nats; `probability_change` the model's probability of the
    text's token less the base's; `is_same_top` whether both hold the same token most likely.
    """

    surprise: F64
    base_surprise: F64
    divergence: F64
    probability_change: F64
    is_same_top: npt.NDArray[np.bool_]


def compare(logits: F32, base_log_probs: F32, targets: I32, maths: Maths) -> Comparison:
    """The model's logits [n, vocab] against the base's ln(probability) [n, vocab].

    A row at a time: a few copies of one row stay in the cache. Raises FrameError as `surprise`.
    """
    surprises = surprise(logits, targets, maths)
    rows = np.arange(len(targets))
    base_surprises = -base_log_probs[rows, targets].astype(np.float64)
    log_sums = surprises + logits[rows, targets].astype(np.float64)
    divergence = np.empty(len(targets), np.float64)
    for i, log_sum in enumerate(log_sums):
        base = base_log_probs[i].astype(np.float64)
        terms = np.exp(base) * (base - (logits[i].astype(np.float64) - log_sum))
        divergence[i] = terms[base > _LEAST_LOG_PROB].sum()
    return Comparison(
        surprises,
        base_surprises,
        divergence,
        np.exp(-surprises) - np.exp(-base_surprises),
        logits.argmax(axis=1) == base_log_probs.argmax(axis=1),
    )


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a model is from its base over a text; shares and probabilities are 0 to 1."""

    base_perplexity: Estimate
    log_ratio: Estimate  # ln(perplexity / the base's): both saw the same tokens, so errors cancel
    divergence: Estimate  # KL(base || model), nats
    divergence_median: float
    divergence_p99: float
    divergence_max: float
    same_top: Estimate
    change_mean: Estimate  # of the token's probability
    change_rms: Estimate

    @property
    def ratio(self) -> Estimate:
        """Perplexity over the base's."""
        return self.log_ratio.exp()


def distance(parts: Sequence[Comparison]) -> Distance:
    """The figures of all parts together."""
    divergence = np.concatenate([part.divergence for part in parts])
    surprises = np.concatenate([part.surprise for part in parts])
    base = np.concatenate([part.base_surprise for part in parts])
    change = np.concatenate([part.probability_change for part in parts])
    same = np.concatenate([part.is_same_top for part in parts]).astype(np.float64)
    squares = Estimate.of(change**2)
    rms = float(np.sqrt(squares.value))
    return Distance(
        base_perplexity=Estimate.of(base).exp(),
        # The variance of the difference is what is left of both when they vary together.
        log_ratio=Estimate.of(surprises - base),
        divergence=Estimate.of(divergence),
        divergence_median=float(np.median(divergence)),
        divergence_p99=float(np.quantile(divergence, 0.99)),
        divergence_max=float(divergence.max()),
        same_top=Estimate.of(same),
        change_mean=Estimate.of(change),
        change_rms=Estimate(rms, 0.5 * squares.error / rms if rms else 0.0),
    )
