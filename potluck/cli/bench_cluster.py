"""Measure a running service: one stream, several at once, the first token, stages and links."""

from __future__ import annotations

import argparse
import asyncio
import json

from potluck.cli import asking, cluster_figures, running, terminal, values
from potluck.cli.cluster_figures import ClusterFigures

HELP = "Measure a running service: streams at once, stages, links"
_MOST_TOKENS = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck bench-cluster`."""
    parser.epilog = (
        "With N stages it measures 1, N and 2N answers at once, each of a short prompt of its own,"
        " and the time to the first token of a long one; nothing else should use the service."
    )
    asking.add_connect(parser)
    for name, low, most, default, text in (
        ("prompt-tokens", 1, _MOST_TOKENS, 512, "of the prompt whose first token is timed"),
        ("max-tokens", 8, _MOST_TOKENS, 64, "of each answer"),
        ("rounds", 1, 1000, 3, "of everything in turns; the medians count"),
    ):
        kind = values.whole(low, most)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} ({default})")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    address = running.address_of(args.connect)
    figures = asyncio.run(_measured(address, args.prompt_tokens, args.max_tokens, args.rounds))
    for note in figures.notes:
        terminal.note(f"note: {note}")
    if args.json:
        print(json.dumps(cluster_figures.json_of(figures)))
        return 0
    print(cluster_figures.summary(figures, address))
    terminal.print_tables(cluster_figures.tables(figures))
    return 0


async def _measured(
    address: str, prompt_tokens: int, max_tokens: int, rounds: int
) -> ClusterFigures:
    from potluck.cli import cluster_timing
    from potluck.client import Client

    with terminal.board() as board:

        def said(state: str, done: int, total: int) -> None:
            board.show([terminal.Line("measuring", state, done, total)])

        async with Client(address) as client:
            return await cluster_timing.measure(client, prompt_tokens, max_tokens, rounds, said)
