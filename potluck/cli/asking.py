"""Options of the commands that ask a service: where it is, and how the answer is made."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from potluck.cli import values
from potluck.errors import UsageError
from potluck.replies import AnswerOptions

MAX_STOPS = 8

# Field of AnswerOptions: how its text is parsed, and what help says. `chat` sets the same by name.
NUMBERS: dict[str, tuple[Callable[[str], float], str]] = {
    "max_tokens": (values.whole(0, 2**31 - 1), "end after N tokens; 0: at the end of the context"),
    "temperature": (
        values.number(0, 2),
        "0: always the most likely token (default: 0.8)",
    ),
    "top_k": (values.whole(0, 2**31 - 1), "only the K most likely tokens; 0: all (default: 40)"),
    "top_p": (
        values.number(0, 1, above=True),
        "only the most likely that sum to P; 1: all (default: 0.95)",
    ),
    "min_p": (values.number(0, 1), "only those P times as likely as the best (default: 0.05)"),
    "repetition_penalty": (
        values.number(0.1, 10),
        "above 1: less of what was in prompt and answer",
    ),
    "presence_penalty": (values.number(-2, 2), "above 0: less of what was in the answer"),
    "frequency_penalty": (values.number(-2, 2), "the same for each time it was there"),
    "seed": (values.whole(0, 2**63 - 1), "makes a sampled answer repeatable"),
}
_METAVARS = {"max_tokens": "N", "top_k": "K", "top_p": "P", "min_p": "P", "seed": "N"}


def add_connect(parser: argparse.ArgumentParser) -> None:
    """--connect."""
    parser.add_argument(
        "--connect",
        metavar="HOST:PORT",
        help="the coordinator (default: POTLUCK_CONNECT, else the cluster of this machine)",
    )


def add_answer_options(parser: argparse.ArgumentParser, *, usual_tokens: str) -> None:
    """What people set of AnswerOptions; `usual_tokens` says what no --max-tokens means."""
    group = parser.add_argument_group("the answer")
    for name, (parse, text) in NUMBERS.items():
        group.add_argument(
            option_of(name),
            type=parse,
            metavar=_METAVARS.get(name, "X"),
            help=text + (f" (default: {usual_tokens})" if name == "max_tokens" else ""),
        )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        type=values.stop_text,
        metavar="TEXT",
        help="end before this text; may be given up to 8 times",
    )
    group.add_argument("--model", default="", metavar="NAME", help="ask for this model only")


def answer_options(args: argparse.Namespace) -> AnswerOptions:
    """What the options say. UsageError: too many --stop."""
    if len(args.stop) > MAX_STOPS:
        raise UsageError(f"--stop: at most {MAX_STOPS} times, not {len(args.stop)}")
    given = {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    return AnswerOptions(
        **given, model=args.model, stop=tuple(args.stop), logprobs=getattr(args, "logprobs", None)
    )


def option_of(name: str) -> str:
    """max_tokens is --max-tokens."""
    return "--" + name.replace("_", "-")
