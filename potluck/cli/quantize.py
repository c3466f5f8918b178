"""Write a model again in fewer bits."""

from __future__ import annotations

import argparse
from pathlib import Path

from potluck.cli import fetching, values, writing
from potluck.gguf_source import gguf_source
from potluck.type_mix import ALIASES, CHOICES, choice_of

HELP = "Write a model again in fewer bits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck quantize`."""
    parser.add_argument("model", metavar="IN", help="a name, or the path of a GGUF file")
    parser.add_argument("out", metavar="OUT", type=Path, help="the GGUF file to write")
    parser.add_argument(
        "--type",
        required=True,
        metavar="T",
        help=f"of the weights: {', '.join((*CHOICES, *ALIASES))}. q4_k and q5_k mean q4_k_m and"
        " q5_k_m, the usual mixes. Vectors stay f32, the head gets six bits or more",
    )
    parser.add_argument("--force", action="store_true", help="write over OUT if it is there")
    parser.add_argument(
        "--threads",
        type=values.whole(1, 1024),
        default=values.from_environment("THREADS"),
        metavar="N",
        help="threads that convert (default: POTLUCK_THREADS, else all that may be used)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> int:
    """Writes OUT whole or not at all; run again after an interruption, it goes on."""
    choice = choice_of(args.type)
    source = gguf_source(fetching.bring(args.model))
    summary = writing.write(source, args.out, choice, threads=args.threads or 0, force=args.force)
    writing.print_summary(summary, source, as_json=args.json)
    return 0
