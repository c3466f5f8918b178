"""Remove a model from this machine's cache."""

from __future__ import annotations

import argparse
import json

from potluck import catalogue
from potluck.cli import quantities, terminal

HELP = "Remove a model from this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck rm`."""
    parser.add_argument("name", metavar="NAME", help="a name that `potluck list` shows")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Deletes the model's folder in the cache; files elsewhere are never touched."""
    freed = catalogue.remove(args.name)
    if args.json:
        print(json.dumps({"name": args.name, "freed_bytes": freed}))
    else:
        terminal.note(f"removed {args.name}, {quantities.size(freed)} are free again")
    return 0
