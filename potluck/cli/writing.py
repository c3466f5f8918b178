"""A model file that is being written: what is said before, a bar, and what is said at the end."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path

from potluck.cli import quantities, terminal, values
from potluck.model_writer import Progress, Start, Summary, write_model
from potluck.part_file import GO_ON
from potluck.tensor_source import ModelSource
from potluck.type_mix import ALIASES, CHOICES, TypeChoice


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that writes a model; they follow its arguments."""
    parser.add_argument(
        "--type",
        required=True,
        metavar="T",
        help=f"of the weights: {', '.join((*CHOICES, *ALIASES))}. q4_k and q5_k mean q4_k_m and"
        " q5_k_m, the usual mixes. Vectors stay f32, the head gets six bits or more",
    )
    parser.add_argument("--force", action="store_true", help="write over the file if it is there")
    parser.add_argument(
        "--threads",
        type=values.whole(1, 1024),
        default=values.from_environment("THREADS"),
        metavar="N",
        help="threads that convert (default: POTLUCK_THREADS, else all that may be used)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def write(
    source: ModelSource, out: Path, choice: TypeChoice, *, threads: int, force: bool
) -> Summary:
    """Writes `source` behind a bar; notes and the room that it takes come first, on stderr.

    threads 0: as many as this process may use. Raises what write_model raises.
    """
    for note in source.notes:
        terminal.note(f"note: {note}")
    try:
        with terminal.board() as board:
            bar = _Bar(out.name, board)
            return write_model(
                source,
                out,
                choice,
                threads=threads,
                force=force,
                on_start=lambda start: _say_start(start, choice),
                on_progress=bar.show,
            )
    except KeyboardInterrupt:
        terminal.note(f"stopped; {GO_ON}")
        raise


def print_summary(summary: Summary, source: ModelSource, *, as_json: bool) -> None:
    """What was written, on stdout; for people with the next command to type."""
    has_chat_template = any(key == "tokenizer.chat_template" for key, _ in source.metadata)
    if as_json:
        found = {
            "path": str(summary.path),
            "size_bytes": summary.size_bytes,
            "n_tensors": summary.n_tensors,
            "types": summary.types,
            "resumed_bytes": summary.resumed_bytes,
            "seconds": round(summary.seconds, 3),
            "has_chat_template": has_chat_template,
            "notes": list(source.notes),
        }
        print(json.dumps(found))
        return
    types = ", ".join(f"{name} {quantities.size(n)}" for name, n in summary.types.items())
    new_bytes = summary.size_bytes - summary.resumed_bytes
    rate = quantities.size(new_bytes / max(summary.seconds, 1e-9))
    print(f"file   {summary.path} ({quantities.size(summary.size_bytes)})")
    print(f"types  {types}, in {quantities.count(summary.n_tensors, 'tensor')}")
    print(f"time   {quantities.duration(summary.seconds)} ({rate}/s)")
    if not has_chat_template:
        print("chat   no template in it; if it was tuned for chats, serve it with --chat-template")
    print(f"next   potluck serve {shlex.quote(str(summary.path))}")


def _say_start(start: Start, choice: TypeChoice) -> None:
    """What is about to happen, before the first byte is written."""
    size, free = quantities.size(start.size_bytes), quantities.size(start.free_bytes)
    terminal.note(f"{start.path} will take {size} as {choice.name}; the disk has {free} free")
    if start.resumed_bytes:
        terminal.note(f"going on after the {quantities.size(start.resumed_bytes)} that are there")
    if start.discarded:
        terminal.note("an unfinished file of something else was there and is begun afresh")
    if start.requantized:
        lossy = ", ".join(start.requantized)
        terminal.note(
            f"note: {lossy} has lost precision before and loses more now; from F16 it would be less"
        )


class _Bar:
    """Progress of one writing on a board; not more often than eyes can see."""

    def __init__(self, name: str, board: terminal.Board) -> None:
        self._board = board
        self._meter = terminal.Meter(name, "writing")
        self._shown = 0.0

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if (
            now - self._shown < terminal.REDRAW_SECONDS
            and progress.done_bytes < progress.total_bytes
        ):
            return
        self._shown = now
        self._board.show([self._meter.line(progress.done_bytes, progress.total_bytes, now)])
