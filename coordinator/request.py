"""What a person asks for, checked before anything is queued.

Pure. Names the field and its range (UsageError), or both numbers (ContextExceeded). Ranges of
sampling are in potluck/sampling.py, of stop texts in answer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from coordinator.answer import check_stops
from potluck.errors import ContextExceeded, UnknownModel, UsageError
from potluck.sampling import Sampling

# What most programs of this kind do when nothing is asked for; without filters a small model at 0.8
# soon draws from its long tail.
DEFAULT_TEMPERATURE = 0.8
DEFAULT_TOP_K = 40
DEFAULT_TOP_P = 0.95
DEFAULT_MIN_P = 0.05


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how to continue it. `max_tokens` is the answer's bound, never zero."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    ends_at: frozenset[int]  # tokens that end the answer; empty: none does
    continues: bool  # the answer's text goes on behind the prompt's, in mid-sentence
    scored_from: int  # position of the first token of the prompt that is scored; its length: none


def checked(
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    stops: Sequence[str] = (),
    *,
    ends_at: frozenset[int],
    continues: bool,
    context_tokens: int,
    vocab: int,
    prompt_logprobs_start: int = 0,
) -> Request:
    """A request that can be served. `max_tokens` 0: as many as the context has room for.

    Raises UsageError for a value out of range, ContextExceeded if prompt and answer don't fit.
    """
    if not prompt:
        raise UsageError("the prompt is empty; it needs at least one token")
    wrong = next((token for token in prompt if not 0 <= token < vocab), None)
    if wrong is not None:
        raise UsageError(f"token {wrong}: the model has tokens 0 to {vocab - 1}")
    sampling.check_vocab(vocab)
    check_stops(stops)
    return Request(
        prompt=tuple(prompt),
        max_tokens=_answer_room(len(prompt), max_tokens, context_tokens),
        sampling=replace(sampling, prompt_tokens=len(prompt)),
        stops=tuple(stops),
        ends_at=ends_at,
        continues=continues,
        scored_from=_scored_from(len(prompt), sampling, prompt_logprobs_start),
    )


def check_model(asked: str, served: str) -> None:
    """Raises UnknownModel unless `asked` is the served model or empty."""
    if asked not in ("", served):
        raise UnknownModel(f"no model {asked!r} is served here", remedy=f"ask for {served}")


def _scored_from(n_prompt: int, sampling: Sampling, start: int) -> int:
    if sampling.prompt_logprobs is None:
        if start:
            raise UsageError("prompt_logprobs_start: only with prompt_logprobs")
        return n_prompt
    if start > n_prompt:
        raise UsageError(f"prompt_logprobs_start: 0 to {n_prompt} for this prompt, not {start}")
    return max(1, start)  # nothing stands before the first token that could predict it


def _answer_room(n_prompt: int, max_tokens: int, context_tokens: int) -> int:
    if n_prompt >= context_tokens:
        raise ContextExceeded(
            f"the prompt has {n_prompt:,} tokens; the context is {context_tokens:,}"
            " and an answer needs at least one",
            remedy="shorten the prompt, or serve with a larger --context",
        )
    if n_prompt + max_tokens > context_tokens:
        raise ContextExceeded(
            f"the prompt has {n_prompt:,} tokens and max_tokens is {max_tokens:,}; the context is"
            f" {context_tokens:,}",
            remedy=f"ask for at most {context_tokens - n_prompt:,} tokens",
        )
    return max_tokens or context_tokens - n_prompt
