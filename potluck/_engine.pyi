"""The compiled engine. Imported by potluck/engine.py and by nothing else.

Buffers are taken by the buffer protocol: C-contiguous, of the stated type and shape, never cast or
copied; a wrong one raises UsageError. Each call that computes, waits or reads a file releases the
GIL. Errors are those of potluck.errors, named at each call.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, final

import numpy as np
from typing_extensions import Buffer  # of the type checker: Python 3.11's collections.abc lacks it

# numpy's arrays are buffers everywhere; its stubs say so from Python 3.12 on.
_Buffer: TypeAlias = Buffer | np.ndarray[Any, Any]

ISAS: tuple[str, ...]  # kernel tables compiled in, "scalar" first
PACK_LAYOUT: str  # of packed matrices, a part of a pack file's name
SYNTHETIC_VERSION: int  # rises when the same seed gives other weights

def available_isas() -> tuple[str, ...]:
    """Those of ISAS that this CPU can run."""

def crc32c(data: _Buffer) -> int:
    """CRC-32C (Castagnoli) of the bytes; RFC 3720, appendix B.4: of 32 zero bytes 0x8A9136AA."""

def block_layout(type_name: str) -> tuple[int, int]:
    """(values a block, bytes a block) of a weight type such as "q4_0". UsageError: unknown type."""

def exp(values: _Buffer, out: _Buffer) -> None:
    """The canonical exponential, the same bits on every CPU. f32 [n] to f32 [n]."""

def log_sum_exp(logits: _Buffer) -> float:
    """ln(sum(exp(logits))) of f32 [n] by the canonical exp, summed in f64 in a fixed order."""

@final
class Engine:
    """Kernel table and thread pool; one a process. Close order: shards first."""

    def __init__(self, threads: int = 0, isa: str = "auto", pinned: bool = False) -> None:
        """threads 0: as many as affinity and cgroup quota allow.

        isa "auto" obeys POTLUCK_ISA, then takes the best. EngineError: unknown or lacking here.
        pinned: each thread keeps to a CPU of its own, fast cores first. UsageError: too many.
        """
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def decode_threads(self) -> int:
        """That work on steps of up to 8 rows."""
    @property
    def prefill_threads(self) -> int:
        """That work on larger steps."""
    def tune_threads(self, weight_bytes: int = 67108864) -> None:
        """Measures how many threads are fastest for decode and for prefill, and uses so many.

        Weights are read out of weight_bytes of memory. Takes some tenths of a second. Not while a
        shard of this engine works.
        """
    def read_bandwidth(self, size_bytes: int = 268435456, rounds: int = 3) -> float:
        """Bytes/s that all threads together read from memory.

        Best of `rounds` over a buffer that should be several times the last cache.
        """

@final
class RopeScaling:
    """How rotary angles are stretched; cpp/engine/rope.h has the arithmetic, Config the checks."""

    def __init__(
        self,
        *,
        factor: float = 1.0,
        extrapolation: float = 0.0,
        original_tokens: float = 0.0,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        magnitude: float = 1.0,
        divisors: Sequence[float] = ...,
    ) -> None: ...

@final
class Config:
    """What the engine must know of a model. ModelError: a value that makes no model."""

    def __init__(
        self,
        *,
        dim: int,
        n_layers: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        ffn_dim: int,
        vocab: int,
        context_tokens: int,
        norm_eps: float,
        rope_theta: float,
        rope_dim: int,
        rope_interleaved: bool,
        rope_scaling: RopeScaling = ...,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm: bool = False,
    ) -> None: ...

@final
class RowSpan:
    """Rows of one session in a batch: n_tokens tokens from start_position.

    The last want_logits of them want logits.
    """

    session: int
    start_position: int
    n_tokens: int
    want_logits: int
    def __init__(
        self, session: int, start_position: int, n_tokens: int, want_logits: int
    ) -> None: ...

@final
class Synthetic:
    """Which model of random weights, in place of a file; cpp/engine/synthetic.h defines them."""

    def __init__(self, *, seed: int, n_layers: int) -> None:
        """n_layers: of the whole model. ModelError: none, or more than 65,536."""
    def rows(self, name: str, type_name: str, cols: int, first_row: int, n_rows: int) -> bytes:
        """Rows of the tensor `name` as a file of that type has them; a norm is one row of f32.

        ModelError, UsageError: a type, a width or a number of rows that it can't have.
        """

@final
class TensorFiles:
    """Tensors that each lie in a file of their own, from its first byte to its last."""

    def __init__(self, *, paths: Mapping[str, str], identity: bytes) -> None:
        """paths: by GGUF name. identity: 16 bytes, a hash of what a pack of them is made of.

        UsageError: another length.
        """

@final
class Shard:
    """The weights of layers [start, stop), their KV pages, and one call a step.

    One thread at a time (a mutex); cancel and progress are for any thread at any time.
    """

    def __init__(
        self,
        engine: Engine,
        config: Config,
        start: int,
        stop: int,
        *,
        embeds: bool,
        has_head: bool,
        kv_bytes: int,
        max_sessions: int = 256,
        kv_type: str = "f16",
    ) -> None: ...
    def matrices(self) -> list[tuple[str, int, int]]:
        """(GGUF name, rows, cols) of every matrix and vector the span needs.

        Vectors have one row. Without output.weight in the file, token_embd.weight takes its place.
        """
    def put_file(
        self,
        name: str,
        type_name: str,
        rows: int,
        cols: int,
        origin: str | Synthetic | TensorFiles,
        offset_bytes: int,
    ) -> None:
        """Reads one matrix from a file (or makes it), slab by slab, into its packed place.

        The page cache is dropped behind. ModelError: not in the span, put twice, wrong shape, type
        not supported, file too short, a scale that is not finite.
        """
    def put(
        self, name: str, type_name: str, rows: int, cols: int, first_row: int, data: _Buffer
    ) -> None:
        """The same from memory: whole rows from first_row on (a multiple of 8, or all)."""
    def write_pack(
        self,
        pack: str,
        origin: str | Synthetic | TensorFiles,
        tensors: list[tuple[str, str, int, int, int]],
    ) -> str:
        """Writes a pack of these tensors (name, type, rows, cols, offset) of a file or of none.

        Takes no memory for them. Why the pack could not be written (a full disk, say); "": it is
        there. ModelError: as put_file.
        """
    def pack_bytes(self, tensors: list[tuple[str, str, int, int, int]]) -> int:
        """What a pack of these takes on disk. ModelError: a tensor is not of the span."""
    def map_pack(
        self,
        pack: str,
        origin: str | Synthetic | TensorFiles,
        tensors: list[tuple[str, str, int, int, int]],
    ) -> str:
        """Takes tensors from a pack that write_pack made of the same origin.

        Why it can't be used (there is none, or the system refuses), and then nothing has changed;
        "": they are put. After seal only in place of a pack of the same tensors. DamagedPack: it is
        not what would be written now. ModelError: as put_file.
        """
    def damaged_packs(self) -> list[str]:
        """Paths of packs that a forward found damaged."""
    def seal(self, resident_bytes: int | None = None) -> None:
        """Ends loading. ModelError names a matrix that is missing.

        Of mapped packs so much may stay in memory (None: all); the rest is read from the disk in
        every step.
        """
    def open(self, session: int, max_tokens: int) -> None:
        """Reserves pages for max_tokens positions.

        Full: no pages or places left. SessionError: id in use.
        """
    def truncate(self, session: int, position: int) -> None:
        """The session then has at most `position` positions. UnknownSession."""
    def fork(self, session: int, new_session: int, max_tokens: int) -> None:
        """new_session shares the pages written so far (copy on write).

        UnknownSession, Full, SessionError.
        """
    def close(self, session: int) -> None:
        """Frees the session's pages; an unknown session is no error."""
    def forward(self, input: _Buffer, rows: list[RowSpan], output: _Buffer) -> list[float]:
        """One step. Seconds of each layer, the head's last if it has one.

        input: int32 [n] token ids if the shard embeds, else f32 [n, dim]; n = sum of n_tokens.
        output: writable f32 [n, dim], or [sum of want_logits, vocab] if it has the head. Rows at or
        above a start_position are overwritten.

        UnknownSession; SessionError: skips positions or beyond its room; FrameError: a value that
        is not finite (names the layer); UsageError: a token id outside the vocabulary, a session
        twice; Cancelled; DamagedPack: map others in place of damaged_packs, then repeat the step.
        After an error no session has changed its length.
        """
    def cancel(self) -> None:
        """Makes a running forward stop between layers (Cancelled); without one it does nothing."""
    @property
    def progress(self) -> int:
        """Phases finished since the shard was made; rises during a forward, and with each MiB of
        weights that is read or written.
        """
    @property
    def shard_bytes(self) -> int: ...
    @property
    def mapped_bytes(self) -> int:
        """Of these, in packs."""
    @property
    def n_streamed(self) -> int:
        """Layers (and head) that are read from the disk in every step."""
    @property
    def scratch_bytes(self) -> int: ...
    @property
    def kv_bytes(self) -> int:
        """Budget, in whole pages."""
    @property
    def kv_used_bytes(self) -> int:
        """Bytes of pages reserved by open sessions."""
    def length(self, session: int) -> int:
        """Positions of the session now. UnknownSession."""

def benchmark_matmul(
    engine: Engine,
    type_name: str,
    rows: int,
    cols: int,
    batch: int,
    rounds: int,
    weight_bytes: int = 268435456,
) -> float:
    """Median seconds of one product of seeded random weights [rows, cols] with `batch` rows.

    The weights come from memory, not from cache, if weight_bytes are several times the last one:
    each round takes another of so many bytes of copies. Takes weight_bytes and one matrix more.
    """

def convert(
    engine: Engine, from_type: str, to_type: str, data: _Buffer, out: _Buffer
) -> tuple[int, float] | None:
    """Weights of a file into another type: whole blocks to uint8 [bytes of as many values].

    The same bytes on every machine and for any number of threads. None, or the index and value of
    the first that can't be written: it is not finite, or beyond the range of f16 (bf16 if to_type
    is that); `out` is then of no use. UsageError: unknown type, no whole blocks of both types,
    buffers that overlap.
    """

def matmul(
    engine: Engine, type_name: str, rows: int, cols: int, weights: _Buffer, x: _Buffer, out: _Buffer
) -> None:
    """out[batch, rows] = x[batch, cols] . weights^T; f32 x and out, weights as in a file.

    For tests. ModelError, FrameError: weights or x that are not finite.
    """
