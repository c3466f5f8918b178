"""The simulator against a real cluster of two stages on this machine, in turns.

    python -m bench.check_simulation [MODEL] [--rounds 3] [--write]

Real: `potluck serve` with two workers of one thread each, measured as `potluck bench-cluster` does:
1, 2 and 4 answers at once and the first token of a prompt of 512. Simulated: the same plan, fed
with seconds of steps that two other processes measure with the same spans, without the service
(bench/stage_times.py). Both threads read the same memory, which machines of a real cluster do not:
so for one answer, when one stage computes at a time, stages are timed one after the other; for
several and for the prompt, when both compute, at the same time. What a step's way costs besides is
what the product's planner takes it for. Of all rounds the least disturbed counts, on both sides:
the most tokens/s, the fewest seconds.

Besides, each round of one or several answers is simulated with the seconds that its own stages
report (`potluck status`): what is then left between the two is the simulator's and not the
machine's, and the median over the rounds counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.simulation import Arrival, Pipe, SimulatedLink, SimulatedStage, Work, simulate
from coordinator.scheduler import Limits
from potluck.cli.cluster_timing import SHORT_PROMPT_TOKENS, ClusterTiming
from potluck.cli.quantities import count
from potluck.client import Client
from potluck.plan import HAND_OVER_SECONDS
from potluck.replies import StageReport

RESULT = Path(__file__).parent / "results" / "simulation.json"
STREAMS = (1, 2, 4)
PROMPT, CHUNK, ANSWER = 512, 64, 48
STEPS = ("decode 1", "decode 2", "prompt 64")
# Loopback: half a round trip as the workers measure it, and bytes that no message here notices.
LOOPBACK = SimulatedLink(latency_seconds=0.15e-3, bytes_per_second=2e9)
ROW_BYTES = 16384
LIMITS = Limits(2, 8, 32, CHUNK, 126, 126, 8192)

Times = Mapping[tuple[str, int], list[float]]  # kind of step and stage: seconds, a round each


class StageProcess:
    """bench/stage_times.py for one span."""

    def __init__(self, model: str, span: tuple[int, int]) -> None:
        command = [sys.executable, "-m", "bench.stage_times", model, *map(str, span)]
        command += ["--seconds", "1"]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, step: str) -> None:
        """Begins; the answer comes in `heard`."""
        assert self._child.stdin is not None
        self._child.stdin.write(step + "\n")
        self._child.stdin.flush()

    def heard(self) -> str:
        """The next line. SystemExit if it has ended."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit("a process that times a stage has ended")
        return line.strip()

    def stop(self) -> None:
        """Ends it."""
        self._child.kill()
        self._child.wait()


def start_service(model: str) -> tuple[subprocess.Popen[str], str]:
    """`potluck serve` on two workers of a thread each, and its address."""
    code = "import sys, potluck.cli; sys.exit(potluck.cli.main())"
    command = [sys.executable, "-c", code, "serve", model, "--json", "--prefill-chunk", str(CHUNK)]
    command += ["--local-workers", "2", "--threads", "1", "--context", "1024"]
    environment = {**os.environ, "NO_COLOR": "1"}
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise SystemExit(f"potluck serve ended with {server.wait()}")
    return server, str(json.loads(line)["address"])


@dataclass(frozen=True, slots=True)
class Round:
    """What one round measured."""

    rates: Mapping[int, float]  # tokens/s by streams
    stages: Mapping[int, tuple[StageReport, ...]]  # right after them
    first_token_seconds: float


async def real(address: str) -> Round:
    """One round."""
    async with Client(address) as client:
        report = await client.status()
        vocab = (await client.models())[0].vocab
        timing = ClusterTiming(client, report, vocab, ANSWER)
        rates: dict[int, float] = {}
        stages: dict[int, tuple[StageReport, ...]] = {}
        for n in STREAMS:
            rates[n] = await timing.rate(n)
            stages[n] = (await client.status()).plan
        return Round(rates, stages, await timing.first_token_seconds(PROMPT))


async def spans(address: str) -> list[tuple[int, int]]:
    """Of the stages, as the service planned them."""
    async with Client(address) as client:
        return [stage.span for stage in (await client.status()).plan]


def time_stages(stages: Sequence[StageProcess], alone: Times, together: Times) -> None:
    """One round of all steps: a stage at a time, then both at the same time."""
    for i, stage in enumerate(stages):
        stage.tell(STEPS[0])
        alone[STEPS[0], i].append(float(stage.heard()))
    for step in STEPS:
        for stage in stages:
            stage.tell(step)
        for i, stage in enumerate(stages):
            together[step, i].append(float(stage.heard()))


def timed(times: Times) -> Pipe:
    """Stages that take the least of `times`, with what the planner adds to them."""

    def stage(i: int) -> SimulatedStage:
        known = {int(step.split()[1]): seconds for (step, at), seconds in times.items() if at == i}
        rows = sorted(known)
        seconds = [min(known[n]) for n in rows]

        def of(work: Work) -> float:
            computing = float(np.interp(work.rows, rows, seconds)) if work.rows else 0.0
            return computing + HAND_OVER_SECONDS

        return SimulatedStage(f"stage {i}", of)

    return Pipe((stage(0), stage(1)), (LOOPBACK,) * 3, ROW_BYTES)


def reported(stages: Sequence[StageReport]) -> Pipe:
    """Stages that take what they said, whatever the step: for streams that decode."""

    def stage(report: StageReport) -> SimulatedStage:
        seconds = report.compute_seconds + report.serialise_seconds
        return SimulatedStage(report.worker, lambda _: seconds)

    links = [SimulatedLink(stage.wire_seconds, LOOPBACK.bytes_per_second) for stage in stages]
    return Pipe(tuple(map(stage, stages)), (LOOPBACK, *links), ROW_BYTES)


def answers(pipe: Pipe, streams: int) -> float:
    """Simulated tokens/s of so many streams."""
    asked = [Arrival(SHORT_PROMPT_TOKENS, 4 * ANSWER)] * streams
    return simulate(pipe, LIMITS, asked).tokens_per_second


def compare(model: str, n_rounds: int) -> list[dict[str, object]]:
    """A row for each quantity: real and simulated, and each round."""
    server, address = start_service(model)
    stages: list[StageProcess] = []
    rounds: list[Round] = []
    alone: dict[tuple[str, int], list[float]] = defaultdict(list)
    together: dict[tuple[str, int], list[float]] = defaultdict(list)
    try:
        stages = [StageProcess(model, span) for span in asyncio.run(spans(address))]
        for stage in stages:
            assert stage.heard() == "ready"
        asyncio.run(real(address))  # warms up
        for _ in range(n_rounds):
            rounds.append(asyncio.run(real(address)))
            time_stages(stages, alone, together)
    finally:
        for stage in stages:
            stage.stop()
        server.terminate()
        server.wait()
    name = Path(model).stem if model.endswith(".gguf") else model
    rows: list[dict[str, object]] = []
    for n in STREAMS:
        rates = [done.rates[n] for done in rounds]
        of_reported = [answers(reported(done.stages[n]), n) / done.rates[n] for done in rounds]
        row = {"model": name, "what": count(n, "stream"), "measured": max(rates), "samples": rates}
        row["simulated"] = answers(timed(alone if n == 1 else together), n)
        rows.append({**row, "from_reported": statistics.median(of_reported)})
    firsts = [done.first_token_seconds for done in rounds]
    row = {"model": name, "what": f"first token of {PROMPT}", "measured": min(firsts)}
    made = simulate(timed(together), LIMITS, [Arrival(PROMPT, 1)]).first_token_seconds
    rows.append({**row, "samples": firsts, "simulated": made, "from_reported": None})
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="synthetic:1b-q4_0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into bench/results/simulation.json")
    args = parser.parse_args()
    rows = compare(args.model, args.rounds)
    for row in rows:
        print(json.dumps(row))
    if args.write:
        kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else []
        others = [row for row in kept if row["model"] != rows[0]["model"]]
        RESULT.write_text(json.dumps(others + rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
