"""How fast the disk with the cache writes and reads, and how much of it is free.

Weights arrive there and are read from there. Measured with a file that no name leads to, so that
nothing is left behind whatever happens, in pieces of doubling size, of which a slow disk does a
few. The rates are those of a day (worker/record.py), what is free is looked up. Blocks for a second
at most, unless a disk hangs: not for an event loop.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import IO

from potluck import catalogue
from potluck.plan import DiskFigures
from worker import record

VALID_SECONDS = 24 * 3600.0
SIZE_BYTES = 32 * 2**20  # of the file
WRITE_SECONDS = 0.5  # for all pieces; what is predicted to take longer is not begun
READ_SECONDS = 0.4
# A disk so full has other worries, and would get slower by what we write.
LEAST_FREE_BYTES = 8 * SIZE_BYTES
_PIECE_BYTES = 2**20  # the first; the others double what is there

log = logging.getLogger(__name__)


def disk_figures(machine: str) -> DiskFigures:
    """Of the disk with the cache; `machine` is its name. Rates are 0 if they can't be measured."""
    folder = catalogue.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder).free
        device = folder.stat().st_dev
    except OSError as e:
        log.info("the disk with the cache is not measured: %s", e)
        return DiskFigures(0, 0.0, 0.0)
    with record.opened() as figures:
        key = f"disk {device} of {machine}, {folder}"
        rates = _rates_of(figures.get(key, VALID_SECONDS))
        if rates is None:
            rates = _measured(folder, free_bytes)
            if rates != (0.0, 0.0):
                figures.put(key, rates)
    return DiskFigures(free_bytes, *rates)


def with_free_now(figures: DiskFigures) -> DiskFigures:
    """The same disk, with what is free of it now; takes a microsecond."""
    try:
        return replace(figures, free_bytes=shutil.disk_usage(catalogue.cache_folder()).free)
    except OSError:
        return figures


def _rates_of(value: object) -> tuple[float, float] | None:
    """(read, write) as an earlier measurement left them; None if it is no such thing."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    read, write = value
    if not (isinstance(read, float) and isinstance(write, float)):
        return None
    return (read, write) if 0 < read < inf and 0 < write < inf else None


def _measured(folder: Path, free_bytes: int) -> tuple[float, float]:
    """Bytes/s read and written; 0 and 0 with a line in the log if the disk does not let us."""
    if free_bytes < LEAST_FREE_BYTES:
        log.info("the disk with the cache is not measured: %d MiB are free", free_bytes >> 20)
        return 0.0, 0.0
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            write = _write_rate(file)
            return _read_rate(file), write
    except OSError as e:
        log.info("the disk with the cache is not measured: %s", e)
        return 0.0, 0.0


def _write_rate(file: IO[bytes]) -> float:
    """Of the last piece that was written and is on the disk. Raises OSError."""
    data = os.urandom(_PIECE_BYTES)  # some disks compress
    started = time.perf_counter()
    size_bytes, done_bytes, rate = _PIECE_BYTES, 0, 0.0
    while True:
        before = time.perf_counter()
        for _ in range(size_bytes // _PIECE_BYTES):
            if file.write(data) != len(data):
                raise OSError("the disk is full")
        os.fdatasync(file.fileno())
        now = time.perf_counter()
        rate = size_bytes / max(now - before, 1e-9)
        done_bytes += size_bytes
        size_bytes = done_bytes  # as much again
        late = now - started + size_bytes / rate > WRITE_SECONDS
        if late or done_bytes >= SIZE_BYTES:
            return rate


def _read_rate(file: IO[bytes]) -> float:
    """Of what is in the file, from the disk and not from the page cache. Raises OSError."""
    descriptor = file.fileno()
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    buffer = bytearray(_PIECE_BYTES)
    file.seek(0)
    n_bytes, seconds = 0, 0.0
    started = time.perf_counter()
    while seconds < READ_SECONDS and (n := os.readv(descriptor, [buffer])):
        n_bytes += n
        seconds = time.perf_counter() - started
    return n_bytes / max(seconds, 1e-9)
