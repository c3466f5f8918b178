"""A model in one engine, and how long each test takes there. No network.

Not for two threads at once. Tests may follow each other in any order: sessions stay open, and
positions that one test left behind serve the next one's depth.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from potluck import engine as engines
from potluck.cli.measuring import CHUNK_ROWS, Subject, Test, rooms
from potluck.errors import UsageError
from potluck.gguf import GgufFile
from potluck.model import KvType, config_of, span_tensors
from potluck.plan import Span

if TYPE_CHECKING:
    from potluck.engine import Engine

SEED = 1


def subject_of(
    file: GgufFile, kv_type: KvType = KvType.F16, n_layers: int | None = None
) -> Subject:
    """A model, or its first n_layers and the head.

    Raises ModelError, UsageError: it has not so many layers.
    """
    whole = config_of(file)
    n_layers = whole.n_layers if n_layers is None else n_layers
    if n_layers > whole.n_layers:
        raise UsageError(f"--layers {n_layers}: {whole.name} has {whole.n_layers}")
    tensors = span_tensors(file, whole, Span(0, n_layers), embeds=True, has_head=True)
    return Subject(file, replace(whole, n_layers=n_layers), tuple(tensors), whole, kv_type)


class Loaded:
    """A model's weights and the KV of `tests` in an engine.

    Raises ModelError, and UsageError when the system can't reserve the KV.
    """

    def __init__(
        self,
        subject: Subject,
        engine: Engine,
        tests: Sequence[Test],
        on_progress: Callable[[int], None],
    ) -> None:
        self._vocab = subject.config.vocab
        self._shard = engines.Shard(
            engine,
            engines.config_for(subject.config),
            0,
            subject.config.n_layers,
            embeds=True,
            has_head=True,
            kv_bytes=subject.kv_bytes(tests),
            kv_type=subject.kv_type.value,
        )
        engines.load(self._shard, subject.file, subject.tensors, on_progress)
        needed = rooms(tests)
        for i, room in enumerate(needed):
            self._shard.open(i + 1, room)
        longest = max(needed)
        # [session, position]; one repeated token would not be a text.
        self._ids = np.random.default_rng(SEED).integers(
            0, self._vocab, (len(needed), longest), dtype=np.int32
        )
        assert longest < 8 or len(np.unique(self._ids)) > 1
        self._logits = np.empty((len(needed), self._vocab), np.float32)

    def prepare(self, test: Test) -> None:
        """Bring the sessions of `test` to its depth."""
        for i in range(test.n_sessions):
            at = self._shard.length(i + 1)
            if at > test.n_depth:
                self._shard.truncate(i + 1, test.n_depth)
            self._read(i, at, test.n_depth)

    def run(self, test: Test) -> float:
        """Seconds of `test`, whose sessions are brought to its depth before."""
        self.prepare(test)
        after_prompt = test.n_depth + test.n_prompt
        started = time.perf_counter()
        for i in range(test.n_sessions):
            self._read(i, test.n_depth, after_prompt)
        for at in range(after_prompt, test.room):
            self._make(test.n_sessions, at)
        return time.perf_counter() - started

    def warm_up(self, test: Test) -> None:
        """One run; of generation a few tokens are enough."""
        n_gen = min(test.n_gen, 8)
        self.run(Test(test.n_prompt, n_gen, test.n_depth, test.n_sessions))

    def _read(self, i: int, start: int, stop: int) -> None:
        """Positions [start, stop) of session i; only the last wants logits, as in real use."""
        for at in range(start, stop, CHUNK_ROWS):
            ids = self._ids[i, at : min(at + CHUNK_ROWS, stop)]
            wanted = int(at + len(ids) == stop)
            spans = [engines.RowSpan(i + 1, at, len(ids), wanted)]
            self._shard.forward(ids, spans, self._logits[:wanted])

    def _make(self, n_sessions: int, at: int) -> None:
        """A step with the token at position `at` of each of the first n_sessions."""
        ids: npt.NDArray[np.int32] = np.ascontiguousarray(self._ids[:n_sessions, at])
        spans = [engines.RowSpan(i + 1, at, 1, 1) for i in range(n_sessions)]
        self._shard.forward(ids, spans, self._logits[:n_sessions])


def cpu_name() -> str:
    """As the kernel knows it, else as Python does."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
