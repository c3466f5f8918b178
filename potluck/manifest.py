"""The sha256 of each tensor of a GGUF file: made when it is asked for, once, and remembered.

Hashing reads every byte, so what is known is kept in the cache under the file's path, size, time of
change and header: a second start hashes nothing, and a file that was changed is another one. The
file stays open: removed or replaced under its name, it can still be read; changed in place, it is
refused from then on. For any number of threads. The page cache is left alone: what was hashed is
about to be sent or loaded, and the kernel drops what was read once first anyway.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import weakref
import zlib
from concurrent.futures import Future
from pathlib import Path

from potluck.errors import ModelError, UnknownModel
from potluck.gguf import GgufFile, TensorInfo

MANY = 64  # files whose sums are remembered; those that were not used for longest go
_SLAB_BYTES = 2**20
_LINE = re.compile(r"([0-9a-f]{64}) ([0-9a-f]{8}) ([^\n]*)")


class Manifest:
    """The sums of `file`, remembered in `folder`, which need not exist and may be read-only."""

    def __init__(self, file: GgufFile, folder: Path) -> None:
        """Opens the file and compares its header. Raises UnknownModel, ModelError."""
        self._file = file
        self._lock = threading.Lock()
        self._sums: dict[str, Future[bytes]] = {}
        self._named: dict[
            bytes, TensorInfo
        ] = {}  # by sum; of equal tensors the first that is known
        try:
            self._descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as e:
            raise UnknownModel(f"{file.path}: no such file") from e
        except OSError as e:
            raise file.error(f"can't be opened ({e.strerror})") from e
        self._closing = weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        self._stamp = (status.st_size, status.st_mtime_ns)
        if hashlib.sha256(self.header()).hexdigest() != file.header_sha256:
            raise self._changed()
        key = f"{file.path.resolve()}\n{self._stamp}\n{file.header_sha256}"
        self._record = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.sha256"
        self._remember()

    @property
    def modified_ns(self) -> int:
        """When the file was last changed, since 1970."""
        return self._stamp[1]

    def sha256(self, tensor: TensorInfo) -> bytes:
        """Of the tensor's bytes, 32 bytes. Blocks while they are read, unless it is known.

        Raises ModelError: the file was changed, or can't be read.
        """
        with self._lock:
            ours: Future[bytes] = Future()
            known = self._sums.setdefault(tensor.name, ours)
        if known is not ours:
            return known.result()
        try:
            found = self._hashed(tensor)
        except BaseException as e:
            with self._lock:
                del self._sums[tensor.name]
            ours.set_exception(e)
            raise
        with self._lock:
            self._named.setdefault(found, tensor)
            self._write_down(tensor.name, found)
        ours.set_result(found)
        return found

    def tensor_of(self, sha256: bytes) -> TensorInfo | None:
        """A tensor with this sum; None: there is none, or its sum is not known yet."""
        with self._lock:
            return self._named.get(sha256)

    def header(self) -> bytes:
        """The file's bytes up to its first tensor. Raises ModelError."""
        return self.read(0, self._file.data_offset_bytes)

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Bytes of the file. Raises ModelError: it was changed, or can't be read."""
        try:
            data = os.pread(self._descriptor, size_bytes, offset_bytes)
            self._check_same()
        except OSError as e:
            raise self._file.error(f"can't be read ({e.strerror})") from e
        if len(data) != size_bytes:
            raise self._changed()
        return data

    def _hashed(self, tensor: TensorInfo) -> bytes:
        digest = hashlib.sha256()
        at, stop = tensor.offset_bytes, tensor.offset_bytes + tensor.size_bytes
        while at < stop:
            data = self.read(at, min(_SLAB_BYTES, stop - at))
            digest.update(data)
            at += len(data)
        return digest.digest()

    def _check_same(self) -> None:
        status = os.fstat(self._descriptor)
        if (status.st_size, status.st_mtime_ns) != self._stamp:
            raise self._changed()

    def _changed(self) -> ModelError:
        return self._file.error(
            "was changed since it was opened", remedy="start the program again with the new file"
        )

    def _remember(self) -> None:
        """Takes over what is written down. A line that was cut or damaged counts as not there."""
        with contextlib.suppress(OSError):
            text = self._record.read_text(encoding="utf-8", errors="replace")
            os.utime(self._record)  # when it was last used
            for line in text.splitlines():
                found = _LINE.fullmatch(line)
                tensor = self._file.tensors.get(found[3]) if found else None
                if found and tensor and found[2] == _check(found[1], found[3]):
                    known: Future[bytes] = Future()
                    known.set_result(bytes.fromhex(found[1]))
                    self._sums[tensor.name] = known
                    self._named.setdefault(known.result(), tensor)

    def _write_down(self, name: str, sha256: bytes) -> None:
        """Adds a line; if the disk does not take it, the sum is made again next time."""
        if not name.isprintable():
            return
        with contextlib.suppress(OSError):
            if not self._record.exists():
                self._record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                _keep_newest(self._record.parent)
            line = f"{sha256.hex()} {_check(sha256.hex(), name)} {name}\n"
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            descriptor = os.open(self._record, flags, 0o600)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)


def _check(sha256: str, name: str) -> str:
    return f"{zlib.crc32(f'{sha256} {name}'.encode()):08x}"


def _keep_newest(folder: Path) -> None:
    """Makes room for one more record."""
    records = sorted(folder.glob("*.sha256"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in records[MANY - 1 :]:
        old.unlink(missing_ok=True)
