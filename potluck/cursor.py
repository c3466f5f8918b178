"""Reading an untrusted file front to back: every claim it makes is checked against its size first.

Decides nothing about formats; potluck/gguf.py does. A refusal is a ModelError with the file's name
and the offset in bytes. Nothing is allocated on a file's word, and only a small window is held.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from potluck.errors import ModelError, UnknownModel

CUT_SHORT = "is the file cut short? fetch it again (potluck pull)"
# How a file begins that Git LFS has not fetched: the right name, and some lines of text.
_POINTER = b"version https://git-lfs"
# Of the file, held while its header is read: a 98 MB model's header takes two reads.
_WINDOW_BYTES = 2**20


def shown(text: str) -> str:
    """Text from a file or a command line as one short printable line."""
    short = text if len(text) <= 200 else text[:197] + "..."
    return short if short.isprintable() else ascii(short)


@contextmanager
def opened(path: Path, *, limit_bytes: int) -> Iterator[Cursor]:
    """A cursor at the start of a regular file, of which at most `limit_bytes` may be read.

    Raises UnknownModel (no such file) and ModelError (folder, pipe, not readable).
    """
    name = shown(str(path))
    try:
        # Without O_NONBLOCK opening a pipe waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as e:
        raise UnknownModel(f"{name}: no such file") from e
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        reason = e.strerror if isinstance(e, OSError) else e
        raise ModelError(f"{name}: can't be opened ({reason})") from e
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise ModelError(f"{name}: a folder, not a model file", remedy="name the file in it")
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{name}: not a regular file, so not a model file")
        yield Cursor(descriptor, name, status, limit_bytes)
    finally:
        os.close(descriptor)


class Cursor:
    """A place in an open file, and a window on it. One thread; the descriptor is the opener's."""

    def __init__(
        self, descriptor: int, name: str, status: os.stat_result, limit_bytes: int
    ) -> None:
        self._descriptor = descriptor
        self._name = name
        self._limit_bytes = limit_bytes
        self._window = b""
        self._window_start = 0
        self.status = status  # when the file was opened
        self.size_bytes = status.st_size
        self.offset = 0

    def error(self, message: str, *, at: int | None = None, remedy: str = "") -> ModelError:
        """A ModelError about this file, at a place in it if one is given."""
        place = "" if at is None else f"offset {at}: "
        return ModelError(f"{self._name}: {place}{message}", remedy=remedy)

    def refuse_pointer(self) -> None:
        """Raises ModelError for a pointer of Git LFS, which a clone without it has for files."""
        if self.read_at(0, min(len(_POINTER), self.size_bytes)) == _POINTER:
            raise self.error(
                "a pointer of Git LFS, not the file",
                remedy="run `git lfs pull` in the model's folder",
            )

    def take(self, size_bytes: int, what: str, *, at: int | None = None) -> bytes:
        """The next bytes. Checked first, so that a claim of 2^62 costs nothing.

        A refusal names the place `at`, where the claim was made; without it, where the bytes are.
        """
        start, stop = self.offset, self.offset + size_bytes
        at = start if at is None else at
        if stop > self.size_bytes:
            behind = f"{what} ends {stop - self.size_bytes:,} bytes behind the end of the file"
            raise self.error(behind, at=at, remedy=CUT_SHORT)
        if stop > self._limit_bytes:
            raise self.error(f"a header of more than {self._limit_bytes:,} bytes", at=at)
        if stop > self._window_start + len(self._window):
            self._window = os.pread(self._descriptor, max(size_bytes, _WINDOW_BYTES), start)
            self._window_start = start
            if len(self._window) < size_bytes:
                raise self.error(f"{what} can't be read: the file shrank", at=at)
        self.offset = stop
        return self._window[start - self._window_start : stop - self._window_start]

    def whole(self, letter: str, what: str) -> int:
        """One little-endian integer; `letter` as in struct."""
        format_ = "<" + letter
        value: int = struct.unpack(format_, self.take(struct.calcsize(format_), what))[0]
        return value

    def count(self, what: str, limit: int, *, least_bytes: int) -> int:
        """A u64: how many of something follow, each of at least `least_bytes`."""
        start = self.offset
        n = self.whole("Q", f"the number of {what}")
        rest = self.size_bytes - self.offset
        if n > limit:
            raise self.error(f"{n:,} {what}, at most {limit:,} are supported", at=start)
        if n * least_bytes > rest:
            room = f"the {rest:,} bytes that follow hold at most {rest // least_bytes:,}"
            raise self.error(f"{n:,} {what}, {room}", at=start, remedy=CUT_SHORT)
        return n

    def string(self, what: str, limit_bytes: int) -> str:
        """A u64 length, then UTF-8."""
        start = self.offset
        size_bytes = self.whole("Q", what)
        if limit_bytes < size_bytes <= self.size_bytes - self.offset:
            found = f"{what} has {size_bytes:,} bytes, at most {limit_bytes:,} are supported"
            raise self.error(found, at=start)
        try:
            return str(self.take(size_bytes, what, at=start), "utf-8")
        except UnicodeDecodeError as e:
            raise self.error(f"{what} is not UTF-8 ({e.reason})", at=start) from e

    def strings(self, n: int, what: str, limit_bytes: int) -> tuple[str, ...]:
        """n strings. The inner loop stays inside the window: 100,000 tokens take 25 ms."""
        found: list[str] = []
        while len(found) < n:
            # One string by the checked way: it moves the window, or says what is wrong.
            found.append(self.string(f"{what}, element {len(found)},", limit_bytes))
            window, at = self._window, self.offset - self._window_start
            while len(found) < n and at + 8 <= len(window):
                stop = at + 8 + int.from_bytes(window[at : at + 8], "little")
                if stop > len(window):
                    break
                try:
                    found.append(str(window[at + 8 : stop], "utf-8"))
                except UnicodeDecodeError:
                    break  # the checked way meets the same string next, and names it
                at = stop
            self.offset = self._window_start + at
        return tuple(found)

    def read_at(self, start: int, size_bytes: int) -> bytes:
        """Bytes [start, start + size_bytes), beyond the limit too. Does not move the cursor."""
        pieces, stop = [], start + size_bytes
        while start < stop:
            try:
                piece = os.pread(self._descriptor, stop - start, start)
            except OSError as e:
                raise self.error(f"can't be read ({e.strerror})", at=start) from e
            if not piece:
                raise self.error(f"{stop - start:,} bytes are missing", at=start, remedy=CUT_SHORT)
            pieces.append(piece)  # the kernel gives at most 2 GiB at once
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def sha256(self, stop: int) -> str:
        """Of bytes [0, stop), in hex. Does not move the cursor."""
        digest = hashlib.sha256()
        for start in range(0, stop, _WINDOW_BYTES):
            digest.update(os.pread(self._descriptor, min(_WINDOW_BYTES, stop - start), start))
        return digest.hexdigest()
