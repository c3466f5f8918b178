"""A file with a base model's predictions for a text, in the format of llama.cpp's perplexity tool.

Little-endian: "_logits_", i32 tokens a window, i32 vocab, i32 windows; the text's tokens, i32
[windows, tokens a window], before a start token takes the first one's place; then for each scored
row f32 scale, f32 least ln(probability), and one u16 a token of the vocabulary (one more if vocab
is odd): ln(probability) = least + scale * code. What is less likely than e ** -16 times the most
likely token is written as that. SmolLM2: 98,312 bytes a row, 25 MB a window of 512.

One that is read is untrusted: its size must be what its
header says before anything is allocated. Never more than some rows are in memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from potluck.cursor import shown
from potluck.errors import ModelError
from potluck.part_file import opened_alone
from potluck.perplexity import F32, I32, LEAST_WINDOW_TOKENS, n_scored

MAGIC = b"_logits_"
RANGE = 16.0  # in ln(probability), of one row
_HEADER = struct.Struct("<8s3i")
_LARGEST_CODE = 65535
_MOST_VOCAB = 2**24  # the largest there is has 2^18


@dataclass(frozen=True, slots=True)
class BaseShape:
    """What such a file says of itself; sizes follow."""

    window_tokens: int
    vocab: int
    n_windows: int

    @property
    def row_bytes(self) -> int:
        """Of one scored row."""
        return 8 + 4 * ((self.vocab + 1) // 2)

    @property
    def window_bytes(self) -> int:
        """Of the scored rows of one window."""
        return n_scored(self.window_tokens) * self.row_bytes

    @property
    def rows_at(self) -> int:
        """Offset of the first row: header and tokens are before it."""
        return _HEADER.size + 4 * self.window_tokens * self.n_windows

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return self.rows_at + self.n_windows * self.window_bytes


class BaseFile:
    """A base that is open to be read. Its rows are [n, vocab] f32 ln(probability)."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError for what is no such file, or not all of it."""
        self._name = shown(str(path))
        self._descriptor = _open(path, self._name)
        try:
            self.shape = self._checked_shape()
            self.tokens = self._tokens()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def rows(self, window: int, first: int, n: int) -> F32:
        """Scored rows [first, first + n) of a window.

        Raises ModelError for a row that holds no probabilities.
        """
        shape = self.shape
        assert 0 <= window < shape.n_windows, "the caller counts windows"
        assert 0 <= first <= first + n <= n_scored(shape.window_tokens), "and rows"
        at = shape.rows_at + window * shape.window_bytes + first * shape.row_bytes
        raw = np.frombuffer(self._read(n * shape.row_bytes, at), np.uint8)
        raw = raw.reshape(n, shape.row_bytes)
        scale, least = np.ascontiguousarray(raw[:, :8]).view("<f4").astype(np.float32).T
        # A probability above 1 by rounding alone: ln is then a few 1e-4.
        with np.errstate(over="ignore", invalid="ignore"):
            largest = least + scale * np.float32(_LARGEST_CODE)
            good = np.isfinite(least) & (scale >= 0) & (largest < 0.01) & (least < 0.01)
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise self._error(
                f"window {window + 1}, row {first + row + 1}: scale {scale[row]:g} and least"
                f" {least[row]:g} give no probabilities"
            )
        codes = np.ascontiguousarray(raw[:, 8:]).view("<u2")[:, : shape.vocab]
        found: F32 = codes * scale[:, None] + least[:, None]
        return found

    def _checked_shape(self) -> BaseShape:
        size_bytes = os.fstat(self._descriptor).st_size
        if size_bytes < _HEADER.size:
            raise self._error(f"{size_bytes} bytes are no base of logits")
        magic, *counts = _HEADER.unpack(self._read(_HEADER.size, 0))
        if magic != MAGIC:
            raise self._error(f"no base of logits: it begins with {magic!r}, not {MAGIC!r}")
        shape = BaseShape(*counts)
        if shape.window_tokens < LEAST_WINDOW_TOKENS or shape.n_windows < 1:
            raise self._error(f"{shape.n_windows} windows of {shape.window_tokens} tokens")
        if not 2 <= shape.vocab <= _MOST_VOCAB:
            raise self._error(f"a vocabulary of {shape.vocab:,} tokens")
        if size_bytes != shape.size_bytes:
            raise self._error(
                f"{size_bytes:,} bytes; {shape.n_windows:,} windows of {shape.window_tokens:,}"
                f" tokens and {shape.vocab:,} logits take {shape.size_bytes:,}"
            )
        return shape

    def _tokens(self) -> I32:
        """[windows, tokens a window]; no more than the file is long."""
        shape = self.shape
        raw = self._read(shape.rows_at - _HEADER.size, _HEADER.size)
        tokens = np.frombuffer(raw, "<i4").astype(np.int32)
        if tokens.min() < 0 or tokens.max() >= shape.vocab:
            wrong = tokens[(tokens < 0) | (tokens >= shape.vocab)][0]
            raise self._error(f"token {wrong}; the vocabulary has 0 to {shape.vocab - 1:,}")
        return tokens.reshape(shape.n_windows, shape.window_tokens)

    def _read(self, n_bytes: int, at: int) -> bytes:
        parts: list[bytes] = []
        while n_bytes:
            try:
                part = os.pread(self._descriptor, n_bytes, at)  # Linux gives at most 2 GiB
            except OSError as error:
                raise self._error(f"can't be read ({error.strerror})") from error
            if not part:
                raise self._error("it shrank while it was read")
            parts.append(part)
            at, n_bytes = at + len(part), n_bytes - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _error(self, message: str) -> ModelError:
        remedy = "make it again with --save-base"
        return ModelError(f"{self._name}: {message}", remedy=remedy)


class BaseWriter:
    """A base being made beside its place; it gets its name when the last row is written.

    Leaving before that, by an error too, removes it. An older base is written over, nothing else.
    """

    def __init__(self, path: Path, tokens: I32, vocab: int) -> None:
        """tokens: [windows, tokens a window].

        Raises ModelError: no such folder, too little room, or something else has the name.
        """
        n_windows, window_tokens = tokens.shape
        self.shape = BaseShape(window_tokens, vocab, n_windows)
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._left = n_windows * n_scored(window_tokens)
        for place in (path, self._part):
            _check_replaceable(place)
        self.free_bytes = need_room(path, self.shape)  # before
        self._file = self._opened()
        header = _HEADER.pack(MAGIC, window_tokens, vocab, n_windows)
        try:
            self._write(header + tokens.astype("<i4").tobytes())
        except BaseException:
            self._abandon()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._left or kind is not None:
            self._abandon()
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._part.replace(self._path)  # before closing, which gives up the lock
            self._file.close()
        except OSError as failed:
            self._abandon()
            raise self._refused(failed) from failed

    def write(self, logits: F32) -> None:
        """The next scored rows, logits [n, vocab]. Raises ModelError if the disk is full."""
        assert len(logits) <= self._left, "the caller counts rows"
        self._write(encode(logits).tobytes())
        self._left -= len(logits)

    def _opened(self) -> BinaryIO:
        """The part file, locked and empty."""
        try:
            while (descriptor := opened_alone(self._part, self._path)) is None:
                _check_replaceable(self._path)
            os.ftruncate(descriptor, 0)
        except OSError as error:
            raise self._refused(error) from error
        return os.fdopen(descriptor, "wb")

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise self._refused(error) from error

    def _abandon(self) -> None:
        with contextlib.suppress(OSError):  # what could not be flushed is not wanted any more
            self._file.close()
        self._part.unlink(missing_ok=True)

    def _refused(self, error: OSError) -> ModelError:
        return ModelError(
            f"can't write {shown(str(self._path))}: {error.strerror or error}",
            remedy="make room or allow it, or name another file",
        )


def need_room(path: Path, shape: BaseShape) -> int:
    """Bytes that are free where `path` shall be. Raises ModelError if the base takes more."""
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise ModelError(
            f"can't write {shown(str(path))}: {error.strerror or error}",
            remedy="name a file in a folder that is there",
        ) from error
    if free < shape.size_bytes:
        raise ModelError(
            f"{shown(str(path))}: {shape.size_bytes / 1e6:,.0f} MB are needed,"
            f" {free / 1e6:,.0f} MB are free",
            remedy="score fewer windows with --chunks, or name a file on another disk",
        )
    return free


def encode(logits: F32) -> npt.NDArray[np.uint8]:
    """Rows as they stand in the file, [n, row_bytes], from finite logits [n, vocab]."""
    n, vocab = logits.shape
    largest = logits.max(axis=1)
    least = np.maximum(logits.min(axis=1), largest - np.float32(RANGE))
    log_sum = np.empty(n, np.float64)
    out = np.zeros((n, 4 + 2 * ((vocab + 1) // 2)), "<u2")
    scale = (largest - least) / np.float32(_LARGEST_CODE)
    for i in range(n):  # a row at a time: its copies stay in the cache
        above = logits[i] - largest[i]
        log_sum[i] = np.log(np.exp(above).sum(dtype=np.float64))
        if scale[i] > 0:
            codes = np.rint((np.maximum(logits[i], least[i]) - least[i]) * (1 / scale[i]))
            out[i, 4 : 4 + vocab] = np.minimum(codes, _LARGEST_CODE)
    least_log_prob = (least - largest).astype(np.float64) - log_sum
    heads = np.stack([scale, least_log_prob.astype(np.float32)], axis=1).astype("<f4")
    out[:, :4] = heads.view("<u2")
    return out.view(np.uint8)


def _check_replaceable(path: Path) -> None:
    """What is at `path` may be written over: nothing, an older base or an empty file.

    Raises ModelError for anything else: a slip must not cost a text, a model or a device.
    """
    if not os.path.lexists(path):
        return
    name = shown(str(path))
    if path.is_dir():
        raise ModelError(f"{name} is a folder", remedy="name a file in it")
    descriptor = _open(path, name)
    try:
        start = os.pread(descriptor, len(MAGIC), 0)
    finally:
        os.close(descriptor)
    if start not in (b"", MAGIC):
        raise ModelError(
            f"{name} is there and no base of logits", remedy="name another file for the base"
        )


def _open(path: Path, name: str) -> int:
    """A regular file's descriptor. Raises ModelError."""
    try:
        # Without O_NONBLOCK opening a pipe waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{name}: can't be opened ({reason})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelError(f"{name}: not a regular file, so no base of logits")
    return descriptor
