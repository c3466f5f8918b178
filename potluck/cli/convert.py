"""Make a GGUF file of Meta's checkpoints, of a Hugging Face folder or of another GGUF."""

from __future__ import annotations

import argparse
from pathlib import Path

from potluck.cli import values, writing
from potluck.convert import open_source
from potluck.type_mix import choice_of

HELP = "Make a model file of Meta's or Hugging Face's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck convert`."""
    parser.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="a folder of Meta's (params.json, consolidated.00.pth) or Hugging Face's (config.json,"
        " model.safetensors), a file of such a folder, or a GGUF file",
    )
    parser.add_argument("out", metavar="OUT.gguf", type=Path, help="the file to write")
    parser.add_argument("--lora", type=Path, metavar="DIR", help="an adapter to be merged in")
    parser.add_argument("--name", type=values.plain, help="what the model is called in its file")
    parser.add_argument(
        "--context",
        type=values.whole(1, 2**24),
        metavar="N",
        help="tokens that the model can read, where its files do not say it or say it wrongly",
    )
    writing.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Writes OUT.gguf whole or not at all; run again after an interruption, it goes on."""
    choice = choice_of(args.type)
    source = open_source(args.source, lora=args.lora, context_tokens=args.context, name=args.name)
    summary = writing.write(source, args.out, choice, threads=args.threads or 0, force=args.force)
    writing.print_summary(summary, source, as_json=args.json)
    return 0
