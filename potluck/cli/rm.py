"""Remove a model, or what workers were sent of models, from this machine's cache."""

from __future__ import annotations

import argparse
import json

from potluck import catalogue
from potluck.cli import quantities, terminal
from potluck.errors import UsageError

HELP = "Remove a model from this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck rm`."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="a name that `potluck list` shows")
    parser.add_argument(
        "--tensors",
        action="store_true",
        help="remove what was delivered to workers here; what they need is delivered again",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Deletes the model's folder in the cache; files elsewhere are never touched."""
    if (args.name is None) != args.tensors:
        raise UsageError("name one model, or --tensors", remedy="see `potluck list`")
    if args.tensors:
        return _remove_tensors(as_json=args.json)
    freed = catalogue.remove(args.name)
    if args.json:
        print(json.dumps({"name": args.name, "freed_bytes": freed}))
    else:
        terminal.note(f"removed {args.name}, {quantities.size(freed)} are free again")
    return 0


def _remove_tensors(*, as_json: bool) -> int:
    freed, left = catalogue.remove_tensors()
    if as_json:
        print(json.dumps({"freed_bytes": freed, "left_bytes": left}))
        return 0
    used = f"; {quantities.size(left)} are in use and stay" if left else ""
    terminal.note(f"removed delivered tensors, {quantities.size(freed)} are free again{used}")
    return 0
