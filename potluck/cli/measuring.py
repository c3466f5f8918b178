"""One engine measured: what was run, how long each run took, and the figures that follow.

Field names of the JSON are llama-bench's. Every figure has its ceiling beside it: the bandwidth
at which memory was read in the same run.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from potluck import __version__
from potluck.model import EMBEDDING, ModelConfig

if TYPE_CHECKING:
    from potluck.engine import Engine, Shard
    from potluck.gguf import GgufFile, TensorInfo

CHUNK_ROWS = 512  # rows of a prompt in one step; llama-bench's n_ubatch is the same by default
SEED = 1


@dataclass(frozen=True, slots=True)
class Test:
    """ "pp" (a prompt) or "tg" (generation) of n_tokens, for n_rows sessions at once."""

    kind: str
    n_tokens: int
    n_rows: int

    @property
    def name(self) -> str:
        """As llama-bench names it: pp512, tg128; with "x4" for four sessions at once."""
        return f"{self.kind}{self.n_tokens}" + (f"x{self.n_rows}" if self.n_rows > 1 else "")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A whole model in an engine, and what its file says."""

    file: GgufFile
    config: ModelConfig
    tensors: tuple[TensorInfo, ...]
    engine: Engine
    shard: Shard

    @property
    def weight_bytes(self) -> int:
        """That a decode step reads: layers and head; of an untied embedding only a row."""
        unread = () if self.config.tied_embeddings else (EMBEDDING,)
        return sum(t.size_bytes for t in self.tensors if t.name not in unread)

    @property
    def layer_macs(self) -> int:
        """Multiplications of one token in the layers' matrices, without attention and head."""
        return sum(t.rows * t.cols for t in self.tensors if t.rows > 1 and "blk." in t.name)

    @property
    def n_params(self) -> int:
        """Values of all tensors."""
        return sum(t.rows * t.cols for t in self.tensors)

    @property
    def type_name(self) -> str:
        """Architecture, size and the type that holds most bytes: "llama 135M Q4_1"."""
        by_type: dict[str, int] = {}
        for t in self.tensors:
            by_type[t.type_name] = by_type.get(t.type_name, 0) + t.size_bytes
        most = max(by_type, key=lambda name: by_type[name])
        n = self.n_params
        params = f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.0f}M"
        return f"{self.config.architecture} {params} {most.upper()}"


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of each run of a test, beside the read bandwidth of memory just before."""

    test: Test
    seconds: tuple[float, ...]
    read_bandwidth: float  # bytes/s, all threads
    started: datetime

    @property
    def tokens_per_second(self) -> list[float]:
        """Of each run, all sessions together."""
        return [self.test.n_tokens * self.test.n_rows / s for s in self.seconds]

    def gb_per_second(self, loaded: Loaded) -> float | None:
        """Weights read a second in generation: bytes of a step over its mean time. None for pp."""
        if self.test.kind == "pp":
            return None
        return loaded.weight_bytes * self.test.n_tokens / statistics.mean(self.seconds) / 1e9

    def gmac_per_second(self, loaded: Loaded) -> float:
        """10^9 multiplications a second in the layers' matrices."""
        rows = self.test.n_tokens * self.test.n_rows
        return loaded.layer_macs * rows / statistics.mean(self.seconds) / 1e9

    def json_of(self, loaded: Loaded) -> dict[str, object]:
        """The object of --json."""
        test, rates = self.test, self.tokens_per_second
        samples_ns = [round(s * 1e9) for s in self.seconds]
        rows_a_step = min(CHUNK_ROWS, test.n_tokens) if test.kind == "pp" else test.n_rows
        return {
            "build_commit": f"potluck-{__version__}",
            "build_number": 0,
            "cpu_info": cpu_name(),
            "model_filename": str(loaded.file.path),
            "model_type": loaded.type_name,
            "model_size": sum(t.size_bytes for t in loaded.tensors),
            "model_n_params": loaded.n_params,
            "n_batch": rows_a_step,
            "n_ubatch": rows_a_step,
            "n_threads": loaded.engine.threads,
            "type_k": "f16",
            "type_v": "f16",
            "n_prompt": test.n_tokens if test.kind == "pp" else 0,
            "n_gen": test.n_tokens if test.kind == "tg" else 0,
            "n_depth": 0,
            "test_time": self.started.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "avg_ns": round(statistics.mean(samples_ns)),
            "stddev_ns": round(deviation(samples_ns)),
            "avg_ts": statistics.mean(rates),
            "stddev_ts": deviation(rates),
            "samples_ns": samples_ns,
            "samples_ts": rates,
            "isa": loaded.engine.isa,
            "read_bandwidth": self.read_bandwidth,
            "gb_per_second": self.gb_per_second(loaded),
            "gmac_per_second": self.gmac_per_second(loaded),
        }


def prompt_run(loaded: Loaded, test: Test) -> Callable[[], float]:
    """Seconds to read a prompt in chunks; only its last token wants logits, as in real use."""
    import numpy as np

    from potluck.engine import RowSpan

    shard, n = loaded.shard, test.n_tokens
    ids = np.random.default_rng(SEED).integers(0, loaded.config.vocab, n, dtype=np.int32)
    assert n < 2 or len(set(ids.tolist())) > 1  # one repeated token would not be a prompt
    logits = np.empty((1, loaded.config.vocab), np.float32)

    def once() -> float:
        shard.open(1, n)
        started = time.perf_counter()
        for at in range(0, n, CHUNK_ROWS):
            chunk = ids[at : at + CHUNK_ROWS]
            last = int(at + len(chunk) == n)
            shard.forward(chunk.data, [RowSpan(1, at, len(chunk), last)], logits[:last].data)
        seconds = time.perf_counter() - started
        shard.close(1)
        return seconds

    return once


def generate_run(loaded: Loaded, test: Test) -> Callable[[], float]:
    """Seconds to make n_tokens for each of n_rows sessions, a row of each in every step."""
    import numpy as np

    from potluck.engine import RowSpan

    shard, rows = loaded.shard, test.n_rows
    ids = np.random.default_rng(SEED).integers(
        0, loaded.config.vocab, (test.n_tokens, rows), dtype=np.int32
    )
    logits = np.empty((rows, loaded.config.vocab), np.float32)

    def once() -> float:
        for session in range(rows):
            shard.open(session + 1, test.n_tokens)
        started = time.perf_counter()
        for at, step in enumerate(ids):
            spans = [RowSpan(session + 1, at, 1, 1) for session in range(rows)]
            shard.forward(step.data, spans, logits.data)
        seconds = time.perf_counter() - started
        for session in range(rows):
            shard.close(session + 1)
        return seconds

    return once


def deviation(samples: list[float] | list[int]) -> float:
    """Of a sample, as llama-bench has it; 0 of one."""
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


def cpu_name() -> str:
    """As the kernel knows it, else as Python does."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
