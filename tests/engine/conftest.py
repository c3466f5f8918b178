"""What the engine's tests share with the oracle: one engine, one way to run a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from potluck import engine
from potluck.gguf import GgufFile
from potluck.model import KvType, ModelConfig, kv_bytes_per_token, span_tensors
from potluck.plan import Span

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """How far `found` is from what was `expected`; both [n, values]."""

    expected: F64
    found: F32

    @property
    def nmse(self) -> float:
        """Squared error over squared magnitude."""
        return float(np.sum((self.found - self.expected) ** 2) / np.sum(self.expected**2))

    @property
    def signed_error(self) -> float:
        """Mean error in standard deviations: shows a wrong minimum or centre that nmse hides."""
        return float(abs(np.mean(self.found - self.expected)) / np.std(self.expected))

    @property
    def same_top(self) -> float:
        """Share of rows with the same largest value."""
        return float(np.mean(self.expected.argmax(axis=1) == self.found.argmax(axis=1)))


@dataclass(frozen=True)
class Runner:
    """Runs spans of models on the engine, a timeline at a time."""

    machine: engine.Engine

    def logits(
        self,
        file: GgufFile,
        config: ModelConfig,
        tokens: Sequence[int],
        chunk: int = 64,
        kv_type: KvType = KvType.F16,
    ) -> F32:
        """Logits [n, vocab] after each of n tokens, prefilled in chunks."""
        span = Span(0, config.n_layers)
        shard = self._shard(file, config, span, len(tokens), has_ends=True, kv_type=kv_type)
        out = np.empty((len(tokens), config.vocab), dtype=np.float32)
        for at in range(0, len(tokens), chunk):
            ids = np.array(tokens[at : at + chunk], dtype=np.int32)
            n = len(ids)
            shard.forward(ids, [engine.RowSpan(1, at, n, n)], out[at : at + n])
        return out

    def layer(self, file: GgufFile, config: ModelConfig, layer: int, x: F32) -> F32:
        """Hidden states [n, dim] after one layer, from those before it."""
        shard = self._shard(file, config, Span(layer, layer + 1), len(x), has_ends=False)
        out = np.empty_like(x)
        shard.forward(x, [engine.RowSpan(1, 0, len(x), 0)], out)
        return out

    def _shard(
        self,
        file: GgufFile,
        config: ModelConfig,
        span: Span,
        n_tokens: int,
        *,
        has_ends: bool,
        kv_type: KvType = KvType.F16,
    ) -> engine.Shard:
        shard = engine.Shard(
            self.machine,
            engine.config_for(config),
            span.start,
            span.stop,
            embeds=has_ends,
            has_head=has_ends,
            kv_bytes=kv_bytes_per_token(config, span, kv_type) * (n_tokens + 64),
            kv_type=kv_type.value,
        )
        tensors = span_tensors(file, config, span, embeds=has_ends, has_head=has_ends)
        engine.load(shard, file, tensors, lambda _: None)
        shard.open(1, n_tokens)
        return shard


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(engine.Engine(2))


@pytest.fixture(scope="session")
def compare() -> type[Comparison]:
    return Comparison
