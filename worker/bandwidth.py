"""How fast this machine reads its memory, and with how many threads it should compute.

The bandwidth is measured once for all workers that start together.
Three equal workers that measure at once each see a share that chance gives them, and one that
measures while another starts sees less: the plan would take them for unlike machines. So one at a
time measures, longer than another's start disturbs, and leaves its figure in a file of the cache
for the others. Without a writable cache each measures for itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import time
from collections.abc import Iterator
from typing import IO, Protocol

from potluck import __version__, catalogue

SIZE_BYTES = 96 * 2**20  # beyond most caches, within the margin of a worker
TUNING_BYTES = 128 * 2**20  # of weights: beyond most caches
SECONDS = 0.3  # of reading; the best round counts
FIRST_ROUNDS = 3  # which tell how many SECONDS are
VALID_SECONDS = 600.0  # how long others take the figure over
RECORD_CHARACTERS = 65536  # that are read; a few hundred are written

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What is asked of potluck.engine.Engine to tell its bandwidth."""

    @property
    def isa(self) -> str:
        """Chosen kernel table."""

    @property
    def threads(self) -> int:
        """Of the pool."""

    def read_bandwidth(self, size_bytes: int = ..., rounds: int = ...) -> float:
        """Bytes/s that all threads together read, in the best of the rounds."""


class Tunable(Protocol):
    """What is asked of potluck.engine.Engine to choose its threads."""

    @property
    def threads(self) -> int:
        """Of the pool."""

    @property
    def decode_threads(self) -> int:
        """That work on steps of a few rows."""

    @property
    def prefill_threads(self) -> int:
        """That work on larger ones."""

    def tune_threads(self, weight_bytes: int = ...) -> None:
        """Measures, and changes the two counts."""


def tune_threads(engine: Tunable, free_bytes: int) -> None:
    """Lets the engine use as many threads as are fastest, while no other worker measures."""
    with _record():
        engine.tune_threads(max(2**20, min(TUNING_BYTES, free_bytes // 4)))
    if (engine.decode_threads, engine.prefill_threads) != (engine.threads, engine.threads):
        log.info(
            "decode uses %d of %d threads, prompts %d: as fast as all",
            engine.decode_threads,
            engine.threads,
            engine.prefill_threads,
        )


def read_bandwidth(engine: Engine, free_bytes: int, machine: str) -> float:
    """Bytes/s; takes half a second at most. `free_bytes` bounds the buffer, `machine` is its name:
    a home folder may lie on the network.
    """
    least = 2**20 * engine.threads  # that the engine measures over
    size_bytes = max(least, min(SIZE_BYTES, free_bytes // 4))
    key = f"{machine} {engine.isa} {engine.threads} threads {size_bytes} bytes {__version__}"
    with _record() as record:
        known = {} if record is None else _read(record)
        if key in known:
            return known[key][0]
        figure = _measured(engine, size_bytes)
        if record is not None:
            _write(record, {**known, key: (figure, time.time())})
    return figure


def _measured(engine: Engine, size_bytes: int) -> float:
    first = engine.read_bandwidth(size_bytes, FIRST_ROUNDS)
    rounds = max(1, math.ceil(SECONDS * first / size_bytes))
    return max(first, engine.read_bandwidth(size_bytes, rounds))


@contextlib.contextmanager
def _record() -> Iterator[IO[str] | None]:
    """The file of figures, for one process at a time; None if it can't be had."""
    with contextlib.ExitStack() as opened:
        try:
            folder = catalogue.cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            record = opened.enter_context((folder / "bandwidth.json").open("a+", encoding="utf-8"))
            fcntl.flock(record, fcntl.LOCK_EX)
        except OSError as e:
            log.debug("read bandwidth is not shared with other workers: %s", e)
            yield None
        else:
            yield record


def _read(record: IO[str]) -> dict[str, tuple[float, float]]:
    """Key to (bytes/s, when); only what is still valid. A damaged file holds nothing."""
    now = time.time()
    known: dict[str, tuple[float, float]] = {}
    try:
        record.seek(0)
        for key, (figure, at) in json.loads(record.read(RECORD_CHARACTERS)).items():
            if 0 < float(figure) < math.inf and 0 <= now - float(at) < VALID_SECONDS:
                known[key] = (float(figure), float(at))
    except (ValueError, TypeError, AttributeError, OSError) as e:
        log.debug("no read bandwidth on record: %s", e)
    return known


def _write(record: IO[str], known: dict[str, tuple[float, float]]) -> None:
    try:
        record.truncate(0)  # the file is open for appending: this is its start
        json.dump(known, record)
        record.flush()
    except OSError as e:  # a full disk
        log.debug("read bandwidth is not recorded: %s", e)
