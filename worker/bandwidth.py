"""How fast this machine reads its memory, and with how many threads it should compute.

The bandwidth is measured once for all workers that start together.
Three equal workers that measure at once each see a share that chance gives them, and one that
measures while another starts sees less: the plan would take them for unlike machines. So one at a
time measures, longer than another's start disturbs, and leaves its figure in a file of the cache
for the others (worker/record.py).
"""

from __future__ import annotations

import logging
import math
from typing import Protocol

from potluck import __version__
from worker import record

SIZE_BYTES = 96 * 2**20  # beyond most caches, within the margin of a worker
TUNING_BYTES = 128 * 2**20  # of weights: beyond most caches
SECONDS = 0.3  # of reading; the best round counts
FIRST_ROUNDS = 3  # which tell how many SECONDS are
VALID_SECONDS = 600.0  # how long others take the figure over

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
    with record.opened():
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
    with record.opened() as figures:
        known = figures.get(key, VALID_SECONDS)
        if isinstance(known, float) and 0 < known < math.inf:
            return known
        figure = _measured(engine, size_bytes)
        figures.put(key, figure)
    return figure


def _measured(engine: Engine, size_bytes: int) -> float:
    first = engine.read_bandwidth(size_bytes, FIRST_ROUNDS)
    rounds = max(1, math.ceil(SECONDS * first / size_bytes))
    return max(first, engine.read_bandwidth(size_bytes, rounds))
