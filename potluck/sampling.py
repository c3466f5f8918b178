"""Which token follows: from logits and settings to a pick.

Pure: the same logits, settings, position and tokens give the same pick on every machine. It reads
no clock, draws no hidden randomness and loads no engine: the canonical exponential is an argument
(`Maths`; the module potluck.engine fits). Each operation works on what the one before left over:

1. log-probabilities: log-softmax of the raw logits in f64, rounded to f32; no setting changes them
2. repetition penalty: logits of the tokens in prompt and answer, positive ones divided by it, the
   others multiplied (CTRL, arXiv:1909.05858, section 4.1)
3. presence and frequency penalty: logit - presence - frequency * count, over the answer only
4. refused ids can't be picked
5. temperature 0: the most likely token, the smallest id among equals, and that is all
6. temperature: a token's weight is exp((logit - largest logit) / temperature)
7. candidates stand in order: the most likely first, the smaller id first among equals
8. top_k: the first k of them; top_p: the shortest prefix with at least top_p of the weight that
   top_k left; min_p: those with at least min_p times the weight of the first
9. the draw: u in [0, 1) from Philox keyed by (seed, position) takes the candidate at which the
   running sum of weights passes u times their sum

Sums run in f64, one weight after the other in a stated order: no vector width changes a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from potluck.errors import FrameError, UsageError
from potluck.rpc.v1 import types_pb2

if TYPE_CHECKING:
    from typing_extensions import Buffer

Logits = npt.NDArray[np.float32]
Tokens = Sequence[int] | npt.NDArray[np.int32]

# So many candidates are sorted first, and so many times more if the draw lies beyond them: the
# first 64 of 49,152 take 0.05 ms, all of them 3.3 ms.
_FIRST_SORTED = 64
_MORE_SORTED = 16


class Maths(Protocol):
    """The engine's canonical functions: the same bits on every CPU. Buffers are f32 [n]."""

    def exp(self, values: Buffer, out: Buffer) -> None:
        """out[i] = e ** values[i]."""

    def log_sum_exp(self, logits: Buffer) -> float:
        """ln(sum(e ** logits)), in f64."""


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers that a setting may take: [low, high], or (low, high] if `low_open`."""

    low: float
    high: float
    is_whole: bool = False
    low_open: bool = False

    def __contains__(self, value: object) -> bool:
        """NaN, bools and other types lie in no range."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self.is_whole and not isinstance(value, int):
            return False
        return self.low <= value <= self.high and not (self.low_open and value == self.low)

    def __str__(self) -> str:
        low, high = (f"{x}" if self.is_whole else f"{x:g}" for x in (self.low, self.high))
        return f"above {low}, to {high}" if self.low_open else f"{low} to {high}"


RANGES = {
    "temperature": Range(0, 2),
    "top_k": Range(0, 2**31 - 1, is_whole=True),
    "top_p": Range(0, 1, low_open=True),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0.1, 10),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "seed": Range(0, 2**63 - 1, is_whole=True),
    "logprobs": Range(0, 20, is_whole=True),
    "prompt_tokens": Range(0, 2**32 - 1, is_whole=True),
    "prompt_logprobs": Range(0, 20, is_whole=True),
}
"""The one table of ranges; doors show it and check nothing themselves."""

REFUSED_IDS_LIMIT = 1024


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens of one session are picked; the defaults are greedy. Raises UsageError."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # 1: all
    min_p: float = 0.0  # 0: all
    repetition_penalty: float = 1.0  # 1: none
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logprobs: int | None = None  # None: none; n: of the pick and of the n most likely tokens
    prompt_tokens: int = 0  # positions below this are prompt, the others answer
    refused_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None  # the same of tokens that are known: `score`

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if value not in allowed and not (value is None and name.endswith("logprobs")):
                raise UsageError(f"{name}: {allowed}, not {_shown(value)}")
        if len(self.refused_ids) > REFUSED_IDS_LIMIT:
            raise UsageError(
                f"refused_ids: at most {REFUSED_IDS_LIMIT}, not {len(self.refused_ids)}"
            )

    def check_vocab(self, vocab: int) -> None:
        """Raises UsageError for what only a model of `vocab` tokens can refuse."""
        if self.top_k > vocab:
            raise UsageError(f"top_k: 0 to {vocab}, not {self.top_k}")
        for token in self.refused_ids:
            if not 0 <= token < vocab:
                raise UsageError(f"refused_ids: ids are 0 to {vocab - 1}, not {token}")

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True, slots=True)
class Pick:
    """One token, with what was asked for about its rivals; natural logarithms."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob), the most likely first


def pick(logits: Logits, sampling: Sampling, position: int, tokens: Tokens, maths: Maths) -> Pick:
    """The token at `position` of a session, from f32 logits [vocab], which are not changed.

    `tokens` are the session's ids at positions [0, position). Raises FrameError if a logit is NaN
    or no logit is finite, UsageError if an id is outside the vocabulary or all are refused.
    """
    best = _best(logits, position)
    adjusted = _adjusted(logits, sampling, tokens)
    if adjusted is not logits:
        best = int(adjusted.argmax())
        if adjusted[best] == -np.inf:
            raise UsageError("refused_ids: they leave no token to pick")
    token = best
    if sampling.temperature > 0:
        token = _draw(adjusted, float(adjusted[best]), sampling, position, maths)
    if sampling.logprobs is None:
        return Pick(token)
    return _with_logprobs(logits, token, sampling.logprobs, maths)


def score(logits: Logits, token: int, sampling: Sampling, position: int, maths: Maths) -> Pick:
    """`token`, known to stand at `position`, with what f32 logits [vocab] say of it.

    They are not changed, and no setting changes what they say. Raises FrameError as `pick` does.
    """
    _best(logits, position)
    return _with_logprobs(logits, token, sampling.prompt_logprobs or 0, maths)


def uniform(seed: int, position: int) -> float:
    """The draw for a position: 53 bits in [0, 1) of Philox4x64-10 (Salmon et al., SC'11).

    Key (seed, 0), counter (position, 0, 0, 0), first word. uniform(0, 0) is 0.08723912359911234.
    """
    c0, c1, c2, c3 = position, 0, 0, 0
    k0, k1 = seed, 0
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & _WORD, (a >> 64) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _WORD, (k1 + 0xBB67AE8584CAA73B) & _WORD
    return (c0 >> 11) * 2.0**-53


_WORD = 2**64 - 1


def to_message(sampling: Sampling) -> types_pb2.Sampling:
    """The same on the wire."""
    return types_pb2.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        prompt_tokens=sampling.prompt_tokens,
        refused_ids=sampling.refused_ids,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def from_message(message: types_pb2.Sampling) -> Sampling:
    """From the wire, where 0 switches top_p and the repetition penalty off. Raises UsageError."""
    return Sampling(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p or 1.0,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty or 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_tokens=message.prompt_tokens,
        refused_ids=tuple(message.refused_ids),
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def _best(logits: Logits, position: int) -> int:
    """The most likely token. Raises FrameError unless its logit is finite."""
    best = int(logits.argmax())  # numpy: the first of the largest, and a NaN is larger than all
    if not np.isfinite(logits[best]):
        raise FrameError(
            f"the logits for position {position} hold {logits[best]}: no token follows"
        )
    return best


def _with_logprobs(logits: Logits, token: int, n_top: int, maths: Maths) -> Pick:
    """The token, its log-probability and the n_top most likely tokens with theirs."""
    log_sum = maths.log_sum_exp(logits.data)
    top = _most_likely(logits, n_top)
    return Pick(
        token,
        _logprob(logits, token, log_sum),
        tuple((int(i), _logprob(logits, int(i), log_sum)) for i in top),
    )


def _adjusted(logits: Logits, sampling: Sampling, tokens: Tokens) -> Logits:
    """Logits after penalties and refusals; the same array if there are none."""
    if not sampling.has_penalties and not sampling.refused_ids:
        return logits
    sampling.check_vocab(max(logits.size, sampling.top_k))
    adjusted = logits.copy()
    if sampling.has_penalties and len(tokens):
        _penalise(adjusted, sampling, np.asarray(tokens, dtype=np.int64))
    adjusted[list(sampling.refused_ids)] = -np.inf
    return adjusted


def _penalise(logits: Logits, sampling: Sampling, tokens: npt.NDArray[np.int64]) -> None:
    """Penalties in place; computed in f64 for the tokens concerned and rounded to f32 once."""
    vocab = logits.size
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
        raise UsageError(f"token ids are 0 to {vocab - 1}: the session holds another")
    counts = np.bincount(tokens[sampling.prompt_tokens :], minlength=vocab)
    seen = np.flatnonzero(np.bincount(tokens, minlength=vocab))
    values = logits[seen].astype(np.float64)
    rate = sampling.repetition_penalty
    values = np.where(values > 0, values / rate, values * rate)
    answered = counts[seen]
    values -= sampling.presence_penalty * (answered > 0) + sampling.frequency_penalty * answered
    with np.errstate(over="ignore"):  # -3e38 * 10 is -infinity: a token that is never picked
        logits[seen] = values.astype(np.float32)


def _draw(logits: Logits, largest: float, sampling: Sampling, position: int, maths: Maths) -> int:
    """A token id with temperature > 0. The weights' total runs over all tokens by rising id, or,
    if there is a top_k, over its candidates in their order.
    """
    vocab, top_k = logits.size, sampling.top_k
    u = uniform(sampling.seed, position)
    if 0 < top_k < vocab:
        ids = _most_likely(logits, top_k)
        weights = _weights(logits[ids], largest, sampling.temperature, maths)
        total = float(np.cumsum(weights, dtype=np.float64)[-1])
        place = _choose(weights, total, sampling, u, is_all=True)
        assert place is not None
        return int(ids[place])
    every = _weights(logits, largest, sampling.temperature, maths)
    total = float(np.cumsum(every, dtype=np.float64)[-1])
    count = min(_FIRST_SORTED, vocab)
    ids = _most_likely(logits, count)
    while (place := _choose(every[ids], total, sampling, u, is_all=count == vocab)) is None:
        count = min(_MORE_SORTED * count, vocab)
        ids = _most_likely(logits, count)
    return int(ids[place])


def _weights(logits: Logits, largest: float, temperature: float, maths: Maths) -> Logits:
    """exp((logit - largest) / temperature), f32; the largest weighs 1, a refused id 0."""
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - largest) / temperature
    # e ** -104 is 0 in f32, denormals included; the floor keeps infinities out of the exponential.
    scaled32 = np.maximum(scaled, -104.0).astype(np.float32)
    weights = np.empty_like(scaled32)
    maths.exp(scaled32.data, weights.data)
    weights[scaled <= -104.0] = 0.0
    return weights


def _choose(
    weights: Logits, total: float, sampling: Sampling, u: float, *, is_all: bool
) -> int | None:
    """Index of the drawn candidate among the first ones; None if more of them must be sorted.

    `weights` are those of the first candidates, of all if `is_all`; `total` that of all.
    """
    n = weights.size
    running = np.cumsum(weights, dtype=np.float64)
    ends: list[int] = []
    if sampling.top_p < 1:
        ends.append(int(running.searchsorted(sampling.top_p * total)) + 1)
    if sampling.min_p > 0:
        ends.append(int(np.count_nonzero(weights >= sampling.min_p * float(weights[0]))))
    end = min(ends, default=n)
    is_cut = bool(ends) and (end < n or is_all)
    if ends and not is_cut:
        return None
    end = min(end, n)
    mass = float(running[end - 1]) if is_cut else total
    place = int(running[:end].searchsorted(u * mass, side="right"))
    if place < end:
        return place
    # Rounding let u * mass reach the last sum: the last candidate that weighs anything.
    return int(np.flatnonzero(weights[:end])[-1]) if is_cut or is_all else None


def _most_likely(logits: Logits, count: int) -> npt.NDArray[np.int64]:
    """Ids of the `count` largest logits: largest first, the smaller id first among equals."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    first = logits.size - min(count, logits.size)
    least = np.partition(logits, first)[first]
    ids = np.flatnonzero(logits >= least)  # more than `count` if several equal the least
    return ids[np.argsort(-logits[ids], kind="stable")[:count]]


def _logprob(logits: Logits, token: int, log_sum: float) -> float:
    return float(np.float32(float(logits[token]) - log_sum))


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)
