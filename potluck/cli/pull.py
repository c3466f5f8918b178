"""Bring a model of the catalogue to this machine."""

from __future__ import annotations

import argparse
import json

from potluck.cli import fetching

HELP = "Bring a model to this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck pull`."""
    parser.add_argument("name", metavar="NAME", help="a name that `potluck list` shows")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the path of the model's file, which is whole and checked."""
    path = fetching.pull(args.name)
    if args.json:
        size_bytes = path.stat().st_size
        print(json.dumps({"name": args.name, "path": str(path), "size_bytes": size_bytes}))
    else:
        print(path)
    return 0
