"""What was measured here before, in a file of the cache that the workers of a machine share.

Whoever has the file open measures; the others wait and take the figure over. So workers that start
together neither disturb each other's measurements nor come to different figures for equal machines.
Without a writable cache, or if its turn does not come, each measures for itself. Deleting the file
makes everything be measured again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from potluck import catalogue
from potluck.errors import Cancelled

FILE_NAME = "measured.json"
# A turn takes some seconds; a worker that was stopped in the middle of its own keeps the file.
PATIENCE_SECONDS = 30.0
_LOOK_SECONDS = 0.01  # between two looks at the lock: flock knows no deadline
_KEPT_SECONDS = 24 * 3600.0
_CHARACTERS = 1 << 18  # that are read; a figure takes some hundreds

log = logging.getLogger(__name__)


def never() -> bool:
    """For whoever waits until it is done."""
    return False


class Record:
    """Figures by key. `file` None: nothing is known and nothing is kept."""

    def __init__(self, file: IO[str] | None) -> None:
        self._file = file
        self._known: dict[str, tuple[Any, float]] = {} if file is None else _read(file)

    def get(self, key: str, valid_seconds: float) -> Any:
        """The value of a figure that is not older; None: measure it. What it is, check yourself."""
        value, at = self._known.get(key, (None, 0.0))
        return value if 0 <= time.time() - at < valid_seconds else None

    def put(self, key: str, value: Any) -> None:
        """Keeps a figure, a value that JSON has."""
        if self._file is None:
            return
        self._known[key] = (value, time.time())
        try:
            self._file.truncate(0)  # it is open for appending: this is its start
            json.dump(self._known, self._file)
            self._file.flush()
        except OSError as e:  # a full disk
            log.debug("the figure is not recorded: %s", e)


@contextlib.contextmanager
def opened(gives_up: Callable[[], bool] = never) -> Iterator[Record]:
    """The record, for one process at a time. Raises Cancelled if `gives_up` says so meanwhile."""
    with contextlib.ExitStack() as stack:
        file: IO[str] | None = None
        try:
            folder = catalogue.cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / FILE_NAME).open("a+", encoding="utf-8"))
            _wait(file, gives_up)
        except OSError as e:
            log.debug("measured figures are not shared with other workers: %s", e)
            file = None
        yield Record(file)


def _wait(file: IO[str], gives_up: Callable[[], bool]) -> None:
    """Until the file is ours. Raises OSError if it can't be, or not in PATIENCE_SECONDS."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if gives_up():
                raise Cancelled("measuring was given up") from None
            if time.monotonic() > give_up_at:
                raise
        else:
            return
        time.sleep(_LOOK_SECONDS)


def _read(file: IO[str]) -> dict[str, tuple[Any, float]]:
    """Key to (value, when); only what may still be of use. A damaged file holds nothing."""
    now = time.time()
    known: dict[str, tuple[Any, float]] = {}
    try:
        file.seek(0)
        for key, (value, at) in json.loads(file.read(_CHARACTERS)).items():
            if 0 <= now - float(at) < _KEPT_SECONDS:
                known[key] = (value, float(at))
    except (ValueError, TypeError, AttributeError, OSError, RecursionError) as e:
        log.debug("nothing is on record: %s", e)
    return known
