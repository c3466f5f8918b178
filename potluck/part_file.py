"""A large file that is written over hours: interrupted anywhere, it goes on where it was.

The bytes lie in `NAME.part` until all are there; then it is renamed. Beside it `NAME.part.json`
says of what the bytes are made and how many are on the disk for certain: they are synced first,
then it. So after Ctrl-C, a kill, a full disk or a power cut the next writer of the same
bytes goes on from there, and of other bytes starts afresh. One process at a time (a lock).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Never, Self

from potluck.errors import BeingWritten, ModelError

SYNC_SECONDS = 5.0  # at most so much work is lost by a kill
RECORD_BYTES = 512  # one sector of a disk
GO_ON = "the same command again goes on where it was"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PartFile:
    """The file at `target`, being written. One thread; a context: left early, it can be gone on
    with.
    """

    def __init__(self, target: Path, identity: str, *, force: bool = False) -> None:
        """Locks and looks; nothing that is there changes before `begin`.

        identity: equal ones mean equal bytes. force: take the place of `target`, and of a part file
        of unknown origin. Raises ModelError: in use, not writable, or there already.
        """
        self._target = target
        self._identity = identity
        self._force = force
        self.path = target.with_name(target.name + ".part")
        self._record = target.with_name(target.name + ".part.json")
        self._synced = time.monotonic()
        self._is_open = True
        self._is_begun = False
        self._descriptor = self._opened()
        try:
            self.done_bytes, self.discarded = self._found()
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def room_bytes(self) -> int:
        """Of the disk, that it has already."""
        return os.fstat(self._descriptor).st_blocks * 512

    def begin(self) -> None:
        """Drops what is behind `done_bytes`; all if another writing was discarded."""
        self._is_begun = True
        with self._says_why():
            self._write_record()
            _sync_folder(self._record.parent)
            os.ftruncate(self._descriptor, self.done_bytes)
            os.lseek(self._descriptor, self.done_bytes, os.SEEK_SET)

    def append(self, data: bytes | memoryview) -> None:
        """All or, after an error, nothing of it counts."""
        rest = memoryview(data).cast("B")
        n_bytes = len(rest)
        with self._says_why():
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            self.done_bytes += n_bytes
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync()

    def finish(self) -> None:
        """It is whole: on the disk, then under its name."""
        with self._says_why():
            os.fsync(self._descriptor)
            if not self._force and os.path.lexists(self._target):
                self._refuse_existing()
            self.path.replace(self._target)
            _sync_folder(self._target.parent)
            self._record.unlink(missing_ok=True)
        self._close()

    def abandon(self) -> None:
        """It can't become whole: gone."""
        self.path.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Left early: what was appended stays, if the disk lets it; what was there, before
        `begin`.
        """
        if not self._is_open:
            return
        with contextlib.suppress(OSError):
            if self._is_begun and self.done_bytes:
                os.ftruncate(self._descriptor, self.done_bytes)
                self._sync()
            elif self._is_begun or not os.fstat(self._descriptor).st_size:
                self.path.unlink(missing_ok=True)
                self._record.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        self._is_open = False
        os.close(self._descriptor)

    def _opened(self) -> int:
        """The part file, locked."""
        while True:
            self._check_target()
            with self._says_why():
                descriptor = opened_alone(self.path, self._target)
            if descriptor is not None:
                break
        try:
            self._check_target()
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_target(self) -> None:
        if os.path.lexists(self._target) and not self._force:
            self._refuse_existing()
        if self._target.is_dir():
            raise ModelError(f"{self._target}: a folder", remedy="name a file in it")
        if (
            self._target.exists() and not self._target.is_file()
        ):  # a device, which --force is not for
            raise ModelError(f"{self._target}: not a regular file", remedy="name another file")

    def _refuse_existing(self) -> Never:
        raise ModelError(f"{self._target}: exists already", remedy="--force writes over it")

    def _found(self) -> tuple[int, bool]:
        """Bytes that can be gone on from, and whether there are others that can't."""
        has_bytes = os.fstat(self._descriptor).st_size
        if not has_bytes:
            return 0, False
        try:
            record = json.loads(self._record.read_bytes())
            identity, done_bytes = str(record["identity"]), int(record["done_bytes"])
            is_whole = record["check"] == _check(identity, done_bytes)
        except FileNotFoundError as e:
            if self._force:
                return 0, True
            raise ModelError(
                f"{self.path}: is there, and nothing says that potluck began it",
                remedy="move it away; --force writes over it",
            ) from e
        except (OSError, ValueError, KeyError, TypeError):
            return 0, True
        if identity != self._identity or not is_whole or not 0 <= done_bytes <= has_bytes:
            return 0, True
        return done_bytes, False

    def _sync(self) -> None:
        os.fsync(self._descriptor)
        self._write_record()
        self._synced = time.monotonic()

    def _write_record(self) -> None:
        """In place: it has its room on a disk that is full by now."""
        said = {
            "identity": self._identity,
            "done_bytes": self.done_bytes,
            "check": _check(self._identity, self.done_bytes),
        }
        line = json.dumps(said).ljust(RECORD_BYTES).encode()
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._record, flags, 0o666)
        try:
            if os.pwrite(descriptor, line, 0) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(descriptor, len(line))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _says_why(self) -> Iterator[None]:
        """What the system refuses becomes a ModelError."""
        try:
            yield
        except OSError as e:
            where = e.filename or self.path
            remedy = f"make room; {GO_ON}" if e.errno in _NO_ROOM else "may files be made there?"
            raise ModelError(f"can't write {where}: {e.strerror or e}", remedy=remedy) from e


def opened_alone(path: Path, target: Path) -> int | None:
    """A file beside `target`, made if it is not there, opened and locked by this process alone.

    None: its writer before renamed it between opening and locking, so look again. Raises OSError;
    BeingWritten: another process has it; ModelError: it is no regular file.
    """
    # Without O_NONBLOCK opening a pipe waits for its reader.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path}: not a regular file", remedy="move it away")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(status, path.lstat()):
                return descriptor
    except BlockingIOError as e:
        os.close(descriptor)
        raise BeingWritten(
            f"{target}: another process is writing it", remedy="wait until it is done"
        ) from e
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _check(identity: str, done_bytes: int) -> str:
    """Of a record: one that a power cut left half old and half new has a wrong one."""
    return hashlib.sha256(f"{identity} {done_bytes}".encode()).hexdigest()[:16]


def _sync_folder(folder: Path) -> None:
    """So that a new name outlives a power cut; some filesystems refuse, and need it not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
