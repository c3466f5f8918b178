"""Tensors on this machine that came without their model's file: each by the sha256 of its bytes.

A tensor lies at `<first two digits>/<64 hexadecimal digits>`, so models share what they have in
common and whoever has it can serve it. Headers of models are kept the same way. What is coming lies
in `NAME.part` until its sha256 is right. Nothing is synced: after a power cut a file may hold other
bytes than were written, so whoever uses one hashes it then (potluck/verified.py), and a wrong one
goes and is fetched again. Several processes use one folder: one writes a tensor at a time, and who
has claimed tensors keeps them when others need room. Blocking; any thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from potluck.errors import BeingWritten, DamagedTensor
from potluck.tensor_writer import TensorWriter, check_file, part_of, says_why, size_of

log = logging.getLogger(__name__)

# Of the disk's room, what tensors leave to others.
RESERVE_BYTES = 2**30
# A part that nobody has gone on with for so long is given up.
PART_SECONDS = 7 * 24 * 3600.0
_WAIT_SECONDS = 0.05
_NAME = re.compile(r"[0-9a-f]{64}")
_PART = ".part"


@dataclass(frozen=True, slots=True)
class TensorStore:
    """Where tensors lie, and the most room that all of them may take (None: what the disk has)."""

    root: Path
    space_bytes: int | None = None
    # Names of claims that this object's owner holds: those do not bind it.
    _claims: set[str] = field(default_factory=set, repr=False, compare=False)

    def path_of(self, sha256: bytes) -> Path:
        """Where these bytes lie, or would. 32 bytes."""
        if len(sha256) != 32:
            raise ValueError(f"a sha256 of {len(sha256)} bytes")
        name = sha256.hex()
        return self.root / name[:2] / name

    def header_path(self, header_sha256: str) -> Path:
        """Where a model's header lies, or would; GgufFile.header_sha256. `read_header` opens it."""
        return self.path_of(bytes.fromhex(header_sha256))

    def has(self, sha256: bytes, size_bytes: int) -> bool:
        """Whether all of it is here. Its contents are looked at when they are used."""
        try:
            return self.path_of(sha256).stat().st_size == size_bytes
        except OSError:
            return False

    def partial_bytes(self, sha256: bytes) -> int:
        """How much of it an interrupted fetch has left."""
        return size_of(part_of(self.path_of(sha256)))

    def writer(self, sha256: bytes, size_bytes: int) -> TensorWriter:
        """Goes on with this tensor where it was left, which hashes what is there of it.

        If it is here meanwhile, the writer's offset is its size, and `finish` has nothing to do.
        Raises BeingWritten (another process or thread is at it: `wait_for` its result), ModelError.
        """
        return TensorWriter(self.path_of(sha256), sha256, size_bytes, self._locked)

    def put_header(self, header_sha256: str, data: bytes) -> Path:
        """Keeps a model's header. Raises DamagedTensor: it has another sha256; ModelError."""
        sha256 = bytes.fromhex(header_sha256)
        try:
            with self.writer(sha256, len(data)) as writer:
                writer.write(data[writer.offset :])
                writer.finish()
        except BeingWritten:
            if not self.wait_for(sha256, len(data), 10.0):
                raise
        return self.path_of(sha256)

    def wait_for(self, sha256: bytes, size_bytes: int, seconds: float) -> bool:
        """Waits until nobody writes this tensor any more; whether it is here then.

        False after `seconds` too. Locks of other processes have nothing else to wait for.
        """
        path = self.path_of(sha256)
        deadline = time.monotonic() + seconds
        while not self.has(sha256, size_bytes):
            with says_why(path), self._locked(), _alone(part_of(path)) as is_alone:
                if is_alone:
                    return self.has(sha256, size_bytes)
            if time.monotonic() >= deadline:
                return False
            time.sleep(_WAIT_SECONDS)
        return True

    def verify(self, sha256: bytes, is_wanted: Callable[[], bool] = lambda: True) -> bool:
        """Whether its bytes are here and the right ones now; damaged ones are removed.

        Given up (False) when `is_wanted` says no.
        """
        try:
            check_file(self.path_of(sha256), is_wanted)
        except DamagedTensor:
            return False
        return is_wanted()

    @contextlib.contextmanager
    def claimed(self, sha256s: Iterable[bytes]) -> Iterator[None]:
        """While this lasts, no other process removes these to make room, nor their parts.

        Ask `has` only inside. A process that dies gives its claims up. Raises ModelError.
        """
        names = "".join(f"{sha256.hex()}\n" for sha256 in sha256s).encode()
        with contextlib.ExitStack() as stack:
            with says_why(self.root), self._locked():
                folder = self.root / "claims"
                folder.mkdir(parents=True, exist_ok=True)
                descriptor, path = _new_file(folder)
                stack.callback(os.close, descriptor)
                stack.callback(path.unlink, missing_ok=True)
                self._claims.add(path.name)
                stack.callback(self._claims.discard, path.name)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.write(descriptor, names) < len(names):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield

    def make_room(self, n_bytes: int, keep: Collection[bytes] = ()) -> str:
        """Makes room for so many more bytes; "", or why that is impossible, and then nothing goes.

        Those go first that were not used for longest; not those to `keep`, nor what others claim or
        write.
        """
        try:
            with self._locked():
                missing, why = self._shortage(n_bytes)
                if missing > 0:
                    if sum(size for _, size in self._removable(keep)) < missing:
                        return why
                    self._remove(missing, keep)
                    missing, why = self._shortage(n_bytes)
                return why if missing > 0 else ""
        except OSError as e:
            return f"{e.filename or self.root}: {e.strerror}"

    def removable_bytes(self, keep: Collection[bytes] = ()) -> int:
        """What `remove` could free."""
        with contextlib.suppress(OSError), self._locked(makes=False):
            return sum(size for _, size in self._removable(keep))
        return 0

    def remove(self, n_bytes: int | None = None, keep: Collection[bytes] = ()) -> int:
        """Frees so much (None: all) if it can, in the order of `make_room`; the bytes freed."""
        with contextlib.suppress(OSError), self._locked(makes=False):
            return self._remove(n_bytes, keep)
        return 0

    def total_bytes(self) -> int:
        """What all of it takes, parts included."""
        return sum(size_of(path) for path in self._files())

    def sweep(self, now: float | None = None) -> None:
        """Removes parts that nobody has gone on with for a week, and claims of the dead.

        `now`: seconds since 1970.
        """
        now = time.time() if now is None else now
        with contextlib.suppress(OSError), self._locked(makes=False):
            for path in self._files():
                if path.name.endswith(_PART) and _used_at(path) < now - PART_SECONDS:
                    _remove_alone(path)
            self._claimed_by_others()

    def _files(self) -> list[Path]:
        """Tensors, headers and parts; what vanishes meanwhile is left out."""
        found: list[Path] = []
        with contextlib.suppress(OSError):
            for folder in list(self.root.iterdir()):
                if len(folder.name) == 2:
                    with contextlib.suppress(OSError):
                        found += folder.iterdir()
        return [path for path in found if _NAME.fullmatch(path.name.removesuffix(_PART))]

    def _shortage(self, n_bytes: int) -> tuple[int, str]:
        """Bytes that so many more lack, 0 or less if they lack none, and what they lack."""
        free_bytes = shutil.disk_usage(self.root).free
        on_disk = n_bytes + RESERVE_BYTES - free_bytes
        said = (
            f"{free_bytes:,} bytes of the disk are free, {n_bytes:,} are needed and"
            f" {RESERVE_BYTES:,} for others"
        )
        if self.space_bytes is None:
            return on_disk, said
        held = self.total_bytes()
        in_space = held + n_bytes - self.space_bytes
        if in_space > on_disk:
            said = (
                f"delivered tensors may take {self.space_bytes:,} bytes, {held:,} are taken,"
                f" {n_bytes:,} are needed"
            )
        return max(on_disk, in_space), said

    def _removable(self, keep: Collection[bytes]) -> list[tuple[Path, int]]:
        """Files that may go and their sizes, the one that was unused for longest first."""
        kept = {sha256.hex() for sha256 in keep} | self._claimed_by_others()
        paths = [path for path in self._files() if path.name.removesuffix(_PART) not in kept]
        free = [path for path in paths if not path.name.endswith(_PART) or not _is_written(path)]
        return [(path, size_of(path)) for path in sorted(free, key=_used_at)]

    def _remove(self, n_bytes: int | None, keep: Collection[bytes]) -> int:
        freed = 0
        for path, size in self._removable(keep):
            if n_bytes is not None and freed >= n_bytes:
                break
            if _remove_alone(path):
                log.debug("%s makes room", path)
                freed += size
        return freed

    def _claimed_by_others(self) -> set[str]:
        """Names that living processes claim; claims of dead ones go. With the store's lock."""
        names: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            for path in list((self.root / "claims").iterdir()):
                if path.name in self._claims:
                    continue
                if _remove_alone(path):  # it holds a lock while it lives
                    continue
                with contextlib.suppress(FileNotFoundError):
                    names.update(path.read_text(encoding="ascii").split())
        return names

    @contextlib.contextmanager
    def _locked(self, *, makes: bool = True) -> Iterator[None]:
        """Claims and removals take turns; each holds this for milliseconds.

        makes: the folder, if it is not there.
        """
        if makes:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.root / ".lock", flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _new_file(folder: Path) -> tuple[int, Path]:
    while True:
        path = folder / os.urandom(8).hex()
        with contextlib.suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), path


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether nobody else has locked this file (a missing one: nobody), until the context ends."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _remove_alone(path: Path) -> bool:
    """Removes a file that nobody has locked; whether it is gone."""
    with _alone(path) as is_alone:
        if is_alone:
            path.unlink(missing_ok=True)
        return is_alone


def _is_written(path: Path) -> bool:
    with _alone(path) as is_alone:
        return not is_alone


def _used_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process removed it
        return 0.0
