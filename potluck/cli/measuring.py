"""What `bench` measures: the tests of a grid, and the figures that follow from their times.

Pure: nothing here runs or reads a clock. Every figure has its ceiling beside it, the bandwidth at
which memory was read in the same run.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from potluck.errors import UsageError
from potluck.gguf import GgufFile, TensorInfo
from potluck.model import (
    EMBEDDING,
    KV_PAGE_TOKENS,
    KvType,
    ModelConfig,
    kv_bytes_per_token,
    scratch_bytes,
)
from potluck.plan import Span

CHUNK_ROWS = 512  # rows of a prompt in one step; llama-bench's n_ubatch is the same by default
MOST_SESSIONS = 256  # of one engine
_NAME = re.compile(r"(?:pp(\d{1,7}))?\+?(?:tg(\d{1,7}))?(?:x(\d{1,7}))?(?:@d(\d{1,7}))?")


@dataclass(frozen=True, slots=True)
class Test:
    """Some sessions at once that each read a prompt, then make tokens one by one.

    Each holds n_depth positions before, which take no part in the time. Raises UsageError.
    """

    n_prompt: int
    n_gen: int
    n_depth: int = 0
    n_sessions: int = 1

    def __post_init__(self) -> None:
        if min(self.n_prompt, self.n_gen, self.n_depth) < 0 or self.n_prompt + self.n_gen == 0:
            counts = f"{self.n_prompt} read, {self.n_gen} made, {self.n_depth} before"
            raise UsageError(f"a test of {counts}; expected one token or more")
        if not 1 <= self.n_sessions <= MOST_SESSIONS:
            raise UsageError(f"{self.n_sessions} sessions at once; expected 1 to {MOST_SESSIONS}")

    @classmethod
    def named(cls, text: str) -> Test:
        """The test of a name: "pp512", "tg128x4", "pp512+tg128@d4096". Raises UsageError."""
        found = _NAME.fullmatch(text)
        if not found or not (found[1] or found[2]):
            raise UsageError(f"{text!r} names no test; expected one such as pp512 or tg64x4@d4096")
        return cls(int(found[1] or 0), int(found[2] or 0), int(found[4] or 0), int(found[3] or 1))

    @property
    def name(self) -> str:
        """As llama-bench names it, and with the sessions: "tg128x4@d4096"."""
        counts = {"pp": self.n_prompt, "tg": self.n_gen}
        name = "+".join(f"{kind}{count}" for kind, count in counts.items() if count)
        name += f"x{self.n_sessions}" if self.n_sessions > 1 else ""
        return name + (f"@d{self.n_depth}" if self.n_depth else "")

    @property
    def n_tokens(self) -> int:
        """That count: read and made, by all sessions."""
        return (self.n_prompt + self.n_gen) * self.n_sessions

    @property
    def room(self) -> int:
        """Positions that each session reaches."""
        return self.n_depth + self.n_prompt + self.n_gen


def grid(
    prompts: Sequence[int],
    generations: Sequence[int],
    both: Sequence[tuple[int, int]],
    depths: Sequence[int],
    sessions: Sequence[int],
) -> list[Test]:
    """Every combination, each once, in llama-bench's order; a count of 0 leaves a kind out.

    Prompts are read by one session, as more would only read one after the other. Generation and
    `both` (a prompt, then generation) are measured for one session in any case, so that each count
    of `sessions` has what it is compared with. Raises UsageError.
    """
    counts = [1, *(n for n in sessions if n != 1)]
    found: list[Test] = []
    for depth in depths:
        found += [Test(n, 0, depth) for n in prompts if n]
        found += [Test(0, n, depth, k) for n in generations if n for k in counts]
        found += [Test(p, n, depth, k) for p, n in both if p + n for k in counts]
    return list(dict.fromkeys(found))


def rooms(tests: Iterable[Test]) -> list[int]:
    """Positions that the first, second, ... session needs to take part in all its tests."""
    needed: list[int] = []
    for test in tests:
        needed += [0] * (test.n_sessions - len(needed))
        for i in range(test.n_sessions):
            needed[i] = max(needed[i], test.room)
    return needed


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured of a model: all of it, or its first layers and the head."""

    file: GgufFile
    config: ModelConfig  # with the layers that are measured
    tensors: tuple[TensorInfo, ...]  # of these, embedding and head
    whole: ModelConfig
    kv_type: KvType = KvType.F16

    @property
    def path(self) -> Path:
        """Of the model's file; a synthetic model has its name there."""
        return self.file.path

    @property
    def weight_bytes(self) -> int:
        """That a decode step reads: layers and head; of an untied embedding only a row."""
        unread = () if self.config.tied_embeddings else (EMBEDDING,)
        return sum(t.size_bytes for t in self.tensors if t.name not in unread)

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sum(t.size_bytes for t in self.tensors)

    @property
    def layer_macs(self) -> int:
        """Multiplications of one token in the layers' matrices, without attention and head."""
        return sum(t.rows * t.cols for t in self.tensors if t.rows > 1 and "blk." in t.name)

    @property
    def n_params(self) -> int:
        """Values of all tensors."""
        return _n_values(self.tensors)

    @property
    def weight_type(self) -> str:
        """The type that holds most bytes of the layers: "Q4_K"."""
        by_type: dict[str, int] = {}
        for t in self.tensors:
            if "blk." in t.name:
                by_type[t.type_name] = by_type.get(t.type_name, 0) + t.size_bytes
        return max(by_type, key=lambda name: by_type[name]).upper()

    @property
    def type_name(self) -> str:
        """Architecture, size and weight type of the whole model, and how much of it is measured:
        "llama 135M Q4_1", "llama 65.3B Q4_0, 20 of 80 layers".
        """
        n = _n_values(self.file.tensors.values())
        params = f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.0f}M"
        name = f"{self.config.architecture} {params} {self.weight_type}"
        if self.config.n_layers == self.whole.n_layers:
            return name
        return f"{name}, {self.config.n_layers} of {self.whole.n_layers} layers"

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one position in all layers."""
        return kv_bytes_per_token(self.config, Span(0, self.config.n_layers), self.kv_type)

    def kv_bytes(self, tests: Iterable[Test]) -> int:
        """Of whole pages for the sessions of all tests."""
        pages = sum(-(-room // KV_PAGE_TOKENS) for room in rooms(tests))
        return pages * KV_PAGE_TOKENS * self.kv_bytes_per_token

    def buffer_bytes(self, tests: Iterable[Test]) -> int:
        """Of the largest step."""
        rows = max(max(t.n_prompt, t.n_depth, t.n_sessions) for t in tests)
        return scratch_bytes(self.config, min(CHUNK_ROWS, rows))

    def bytes_read(self, test: Test) -> int:
        """From memory by the steps of generation: weights once a step, each session's KV so far."""
        positions = test.n_gen * (test.n_depth + test.n_prompt) + test.n_gen * (test.n_gen + 1) // 2
        kv = positions * test.n_sessions * self.kv_bytes_per_token
        return self.weight_bytes * test.n_gen + kv

    def check_context(self, tests: Iterable[Test]) -> None:
        """Raises UsageError: a test reaches beyond the positions that the model was made for."""
        for test in tests:
            if test.room > self.config.context_tokens:
                reach = f"depth {test.n_depth} and " if test.n_depth else ""
                tokens = f"{reach}{test.room - test.n_depth} tokens"
                context = f"the model's context is {self.config.context_tokens}"
                raise UsageError(f"{test.name}: {tokens}; {context}")


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of each run of a test, beside the read bandwidth of memory around them."""

    test: Test
    seconds: tuple[float, ...]
    read_bandwidth: float  # bytes/s, all threads
    started: datetime
    isa: str
    n_threads: int

    @property
    def tokens_per_second(self) -> list[float]:
        """Of each run, all sessions together."""
        return [self.test.n_tokens / s for s in self.seconds]

    def gb_per_second(self, subject: Subject) -> float | None:
        """10^9 bytes of weights and KV read a second; None where a prompt was read, too."""
        if self.test.n_prompt:
            return None
        return subject.bytes_read(self.test) / statistics.mean(self.seconds) / 1e9

    def gmac_per_second(self, subject: Subject) -> float:
        """10^9 multiplications a second in the layers' matrices."""
        return subject.layer_macs * self.test.n_tokens / statistics.mean(self.seconds) / 1e9


def _n_values(tensors: Iterable[TensorInfo]) -> int:
    return sum(t.rows * t.cols for t in tensors)


def deviation(samples: Sequence[float]) -> float:
    """Of a sample, as llama-bench has it; 0 of one."""
    return statistics.stdev(samples) if len(samples) > 1 else 0.0
