"""Write a model again in fewer bits."""

from __future__ import annotations

import argparse
from pathlib import Path

from potluck.cli import fetching, writing
from potluck.gguf_source import gguf_source
from potluck.type_mix import choice_of

HELP = "Write a model again in fewer bits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck quantize`."""
    parser.add_argument("model", metavar="IN", help="a name, or the path of a GGUF file")
    parser.add_argument("out", metavar="OUT", type=Path, help="the GGUF file to write")
    writing.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Writes OUT whole or not at all; run again after an interruption, it goes on."""
    choice = choice_of(args.type)
    source = gguf_source(fetching.bring(args.model))
    summary = writing.write(source, args.out, choice, threads=args.threads or 0, force=args.force)
    writing.print_summary(summary, source, as_json=args.json)
    return 0
