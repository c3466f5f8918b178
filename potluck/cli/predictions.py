"""A whole model in one engine, and what it predicts in the windows of a text. No network.

Not for two threads at once. Of the logits only those of one step are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from potluck import engine as engines
from potluck.cli import memory, quantities
from potluck.cli.measuring import CHUNK_ROWS, Subject
from potluck.errors import PlanError, UsageError
from potluck.model import KV_PAGE_TOKENS
from potluck.perplexity import F32, I32, RowsToRead, rows_to_read

if TYPE_CHECKING:
    from potluck.engine import Engine

# Of one step, as the last stage of a service has it: 341 rows of SmolLM2, 130 of LLaMA 3. More is
# no faster: by then a step's weights are read from memory long before they are multiplied.
LOGITS_BYTES = 64 * 2**20
_SESSION = 1


def check(subject: Subject, window_tokens: int) -> None:
    """Before anything is loaded. UsageError: beyond the model's context; PlanError: no memory."""
    context_tokens = subject.config.context_tokens
    if window_tokens > context_tokens:
        raise UsageError(
            f"windows of {window_tokens:,} tokens; the model's context is {context_tokens:,}",
            remedy=f"ask for --context {context_tokens} or less",
        )
    free_bytes = memory.share_bytes(1)
    beside = _kv_bytes(subject, window_tokens) + 2 * LOGITS_BYTES
    if free_bytes is not None and subject.size_bytes + beside > free_bytes:
        raise PlanError(
            f"KV and logits of windows of {window_tokens:,} tokens take"
            f" {quantities.memory(beside)} beside {quantities.memory(subject.size_bytes)} of"
            f" weights; {quantities.memory(free_bytes)} are free",
            remedy="lower --context, or ask a service for a model that needs several machines",
        )


class Predictions:
    """A model's weights and the KV of one window in an engine.

    Raises ModelError, and UsageError when the system can't reserve the KV.
    """

    def __init__(
        self,
        subject: Subject,
        engine: Engine,
        window_tokens: int,
        on_progress: Callable[[int], None],
    ) -> None:
        """`on_progress` gets the bytes loaded so far."""
        config = subject.config
        self._shard = engines.Shard(
            engine,
            engines.config_for(config),
            0,
            config.n_layers,
            embeds=True,
            has_head=True,
            kv_bytes=_kv_bytes(subject, window_tokens),
            kv_type=subject.kv_type.value,
        )
        engines.load(self._shard, subject.file, subject.tensors, on_progress)
        self._shard.open(_SESSION, window_tokens)
        most_logits = max(1, LOGITS_BYTES // (4 * config.vocab))
        self._steps = rows_to_read(window_tokens, CHUNK_ROWS, most_logits)
        most = max(step.wanted for step in self._steps)
        self._logits = np.empty((most, config.vocab), np.float32)

    def of(self, window: I32) -> Iterator[tuple[RowsToRead, F32]]:
        """Each step with its logits [wanted, vocab], which the next step overwrites."""
        self._shard.truncate(_SESSION, 0)
        for step in self._steps:
            rows = engines.RowSpan(_SESSION, step.start, step.stop - step.start, step.wanted)
            logits = self._logits[: step.wanted]
            self._shard.forward(window[step.start : step.stop], [rows], logits)
            yield step, logits


def _kv_bytes(subject: Subject, window_tokens: int) -> int:
    """Of one window, in whole pages."""
    pages = -(-window_tokens // KV_PAGE_TOKENS)
    return pages * KV_PAGE_TOKENS * subject.kv_bytes_per_token
