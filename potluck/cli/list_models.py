"""List the models on this machine and those that can be pulled."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

from potluck import catalogue, synthetic
from potluck.cli import quantities, terminal

HELP = "List the models on this machine and those to pull"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck list`."""
    parser.add_argument("--json", action="store_true", help="print one JSON list")


@dataclass(frozen=True, slots=True)
class Row:
    """One model; the fields are those of --json and never change their names."""

    name: str
    is_here: bool
    size_bytes: int  # of the file, also before it is pulled
    path: str | None
    about: str


def run(args: argparse.Namespace) -> int:
    """Prints a row a model, by name."""
    rows = models()
    if args.json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    cells = (
        (
            row.name,
            quantities.size(row.size_bytes),
            "here" if row.is_here else f"potluck pull {row.name}",
            row.about or row.path or "",
        )
        for row in rows
    )
    columns = ("name", "size", "where", "what")
    terminal.print_tables([terminal.Table(columns, tuple(cells), frozenset({"size"}))])
    if delivered := catalogue.tensors_bytes():
        size = quantities.size(delivered)
        terminal.aside(f"Tensors delivered to workers here take {size} (potluck rm --tensors)")
    shapes = ", ".join(synthetic.SHAPES)
    terminal.aside(f"Random weights in true shapes need no file: {synthetic.EXAMPLE} ({shapes})")
    return 0


def models() -> list[Row]:
    """What is in the cache, and what the catalogue knows besides."""
    rows = {
        name: Row(name, is_here=False, size_bytes=known.file_bytes, path=None, about=known.about)
        for name, known in catalogue.KNOWN.items()
    }
    for found in catalogue.cached():
        about = rows[found.name].about if found.name in rows else ""
        path = str(found.path)
        rows[found.name] = Row(
            found.name, is_here=True, size_bytes=found.size_bytes, path=path, about=about
        )
    return [rows[name] for name in sorted(rows)]
