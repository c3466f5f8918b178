"""One tensor of a store on its way to the disk, and looked at before it is used.

Bytes lie in `NAME.part`, locked by who writes them, until their sha256 is right. A fetch that was
cut goes on from what is there, which is hashed again. Nothing is synced: whoever uses a tensor
hashes it then, and damage by a power cut is found like any other. Blocking; hashing lets other
threads run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

from potluck.errors import DamagedTensor, ModelError
from potluck.part_file import opened_alone

# A core hashes 1.65 GB/s in pieces of this size; larger ones leave its cache.
_PIECE_BYTES = 2**20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class TensorWriter:
    """One tensor on its way to the disk. For one thread; a context, left early for another time."""

    def __init__(
        self,
        path: Path,
        sha256: bytes,
        size_bytes: int,
        locked: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """As TensorStore.writer. `locked` while it looks who else is at it."""
        self._path = path
        self._part = part_of(path)
        self._sha256 = sha256
        self._size_bytes = size_bytes
        self._digest = hashlib.sha256()
        self._descriptor: int | None = None
        self.offset = 0  # bytes that are here: the next one to be written
        with says_why(self._part):
            with locked():
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._open()
            self._go_on()

    def write(self, data: bytes | memoryview) -> None:
        """The next bytes. Raises ModelError; DamagedTensor: more than it has."""
        rest = memoryview(data).cast("B")
        if not rest:
            return
        if self._descriptor is None or self.offset + len(rest) > self._size_bytes:
            raise self._wrong(f"more than its {self._size_bytes:,} bytes came")
        with says_why(self._part):
            at = self.offset
            while at < self.offset + len(rest):
                at += os.pwrite(self._descriptor, rest[at - self.offset :], at)
        self._digest.update(rest)
        self.offset += len(rest)

    def finish(self) -> None:
        """It is whole and right: under its name.

        Raises DamagedTensor: it is not right, and is gone; ModelError: it is not whole, and stays.
        """
        if self._descriptor is None:
            return
        if self.offset != self._size_bytes:
            name = self._sha256.hex()[:12]
            raise ModelError(
                f"tensor {name}...: {self.offset:,} bytes of {self._size_bytes:,} came"
            )
        if self._digest.digest() != self._sha256:
            raise self._wrong(f"its sha256 is {self._digest.hexdigest()[:12]}...")
        with says_why(self._part):
            self._part.replace(self._path)
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Left early: what was written stays."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            if self.offset:
                os.ftruncate(self._descriptor, self.offset)
            else:
                self._part.unlink(missing_ok=True)
        self._close()

    def _open(self) -> None:
        while self._descriptor is None:
            if size_of(self._path) == self._size_bytes:
                self.offset = self._size_bytes
                return
            self._descriptor = opened_alone(self._part, self._path)

    def _go_on(self) -> None:
        """Hashes what is there."""
        if self._descriptor is None:
            return
        try:
            has_bytes = os.fstat(self._descriptor).st_size
            if has_bytes > self._size_bytes:
                os.ftruncate(self._descriptor, 0)
                has_bytes = 0
            _hash(self._descriptor, has_bytes, self._digest.update)
            self.offset = has_bytes
        except BaseException:
            self._close()
            raise

    def _wrong(self, found: str) -> DamagedTensor:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self._part.unlink(missing_ok=True)
            self._close()
        return DamagedTensor(
            f"tensor {self._sha256.hex()[:12]}...: {found}",
            remedy="what came is deleted; fetch it again",
        )

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None


def check_file(path: Path, is_wanted: Callable[[], bool] = lambda: True) -> None:
    """Hashes a file of a store; its bytes are in the page cache then.

    Raises DamagedTensor: they are not those of its name, and it is gone; or it was not there.
    Given up without a word when `is_wanted` says no.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except OSError as e:
        raise DamagedTensor(f"{path}: {e.strerror}") from e
    try:
        digest = hashlib.sha256()
        try:
            _hash(descriptor, os.fstat(descriptor).st_size, digest.update, is_wanted)
            found = digest.hexdigest()
        except OSError as e:
            found = f"unreadable ({e.strerror})"
        if found == path.name or not is_wanted():
            with contextlib.suppress(OSError):
                os.utime(path)  # when it was last used
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                path.unlink()
    finally:
        os.close(descriptor)
    raise DamagedTensor(
        f"{path} is damaged: its sha256 is {found}", remedy="it is removed; load again to fetch it"
    )


def _hash(
    descriptor: int,
    n_bytes: int,
    take: Callable[[memoryview], object],
    is_wanted: Callable[[], bool] = lambda: True,
) -> None:
    """The first n_bytes, or to the end of the file; other threads run meanwhile."""
    buffer = memoryview(bytearray(min(_PIECE_BYTES, n_bytes)))
    at = 0
    while at < n_bytes and is_wanted():
        got = os.preadv(descriptor, [buffer[: n_bytes - at]], at)
        if not got:
            return
        take(buffer[:got])
        at += got


def part_of(path: Path) -> Path:
    """Where a tensor's bytes lie until all are here."""
    return path.with_name(path.name + ".part")


def size_of(path: Path) -> int:
    """0 if there is no such file."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


@contextlib.contextmanager
def says_why(path: Path) -> Iterator[None]:
    """What the system refuses becomes a ModelError."""
    try:
        yield
    except OSError as e:
        remedy = "make room" if e.errno in _NO_ROOM else "may files be made there?"
        raise ModelError(
            f"can't write {e.filename or path}: {e.strerror or e}",
            remedy=f"{remedy}; POTLUCK_CACHE names another folder",
        ) from e
