"""Show the tokens of a text."""

from __future__ import annotations

import argparse
import json
import sys

from potluck import catalogue
from potluck.errors import UsageError

HELP = "Show the tokens of a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck tokenize`."""
    parser.add_argument("model", metavar="MODEL", help="a name, or a GGUF with any vocabulary")
    parser.add_argument("text", metavar="TEXT", help="the text; -: read from stdin")
    parser.add_argument("--no-bos", action="store_true", help="leave out the model's start token")
    parser.add_argument("--json", action="store_true", help='print {"tokens": [...]}')


def run(args: argparse.Namespace) -> int:
    """Prints the ids. The text is plain: what spells a special token is cut like any other."""
    from potluck import tokenizer  # brings libraries that other commands do without

    file = catalogue.open_model(args.model)
    text = _text(args.text)
    ids = tokenizer.load(file).encode(text, add_start=not args.no_bos)
    print(json.dumps({"tokens": ids}) if args.json else " ".join(map(str, ids)))
    return 0


def _text(given: str) -> str:
    """The text, from stdin for "-". Raises UsageError if it is not UTF-8."""
    data = sys.stdin.buffer.read() if given == "-" else given.encode("utf-8", "surrogateescape")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the text is not UTF-8: byte {error.start} is no text") from error
