"""LLaMA-65B's true shape, all 80 layers, on four workers of which none has room for its part.

Each worker lives in a control group with a bound on memory, as a machine of that size would, keeps
its layers as packs on the disk and reads those that do not fit in every step. A few tokens are
asked for, then everything is stopped, started again and asked the same: ids and log-probabilities
must be equal, and the second start packs nothing. Random weights (`synthetic:65b-q4_0`): no file is
needed, but 37 GB of disk for the packs, which stay unless --remove is given. Needs root (control
groups). Ends with 1 if the answers differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from potluck.cli import quantities, terminal, values
from potluck.client import Client
from potluck.replies import AnswerOptions, Done, Piece, Token
from potluck.testing.machines import CannotMake, Kind, Machine, machines

PROMPT = "Everyone brings a dish, and"
START_SECONDS = 1800.0
LOOK_SECONDS = 0.5


@dataclass
class Run:
    """One start of the whole cluster and one answer."""

    start_seconds: float = 0.0  # from nothing to serving
    first_seconds: float = 0.0  # to the first token
    decode_seconds: float = 0.0  # from there to the last
    tokens: list[Token] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)  # of each stage
    peak_bytes: list[int] = field(default_factory=list)  # of each worker's group
    read_bytes: list[int] = field(default_factory=list)  # from the disk, each worker, while asked

    @property
    def answer(self) -> list[tuple[int, str]]:
        """Ids and the bits of the log-probabilities."""
        return [(token.id, (token.logprob or 0.0).hex()) for token in self.tokens]

    def report(self) -> dict[str, object]:
        """For --json."""
        n = len(self.tokens)
        return {
            "start_seconds": round(self.start_seconds, 1),
            "first_token_seconds": round(self.first_seconds, 2),
            "seconds_a_token": round(self.decode_seconds / max(1, n - 1), 2),
            "token_ids": [token.id for token in self.tokens],
            "layers": self.layers,
            "peak_memory_bytes": self.peak_bytes,
            "disk_read_bytes": self.read_bytes,
        }


def main() -> int:
    """Runs, compares, reports."""
    args = _arguments()
    kinds = [Kind(f"w{i + 1}", memory_bytes=args.memory_each) for i in range(args.workers)]
    runs = []
    try:
        for number in range(args.runs):
            terminal.note(f"run {number + 1} of {args.runs}: starting {args.workers} workers")
            with (
                args.log.open("a", encoding="utf-8") as log,
                _coordinator(args, log) as address,
                machines(kinds, networked=False) as made,
            ):
                runs.append(asyncio.run(_run(args, made, address, log)))
            if not args.json:
                _show(runs[-1])
    except CannotMake as e:
        print(f"whole_65b: {e}", file=sys.stderr)
        return 1
    equal = all(run.answer == runs[0].answer for run in runs)
    if args.json:
        print(json.dumps({"equal": equal, "runs": [run.report() for run in runs]}))
    else:
        print("same tokens and log-probabilities in all runs" if equal else "ANSWERS DIFFER")
    if args.remove:
        subprocess.run(["potluck", "rm", args.model], check=True)
    return 0 if equal else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="synthetic:65b-q4_0")
    parser.add_argument("--workers", type=values.whole(1, 64), default=4)
    parser.add_argument(
        "--memory-each",
        type=values.size_bytes,
        default=5 * 2**30,
        help="of each worker's control group (default: 5 GiB)",
    )
    parser.add_argument("--offer", default="11 GiB", help="--memory of each worker: layers on disk")
    parser.add_argument("--tokens", type=values.whole(2), default=8)
    parser.add_argument("--runs", type=values.whole(1), default=2)
    parser.add_argument("--remove", action="store_true", help="remove the packs in the end")
    parser.add_argument(
        "--log", type=Path, default=Path("whole_65b.log"), help="what the programs say"
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


async def _run(args: argparse.Namespace, made: list[Machine], address: str, log: IO[str]) -> Run:
    run = Run()
    started = time.monotonic()
    async with Client(address) as client:
        pids = [_worker(machine, address, args.offer, log) for machine in made]
        await _serving(client, started)
        run.start_seconds = time.monotonic() - started
        report = await client.status()
        run.layers = [f"{stage.worker} [{stage.span[0]}, {stage.span[1]})" for stage in report.plan]
        before = [_read_bytes(pid) for pid in pids]
        options = AnswerOptions(max_tokens=args.tokens, temperature=0, logprobs=0, ignore_end=True)
        asked = time.monotonic()
        async for event in client.generate(PROMPT, options):
            if isinstance(event, Piece):
                if event.tokens and not run.tokens:
                    run.first_seconds = time.monotonic() - asked
                run.tokens += event.tokens
            elif isinstance(event, Done):
                run.decode_seconds = event.decode_seconds
        run.read_bytes = [_read_bytes(pid) - b for pid, b in zip(pids, before, strict=True)]
        run.peak_bytes = [machine.peak_memory_bytes() for machine in made]
    return run


@contextmanager
def _coordinator(args: argparse.Namespace, log: IO[str]) -> Iterator[str]:
    """A coordinator that waits for the workers; its public address."""
    command = ["potluck-coordinator", args.model, "--workers", str(args.workers), "--use", "all"]
    command += ["--context", "512", "--max-sessions", "1", "--grpc-port", "0", "--fleet-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        try:
            assert process.stdout is not None, "it is a pipe"
            yield str(json.loads(process.stdout.readline())["grpc"])
        finally:
            process.terminate()


def _worker(machine: Machine, coordinator: str, offer: str, log: IO[str]) -> int:
    """Starts one on a machine; its process id."""
    return machine.run(
        *("potluck-worker", "--coordinator", coordinator, "--name", machine.kind.name),
        *("--port", "0", "--weights", "mmap", "--memory", offer, "--log-level", "warning"),
        stdout=subprocess.DEVNULL,
        stderr=log,
    ).pid


async def _serving(client: Client, started: float) -> None:
    """Returns when the service serves, and shows what it does until then."""
    with terminal.board() as board:
        while not (report := await client.status()).is_serving:
            done = sum(worker.load_done_bytes for worker in report.workers)
            total = sum(worker.load_total_bytes for worker in report.workers)
            now = time.monotonic() - started
            note = f"{quantities.size(done)} of {quantities.size(total)}, {now:.0f} s"
            board.show([terminal.Line("service", report.state, note=note)])
            if now > START_SECONDS:
                raise TimeoutError(f"{report.state} after {now:.0f} s: {report.detail}")
            await asyncio.sleep(LOOK_SECONDS)


def _read_bytes(pid: int) -> int:
    """That a process has had read from the disk."""
    for line in Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == "read_bytes":
            return int(value)
    return 0


def _show(run: Run) -> None:
    n = len(run.tokens)
    read = sum(run.read_bytes)
    print(f"stages {', '.join(run.layers)}; serving after {run.start_seconds:.0f} s")
    print(
        f"first token after {run.first_seconds:.1f} s, then"
        f" {run.decode_seconds / max(1, n - 1):.2f} s a token;"
        f" {quantities.size(read)} read from the disk, at most"
        f" {quantities.size(max(run.peak_bytes, default=0))} of memory a worker"
    )
    print(f"ids {[token.id for token in run.tokens]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
