"""What people see while they wait, and tables. Waits go to stderr, so that stdout is the result.

On a terminal lines are redrawn in place, with bars and colour (rich, from the extra [server]).
Elsewhere, with NO_COLOR or TERM=dumb, or without rich, the same lines are plain text: one when its
state changes, and one every few seconds while it goes on.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from potluck.cli import quantities

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table as RichTable

PLAIN_SECONDS = 5.0  # between two plain lines about the same thing
REDRAW_SECONDS = 0.1  # of a bar that is told about every chunk
BAR_COLUMNS = 24

# Colour of a state's word; the word stays, so nobody needs the colour.
_STYLES = {
    "ready": "green",
    "serving": "green",
    "done": "green",
    "lost": "red",
    "failed": "red",
    "quarantined": "red",
    "unserved": "red",
    "restarting": "yellow",
    "draining": "yellow",
}


def is_live(stream: TextIO) -> bool:
    """Whether `stream` is a terminal on which lines may be redrawn and coloured."""
    return (
        stream.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") != "dumb"
        and importlib.util.find_spec("rich") is not None
    )


def columns(stream: TextIO) -> int:
    """Width of the terminal behind `stream`; 0 if it is none."""
    return shutil.get_terminal_size().columns if stream.isatty() else 0


def folded(start: str, text: str, width: int) -> str:
    """`start`, then `text` in lines of `width` columns (0: 100) that stand below each other."""
    return textwrap.fill(
        text,
        max(width or 100, len(start) + 20),
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
    )


def note(text: str) -> None:
    """One line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def aside(text: str) -> None:
    """A line that matters less, on stderr: dim on a terminal."""
    note(f"\x1b[2m{text}\x1b[0m" if is_live(sys.stderr) else text)


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that is waited for. `total` 0: no bar."""

    name: str
    state: str
    done: int = 0
    total: int = 0
    note: str = ""

    @property
    def share(self) -> float:
        """Part that is done, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0


class Board(Protocol):
    """Lines about things that are waited for, shown again and again until closed."""

    def show(self, lines: Sequence[Line]) -> None:
        """Shows the lines as they are now."""

    def close(self) -> None:
        """Takes a redrawn board away; plain lines stay. Twice is no error."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def board(stream: TextIO | None = None) -> Board:
    """The board that fits `stream` (stderr): redrawn, or plain."""
    out = stream or sys.stderr
    return _LiveBoard(out) if is_live(out) else _PlainBoard(out, time.monotonic)


class _PlainBoard:
    """Prints a line when its state changes, and every PLAIN_SECONDS while it goes on."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._said: dict[str, tuple[str, float, str]] = {}  # name: state, when, text

    def show(self, lines: Sequence[Line]) -> None:
        now = self._clock()
        for line in lines:
            state, when, text = self._said.get(line.name, ("", 0.0, ""))
            new = _plain(line)
            if line.state == state and (now - when < PLAIN_SECONDS or new == text):
                continue
            self._said[line.name] = (line.state, now, new)
            print(new, file=self._stream, flush=True)

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _LiveBoard:
    """Redraws all lines in place; gone when closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live: Live | None = None

    def show(self, lines: Sequence[Line]) -> None:
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, force_terminal=True)
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(_drawn(lines), refresh=True)

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _plain(line: Line) -> str:
    done = f" {line.share:.0%}" if line.total else ""
    return f"{line.name}: {line.state}{done}" + (f", {line.note}" if line.note else "")


def _drawn(lines: Sequence[Line]) -> RichTable:
    from rich.progress_bar import ProgressBar
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable.grid(padding=(0, 2, 0, 0))
    with_bar = any(line.total for line in lines)
    for line in lines:
        bar = ProgressBar(line.total, line.done, width=BAR_COLUMNS) if line.total else Text("")
        cells = [Text(line.name, style="bold"), Text(line.state, style=_STYLES.get(line.state, ""))]
        grid.add_row(*cells, *([bar] if with_bar else []), Text(line.note, overflow="ellipsis"))
    grid.columns[-1].no_wrap = True
    return grid


class Meter:
    """Turns (done, total) of one wait into a line with rate and time left. For one caller."""

    def __init__(self, name: str, state: str) -> None:
        self._name = name
        self._state = state
        self._rate = quantities.Rate()

    def line(self, done_bytes: int, total_bytes: int, now: float) -> Line:
        """ "31.2 MB of 98.3 MB, 12.1 MB/s, 0:05 left"; `now` on any clock that only rises."""
        self._rate.update(done_bytes, now)
        parts = [f"{quantities.size(done_bytes)} of {quantities.size(total_bytes)}"]
        if self._rate.per_second > 0:
            parts.append(f"{quantities.size(self._rate.per_second)}/s")
        left = self._rate.seconds_left(total_bytes)
        if left is not None and done_bytes < total_bytes:
            parts.append(f"{quantities.duration(left)} left")
        return Line(self._name, self._state, done_bytes, total_bytes, ", ".join(parts))


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under headings. Columns named in `right` are numbers and stand to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()
    title: str = ""


def print_tables(tables: Iterable[Table], stream: TextIO | None = None) -> None:
    """Tables on `stream` (stdout): drawn on a terminal, otherwise columns of plain text."""
    out = stream or sys.stdout
    for i, table in enumerate(tables):
        if i:
            print(file=out)
        if table.title:
            print(table.title, file=out)
        if is_live(out):
            _print_drawn(table, out)
        else:
            print("\n".join(plain_rows(table)), file=out)
    out.flush()


def plain_rows(table: Table) -> list[str]:
    """The table as lines: two spaces between columns, none at the end of a line."""
    widths = [
        max(len(name), *(len(row[i]) for row in table.rows)) if table.rows else len(name)
        for i, name in enumerate(table.columns)
    ]
    return [
        "  ".join(
            cell.rjust(width) if name in table.right else cell.ljust(width)
            for name, cell, width in zip(table.columns, row, widths, strict=True)
        ).rstrip()
        for row in (table.columns, *table.rows)
    ]


def _print_drawn(table: Table, out: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # two blanks between columns: eight columns fit in 80
        pad_edge=False,
        show_edge=False,
        header_style="bold",
    )
    for name in table.columns:
        drawn.add_column(name, justify="right" if name in table.right else "left")
    for row in table.rows:
        drawn.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    Console(file=out, force_terminal=True).print(drawn)
