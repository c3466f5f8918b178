"""A first look: three workers on this machine, a real model, an answer, a table of the stages."""

from __future__ import annotations

import argparse
import asyncio
import sys

from potluck.cli import fetching, quantities, streaming, terminal, values
from potluck.cli.cluster import ClusterSettings, LocalCluster
from potluck.replies import AnswerOptions, Done, Message, ServiceReport

HELP = "Three workers on this machine, a real model, an answer"
MODEL = "smollm2"
PROMPT = "What is a potluck, and why do people like it? Answer in three sentences."
CONTEXT_TOKENS = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck demo`."""
    parser.add_argument(
        "--workers", type=values.whole(1, 16), default=3, metavar="N", help="how many (default 3)"
    )
    parser.add_argument(
        "--prompt", type=values.plain, default=PROMPT, metavar="TEXT", help="the question"
    )
    parser.add_argument(
        "--max-tokens", type=values.whole(1), default=160, metavar="N", help="(default 160)"
    )


def run(args: argparse.Namespace) -> int:
    """Pulls, starts, asks, shows, stops."""
    fetching.bring(MODEL)
    settings = ClusterSettings(
        MODEL,
        args.workers,
        args.workers,
        ("--grpc-port", "0", "--fleet-port", "0", "--context", str(CONTEXT_TOKENS), "--use", "all"),
    )
    try:
        return asyncio.run(_show(settings, args.prompt, args.max_tokens))
    except asyncio.CancelledError:  # a second signal while it stopped
        return 130


async def _show(settings: ClusterSettings, prompt: str, max_tokens: int) -> int:
    from potluck.client import Client

    cluster = LocalCluster(settings)
    async with cluster.stopped_in_the_end() as signals:
        await cluster.start()
        async with Client(cluster.address) as client:
            await cluster.until_serving(client)
            terminal.note(
                f"{settings.model} on {quantities.count(settings.workers, 'worker')}, "
                f"each with its own layers:\n"
            )
            print(f"> {prompt}\n", flush=True)
            answer = streaming.Answer()
            options = AnswerOptions(temperature=0.0, max_tokens=max_tokens)
            events = client.chat([Message("user", prompt)], options)
            await streaming.stream(events, answer, wrapped=True)
            assert answer.done is not None  # a stream ends with Done or raises
            _print_stages(await client.status(), answer.done)
    return 130 if signals.received else 0


def _print_stages(report: ServiceReport, done: Done) -> None:
    columns = ("worker", "layers", "memory", "compute ms", "serialise ms", "wire ms", "wait ms")
    rows = tuple(
        (
            s.worker,
            f"{s.span[0]}-{s.span[1] - 1}",
            quantities.memory(s.memory_bytes),
            quantities.milliseconds(s.compute_seconds),
            quantities.milliseconds(s.serialise_seconds),
            quantities.milliseconds(s.wire_seconds),
            quantities.milliseconds(s.wait_seconds),
        )
        for s in report.plan
    )
    print(flush=True)
    terminal.print_tables([terminal.Table(columns, rows, frozenset(columns[2:]))], sys.stdout)
    print(f"\n{streaming.speed(done)}; prompt {done.prompt_tokens_per_second:.0f} tokens/s")
    print("Next: potluck serve smollm2 --local-workers 2, then potluck chat")
