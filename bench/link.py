"""What a stage boundary costs: real clusters of 1 to N workers here, one session, greedy.

Clusters of all sizes run at once and take turns, so that the machine's drift hits all alike.
Printed per size: milliseconds a token; per stage the medians of compute, serialise, wire and wait;
and what one more link adds, once as the sum of the stage's own figures and once as the difference
of whole token times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from potluck import catalogue
from potluck.client import Client
from potluck.replies import AnswerOptions, Done, ServiceReport

BIN = Path(sys.executable).parent


def start(model: Path, workers: int, threads: int) -> tuple[subprocess.Popen[str], str]:
    """A cluster of `workers` under one `potluck serve`, and its address."""
    command = [
        *(str(BIN / "potluck"), "serve", str(model), "--json"),
        *("--local-workers", str(workers), "--threads", str(threads), "--context", "1024"),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{' '.join(command)} ended with {process.wait()}")
    return process, str(json.loads(line)["address"])


async def token_seconds(address: str, tokens: int) -> float:
    """Mean seconds of a decoded token of one answer."""
    options = AnswerOptions(max_tokens=tokens, temperature=0.0, ignore_end=True)
    async with Client(address) as client:
        async for event in client.generate("Once upon a time", options):
            if isinstance(event, Done):
                return event.decode_seconds / (event.answer_tokens - 1)
    raise SystemExit(f"{address} gave no answer")


async def report(address: str) -> ServiceReport:
    """The service's status, with its medians per stage."""
    async with Client(address) as client:
        return await client.status()


def measure(args: argparse.Namespace) -> dict[str, object]:
    """All figures, as --json prints them; seconds."""
    model = catalogue.open_model(args.model).path
    clusters = [start(model, n, args.threads) for n in range(1, args.workers + 1)]
    try:
        seconds: list[list[float]] = [[] for _ in clusters]
        for round_number in range(args.rounds + 1):
            for i, (_, address) in enumerate(clusters):
                one = asyncio.run(token_seconds(address, args.tokens))
                if round_number:  # the first round warms up
                    seconds[i].append(one)
        reports = [asyncio.run(report(address)) for _, address in clusters]
    finally:
        for process, _ in clusters:
            process.terminate()
            process.wait()
    medians = [statistics.median(s) for s in seconds]
    return {
        "model": model.stem,
        "threads": args.threads,
        "rounds": args.rounds,
        "clusters": [
            {
                "workers": n + 1,
                "token_seconds": medians[n],
                "stages": [
                    {
                        "worker": s.worker,
                        "compute_seconds": s.compute_seconds,
                        "serialise_seconds": s.serialise_seconds,
                        "wire_seconds": s.wire_seconds,
                        "wait_seconds": s.wait_seconds,
                    }
                    for s in reports[n].plan
                ],
            }
            for n in range(len(clusters))
        ],
        "link_seconds": statistics.median(
            s.serialise_seconds + s.wire_seconds + s.wait_seconds for s in reports[-1].plan[:-1]
        ),
        "added_seconds_a_link": statistics.median(
            (many - one) / (args.workers - 1)
            for one, many in zip(seconds[0], seconds[-1], strict=True)
        ),
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.workers < 2:
        parser.error("--workers: 2 or more, or there is no link to measure")
    figures = measure(args)
    if args.json:
        print(json.dumps(figures, indent=2))
        return 0
    clusters = figures["clusters"]
    assert isinstance(clusters, list)
    for cluster in clusters:
        print(f"{cluster['workers']} workers: {cluster['token_seconds'] * 1e3:.3f} ms a token")
        for stage in cluster["stages"]:
            parts = ("compute", "serialise", "wire", "wait")
            print(
                f"  {stage['worker']}: "
                + ", ".join(f"{p} {stage[f'{p}_seconds'] * 1e3:.3f} ms" for p in parts)
            )
    print(f"one link by its own figures: {float(str(figures['link_seconds'])) * 1e3:.3f} ms")
    added = float(str(figures["added_seconds_a_link"]))
    print(f"one more link in the token time: {added * 1e3:.3f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
