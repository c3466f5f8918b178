"""Numbers as people read them, and a rate with the time that is left. Pure: time is an argument."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

_DECIMAL = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_BINARY = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))
RATE_WINDOW_SECONDS = 5.0  # long enough to be steady, short enough to follow a slowing link


def size(n_bytes: float) -> str:
    """Bytes of a file or a transfer, in powers of 1000: 98,300,000 is "98.3 MB"."""
    return _scaled(n_bytes, _DECIMAL)


def memory(n_bytes: float) -> str:
    """Bytes of memory, in powers of 1024: 2,147,483,648 is "2.0 GiB"."""
    return _scaled(n_bytes, _BINARY)


def duration(seconds: float) -> str:
    """Time for people: "1:03:20", "0:52", "3.4 s", "34 ms"."""
    if 0 < seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds with three figures or so: 0.00234 is "2.34"."""
    ms = seconds * 1000
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def count(n: int, thing: str) -> str:
    """ "1 worker", "3 workers", "1,024 tokens"."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def names(ids: Sequence[str]) -> str:
    """Ids with a number are joined if they follow one another: "hub, pi-1 to pi-50"."""
    runs: list[tuple[str, str]] = []
    for id in ids:
        stem, _, number = id.rpartition("-")
        before = f"{stem}-{int(number) - 1}" if stem and number.isdecimal() else None
        if runs and runs[-1][1] == before:
            runs[-1] = (runs[-1][0], id)
        else:
            runs.append((id, id))
    return ", ".join(first if first == last else f"{first} to {last}" for first, last in runs)


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    for factor, unit in units:
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


class Rate:
    """How fast a count rises, over the newest seconds. Fed by one caller."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, done: int, now: float) -> None:
        """`done` so far at `now` (seconds, any origin). A count that falls starts afresh."""
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, done))
        while now - self._seen[0][0] > RATE_WINDOW_SECONDS:
            self._seen.popleft()

    @property
    def per_second(self) -> float:
        """0 until two different times have been seen."""
        if len(self._seen) < 2:
            return 0.0
        (start, first), (stop, last) = self._seen[0], self._seen[-1]
        return (last - first) / (stop - start) if stop > start else 0.0

    def seconds_left(self, total: int) -> float | None:
        """Time to reach `total` at this rate; None while there is no rate."""
        if not self._seen or self.per_second <= 0:
            return None
        return max(0, total - self._seen[-1][1]) / self.per_second
