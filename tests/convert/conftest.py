"""What tests of converters share: a whole model on the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from potluck import engine
from potluck.gguf import GgufFile
from potluck.model import config_of, kv_bytes_per_token, span_tensors
from potluck.plan import Span

F32 = NDArray[np.float32]
Logits = Callable[[GgufFile, Sequence[int]], F32]


@pytest.fixture(scope="session")
def logits() -> Logits:
    """Logits [n, vocab] of a file's model after each of n tokens."""
    machine = engine.Engine(2)

    def run(file: GgufFile, tokens: Sequence[int]) -> F32:
        config = config_of(file)
        span = Span(0, config.n_layers)
        shard = engine.Shard(
            machine,
            engine.config_for(config),
            span.start,
            span.stop,
            embeds=True,
            has_head=True,
            kv_bytes=kv_bytes_per_token(config, span) * (len(tokens) + 64),
        )
        tensors = span_tensors(file, config, span, embeds=True, has_head=True)
        engine.load(shard, file, tensors, lambda _: None)
        shard.open(1, len(tokens))
        out = np.empty((len(tokens), config.vocab), dtype=np.float32)
        n = len(tokens)
        shard.forward(np.array(tokens, dtype=np.int32), [engine.RowSpan(1, 0, n, n)], out)
        return out

    return run
