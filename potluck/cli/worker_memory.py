"""What each of some equal workers would hold of a model, for one session with a full context.

The coordinator's rule for equal machines, so that the figures are those of a plan (a test compares
them); the plan itself, with what each machine offers, is the coordinator's. Pure.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import accumulate

from potluck.gguf import GgufFile
from potluck.model import (
    KV_PAGE_TOKENS,
    KvType,
    ModelConfig,
    embedding_bytes,
    head_bytes,
    kv_bytes_per_token,
    layer_bytes,
    scratch_bytes,
)
from potluck.plan import Span
from potluck.rpc.options import ENVELOPE_BYTES, MESSAGE_BYTES

STEP_ROWS = 512  # the coordinator's most, if a message holds them


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """What one worker holds; the fields are those of --json."""

    n_layers: int
    weights_bytes: int  # embedding and head included
    kv_bytes: int
    scratch_bytes: int
    memory_bytes: int  # of all these


def shares(
    file: GgufFile, config: ModelConfig, n_workers: int, context_tokens: int, kv_type: KvType
) -> list[WorkerShare]:
    """Of each worker, in the order of the pipeline; n_workers is at most the number of layers."""
    each = [layer_bytes(file, config, layer) for layer in range(config.n_layers)]
    head = head_bytes(file, config)
    counts = _counts(n_workers, config.n_layers, head / (sum(each) / config.n_layers))
    tokens = -(-context_tokens // KV_PAGE_TOKENS) * KV_PAGE_TOKENS
    rows = min(STEP_ROWS, max(1, (MESSAGE_BYTES - ENVELOPE_BYTES) // (4 * config.dim)))
    scratch = scratch_bytes(config, rows)
    found = []
    for i, stop in enumerate(accumulate(counts)):
        span = Span(stop - counts[i], stop)
        weights = sum(each[span.start : span.stop])
        weights += embedding_bytes(file, config) if i == 0 else 0
        weights += head if i == n_workers - 1 else 0
        kv = tokens * kv_bytes_per_token(config, span, kv_type)
        found.append(WorkerShare(counts[i], weights, kv, scratch, weights + kv + scratch))
    return found


def _counts(n_workers: int, n_layers: int, head_layers: float) -> list[int]:
    """Layers of each worker: the slowest, which reads most, reads as little as possible.

    The head takes the last worker as long as `head_layers` layers.
    """
    counts = [1] * n_workers

    def read(i: int) -> float:
        return counts[i] + 1 + (head_layers if i == n_workers - 1 else 0)

    heap = [(read(i), i) for i in range(n_workers)]
    heapq.heapify(heap)
    for _ in range(n_layers - n_workers):
        _, i = heapq.heappop(heap)
        counts[i] += 1
        heapq.heappush(heap, (read(i), i))
    return counts
