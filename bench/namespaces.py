"""Five unlike machines in network namespaces: is the plan as fast as predicted, and faster than
splitting evenly or by memory?

Each machine has its own bound on memory, its share of the CPU and its cable (tbf). The same model
is served by the planner's plan, by an equal split and by one in proportion to memory, taking turns;
one stream is timed. Reported: the median over the rounds of tokens/s of each, the planner's
prediction over what was measured, and the plan's speed over the others'. Needs root and Linux
(potluck/testing/machines.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from potluck import catalogue
from potluck.cli import terminal, values
from potluck.model import config_of
from potluck.testing.machines import CannotMake, Kind, Machine, machines

GIB = 2**30
# A household: the coordinator's machine, then five workers.
COORDINATOR = Kind("coordinator")
HOUSEHOLD = (
    Kind("desktop", memory_bytes=int(2.2 * GIB), cpus=2.0, mbit_per_second=1000),
    Kind("laptop", memory_bytes=int(1.7 * GIB), cpus=1.0, mbit_per_second=300),
    Kind("minipc", memory_bytes=int(1.5 * GIB), cpus=0.8, mbit_per_second=1000),
    Kind("old-laptop", memory_bytes=int(1.4 * GIB), cpus=0.5, mbit_per_second=100),
    Kind("pi", memory_bytes=int(1.3 * GIB), cpus=0.3, mbit_per_second=100),
)
OWN_BYTES = 300 * 10**6  # of a worker, besides layers: what memory is proportional without
SERVING_SECONDS = 300.0
PROMPT = "Everyone brings a dish"


@dataclass(frozen=True, slots=True)
class Served:
    """One start of a split."""

    tokens_per_second: float  # one stream, median of the requests
    predicted: float
    layers: dict[str, int]


def main() -> int:
    """Runs all and reports; 1 if it is not as it should be."""
    args = _arguments()
    n_layers = config_of(catalogue.open_model(args.model)).n_layers
    room = {kind.name: max(1, (kind.memory_bytes or 0) - OWN_BYTES) for kind in HOUSEHOLD}
    splits: dict[str, Mapping[str, int] | None] = {
        "planned": None,
        "equal": in_proportion(n_layers, dict.fromkeys(room, 1)),
        "by memory": in_proportion(n_layers, room),
    }
    found: dict[str, list[Served]] = {name: [] for name in splits}
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            args.log.open("a", encoding="utf-8") as log,
            machines([COORDINATOR, *HOUSEHOLD]) as made,
        ):
            for number in range(args.rounds):
                for name, split in splits.items():
                    terminal.note(f"round {number + 1} of {args.rounds}: {name}")
                    run = Round(args, made, Path(folder), log)
                    found[name].append(run.serve(split))
    except CannotMake as e:
        print(f"namespaces: {e}", file=sys.stderr)
        return 1
    return _report(found, as_json=args.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="synthetic:7b-q4_0")
    parser.add_argument("--rounds", type=values.whole(1), default=3)
    parser.add_argument("--requests", type=values.whole(1), default=3, help="timed in each round")
    parser.add_argument("--tokens", type=values.whole(2), default=32, help="of each answer")
    parser.add_argument("--log", type=Path, default=Path("namespaces.log"))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def in_proportion(n_layers: int, weights: Mapping[str, int]) -> dict[str, int]:
    """Layers of each, at least one; what rounding leaves goes to the largest remainders."""
    total = sum(weights.values())
    exact = {name: n_layers * weight / total for name, weight in weights.items()}
    counts = {name: max(1, int(share)) for name, share in exact.items()}
    while sum(counts.values()) > n_layers:
        counts[max(counts, key=lambda name: counts[name] - exact[name])] -= 1
    while sum(counts.values()) < n_layers:
        counts[max(counts, key=lambda name: exact[name] - counts[name])] += 1
    return counts


@dataclass
class Round:
    """One split, served once and stopped."""

    args: argparse.Namespace
    made: Sequence[Machine]
    folder: Path
    log: IO[str]

    def serve(self, split: Mapping[str, int] | None) -> Served:
        """Starts the cluster, asks, stops it. `split` None: the planner's."""
        home, *others = self.made
        options = ["--workers", str(len(others)), "--context", "512"]
        options += ["--max-sessions", "1", "--host", home.address]
        if split is not None:
            limits = self.folder / "limits.toml"
            limits.write_text(
                "".join(
                    f'[[worker]]\nid = "{name}"\nlayers = [{n}, {n}]\n' for name, n in split.items()
                )
            )
            options += ["--limits", str(limits), "--use", "all"]
        address = f"{home.address}:7685"
        with contextlib.ExitStack() as running:
            command = ["potluck-coordinator", self.args.model, *options]
            running.enter_context(self._running(home, *command))
            for machine in others:
                arguments = ["--coordinator", address, "--host", machine.address]
                arguments += ["--name", machine.kind.name]
                worker = self._running(machine, "potluck-worker", *arguments)
                announced = running.enter_context(worker).stdout
                # One measures at a time, as machines of their own would: these share two cores.
                assert announced is not None, "it is a pipe"
                announced.readline()
            report = self._serving(home, address)
            rates = [self._ask(home, address) for _ in range(self.args.requests + 1)][1:]
        return Served(
            tokens_per_second=statistics.median(rates),
            predicted=report["forecast"]["tokens_per_second"],
            layers={s["worker"]: s["span"][1] - s["span"][0] for s in report["plan"]},
        )

    @contextlib.contextmanager
    def _running(self, machine: Machine, *command: str) -> Iterator[subprocess.Popen[str]]:
        """A program on a machine with a cache of its own, until the context ends."""
        process = machine.run(
            *command,
            environment={"POTLUCK_CACHE": str(self.folder / machine.kind.name)},
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()

    def _serving(self, home: Machine, address: str) -> dict[str, Any]:
        """Status, as soon as it serves."""
        deadline = time.monotonic() + SERVING_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.5)
            with contextlib.suppress(subprocess.CalledProcessError, json.JSONDecodeError):
                report: dict[str, Any] = json.loads(
                    self._said(home, "potluck", "status", "--connect", address, "--json")
                )
                if report["state"] == "serving":
                    return report
        raise TimeoutError(f"not serving after {SERVING_SECONDS:g} s; see {self.log.name}")

    def _ask(self, home: Machine, address: str) -> float:
        """Tokens/s of one answer, from its first token to its last."""
        options = ["--max-tokens", str(self.args.tokens), "--temperature", "0"]
        answer = json.loads(
            self._said(
                home, "potluck", "generate", PROMPT, "--connect", address, "--json", *options
            )
        )
        timings = answer["timings"]
        return float((len(answer["tokens"]) - 1) / timings["decode_seconds"])

    def _said(self, machine: Machine, *command: str) -> str:
        process = machine.run(*command, stdout=subprocess.PIPE, stderr=self.log)
        said, _ = process.communicate(timeout=SERVING_SECONDS)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        return said


def _report(found: Mapping[str, Sequence[Served]], *, as_json: bool) -> int:
    rates = {
        name: statistics.median(s.tokens_per_second for s in runs) for name, runs in found.items()
    }
    predicted = statistics.median(s.predicted / s.tokens_per_second for s in found["planned"])
    gains = {
        name: statistics.median(
            plan.tokens_per_second / other.tokens_per_second
            for plan, other in zip(found["planned"], runs, strict=True)
        )
        for name, runs in found.items()
        if name != "planned"
    }
    is_right = 0.85 <= predicted <= 1.15 and min(gains.values()) > 1
    if as_json:
        report = {
            "tokens_per_second": rates,
            "predicted_over_measured": predicted,
            "planned_over": gains,
            "layers": {name: runs[0].layers for name, runs in found.items()},
        }
        print(json.dumps(report))
        return 0 if is_right else 1
    for name, runs in found.items():
        layers = ", ".join(f"{worker} {n}" for worker, n in runs[0].layers.items())
        gain = f", planned is {gains[name]:.2f}x as fast" if name in gains else ""
        print(f"{name:10} {rates[name]:6.2f} tokens/s{gain}; {layers}")
    print(
        f"predicted over measured: {predicted:.2f}" + ("" if is_right else "  NOT AS IT SHOULD BE")
    )
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
