"""One table of somebody's file: keys taken one by one, each checked, none left over.

Pure. Every error is a UsageError of one line with the file, the table, the key, what was found and
what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from potluck.errors import UsageError
from potluck.near_words import nearest
from potluck.written_size import bytes_of


class CheckedTable:
    """A table while it is read. `name` says which one it is: '[[worker]] 2 "hub"'."""

    def __init__(self, source: str, name: str, values: Mapping[str, object]) -> None:
        self.source = source
        self.name = name
        self._values = values
        self._known: dict[str, None] = {}  # asked for, in that order

    @property
    def where(self) -> str:
        """File and table, for errors."""
        return f"{self.source}: {self.name}" if self.name else self.source

    def error(self, key: str, wrong: str, *, remedy: str = "") -> UsageError:
        """The error to raise about `key`."""
        return UsageError(f"{self.where}: {key}: {wrong}", remedy=remedy)

    def has(self, key: str) -> bool:
        """Whether the key is there; from now on it is a known one."""
        self._known[key] = None
        return key in self._values

    def end(self) -> None:
        """Raises for a key that nobody asked for."""
        for key in self._values:
            if key not in self._known:
                hint = nearest(key, self._known)
                raise self.error(
                    key, f"unknown key{hint}", remedy=f"known keys: {', '.join(self._known)}"
                )

    def text(self, key: str, default: str = "") -> str:
        """A text."""
        if not self.has(key):
            return default
        value = self._values[key]
        if not isinstance(value, str):
            raise self._wrong(key, 'a text in quotes, such as "hub"')
        return value

    def flag(self, key: str) -> bool:
        """True or false; false if it is not there."""
        if not self.has(key):
            return False
        value = self._values[key]
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def whole(self, key: str, default: int, *, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        return self._whole(key, self._values[key], low, high) if self.has(key) else default

    def number(self, key: str, default: float = 0.0, *, zero: bool = False) -> float:
        """A finite number above 0, or from 0 on."""
        if not self.has(key):
            return default
        wanted = "a number, 0 or more" if zero else "a number above 0"
        return self._number(key, self._values[key], wanted, zero=zero)

    def size(self, key: str) -> int:
        """Bytes: a whole number or a text such as "12 GiB"; 0 if it is not there."""
        if not self.has(key):
            return 0
        value = self._values[key]
        try:
            n_bytes = bytes_of(value) if isinstance(value, str) else value
        except ValueError as wrong:
            raise self.error(key, str(wrong)) from None
        if isinstance(n_bytes, bool) or not isinstance(n_bytes, int) or not 0 < n_bytes < 2**62:
            raise self._wrong(key, 'bytes, or a size in quotes such as "12 GiB"')
        return n_bytes

    def layers(self, key: str) -> tuple[int, int] | None:
        """Least and most: two numbers, or the most alone. None if it is not there."""
        if not self.has(key):
            return None
        value = self._values[key]
        if isinstance(value, list) and len(value) == 2:
            least, most = (self._whole(key, part, 0, 10**6) for part in value)
        else:
            least, most = 0, self._whole(key, value, 0, 10**6)
        if least > most:
            raise self.error(key, f"at least {least} and at most {most}: none fits")
        return least, most

    def by_rows(self, key: str) -> dict[int, float]:
        """Numbers above 0 by numbers of rows, in their order; empty if it is not there."""
        if not self.has(key):
            return {}
        value = self._values[key]
        if not isinstance(value, dict) or not value:
            raise self._wrong(key, "{ 1 = 9.1, 8 = 14.0 }: milliseconds by rows")
        found: dict[int, float] = {}
        for rows, ms in value.items():
            if not (rows.isascii() and rows.isdigit() and 0 < int(rows) <= 4096):
                raise self.error(key, f"{rows!r} is no number of rows (1 to 4096)")
            found[int(rows)] = self._number(f"{key}.{rows}", ms, "a number above 0", zero=False)
        return dict(sorted(found.items()))

    def pair(self, key: str) -> tuple[str, str] | None:
        """Two texts; None if it is not there."""
        if not self.has(key):
            return None
        value = self._values[key]
        if isinstance(value, list) and len(value) == 2:
            first, second = value
            if isinstance(first, str) and isinstance(second, str):
                return first, second
        raise self._wrong(key, 'two ids, such as ["laptop-a", "hub"]')

    def table(self, key: str) -> CheckedTable:
        """The table below `key`; an empty one if it is not there."""
        value = self._values[key] if self.has(key) else {}
        if not isinstance(value, dict):
            raise self._wrong(key, f"a table: write [{key}] on a line of its own")
        return CheckedTable(self.source, f"[{key}]", value)

    def tables(self, key: str) -> list[CheckedTable]:
        """The tables of [[key]], numbered from 1 and with their id if they have one."""
        value = self._values[key] if self.has(key) else []
        if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            raise self._wrong(key, f"tables: write [[{key}]] on a line of its own above each")
        found = []
        for i, part in enumerate(value):
            id = f" {part['id']!r}" if isinstance(part.get("id"), str) else ""
            found.append(CheckedTable(self.source, f"[[{key}]] {i + 1}{id}", part))
        return found

    def _wrong(self, key: str, wanted: str) -> UsageError:
        return self.error(key, f"expected {wanted}; found {_shown(self._values[key])}")

    def _whole(self, key: str, value: object, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            wanted = f"a whole number from {low} to {high}"
            raise self.error(key, f"expected {wanted}; found {_shown(value)}")
        return value

    def _number(self, key: str, value: object, wanted: str, *, zero: bool) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not _fits(float(value), zero=zero):  # type: ignore[arg-type]  # is_number
            raise self.error(key, f"expected {wanted}; found {_shown(value)}")
        assert isinstance(value, int | float)
        return float(value)


def _fits(value: float, *, zero: bool) -> bool:
    return math.isfinite(value) and (value > 0 or (zero and value == 0))


def _shown(value: object) -> str:
    """A value of a file as its file writes it, or so."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list" if len(value) != 2 else f"{value!r}"[:60]
    return f"{value!r}"[:60]
