"""A model that a command needs: on this machine already, or pulled now behind a bar."""

from __future__ import annotations

import time
from pathlib import Path

from potluck import catalogue, gguf
from potluck.cli import quantities, terminal
from potluck.download import Progress
from potluck.errors import UnknownModel
from potluck.gguf import GgufFile


def bring(model: str) -> GgufFile:
    """The header of `model`, a path or a name; a name of the catalogue is pulled if need be.

    Raises what open_model and pull raise.
    """
    try:
        return catalogue.open_model(model)
    except UnknownModel:
        if model not in catalogue.names():
            raise
    return gguf.read(pull(model))


def pull(name: str) -> Path:
    """Pulls `name` behind a bar."""
    started = time.monotonic()
    with terminal.board() as board:
        bar = _Bar(name, board)
        path = catalogue.pull(name, bar.show)
    took = quantities.duration(time.monotonic() - started)
    terminal.note(f"pulled {name} ({quantities.size(path.stat().st_size)}) in {took}")
    return path


class _Bar:
    """Progress of one pull on a board; not more often than eyes can see."""

    def __init__(self, name: str, board: terminal.Board) -> None:
        self._name = name
        self._board = board
        self._activity = ""
        self._meter = terminal.Meter(name, "")
        self._shown = 0.0

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.what != self._activity:
            self._activity = progress.what
            self._meter = terminal.Meter(self._name, progress.what)
        elif (
            now - self._shown < terminal.REDRAW_SECONDS
            and progress.done_bytes < progress.total_bytes
        ):
            return
        self._shown = now
        if progress.total_bytes:
            self._board.show([self._meter.line(progress.done_bytes, progress.total_bytes, now)])
        else:
            self._board.show([terminal.Line(self._name, progress.what)])
