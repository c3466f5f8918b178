"""Home clusters that nobody here has, simulated: the real planner, scheduler and sessions.

    python -m bench.simulate --write            tables of docs/simulations.md; --check: if fresh
    python -m bench.simulate --workers FILE     one table for the machines of a workers file

Machines come from files of the format of `potluck plan --workers` (bench/clusters/), the model is
LLaMA-65B's true shape. What the planner makes of them is simulated as bench/simulation.py says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bench.simulation import Arrival, Pipe, SimulatedLink, SimulatedStage, Work, simulate
from bench.simulation_page import CHECKED, PAGE, Result, Row, filled, first_token, table
from coordinator import planner, workers_file
from coordinator.described import Description, workers_of
from coordinator.forecast import Forecast, StageForecast, chunk_of
from coordinator.planner import Asked
from coordinator.scheduler import Limits
from coordinator.served import ModelShape, shape_of
from potluck.errors import PotluckError
from potluck.model import layer_macs
from potluck.plan import LinkFigures, Links, Plan

MODEL = "synthetic:65b-q4_0"
FOLDER = Path(__file__).parent / "clusters"

# What decode reads of the bandwidth that a machine has: what the kernels are built to reach at
# least; bench/results/*.csv, column potluck_of_bandwidth, has what they do.
READ_SHARE = 0.9
SESSION = Arrival(n_prompt=64, max_tokens=128)
LONG_PROMPT = Arrival(n_prompt=512, max_tokens=128)
WIFI = LinkFigures(rtt_seconds=6e-3, bytes_per_second=25e6)  # 200 Mbit/s, one radio for all


@dataclass(frozen=True, slots=True)
class Cluster:
    """Machines of a file, by cable or, all on one radio, by Wi-Fi."""

    title: str
    path: Path
    wifi: bool = False


CLUSTERS = (
    Cluster("four laptops, 50 GB/s", FOLDER / "four-laptops.toml"),
    Cluster("four laptops, 50 GB/s", FOLDER / "four-laptops.toml", wifi=True),
    Cluster("four laptops, 40 GB/s", FOLDER / "four-laptops-40.toml"),
    Cluster("four laptops, 60 GB/s", FOLDER / "four-laptops-60.toml"),
    Cluster("eight Raspberry Pi 5", FOLDER / "eight-pis.toml"),
    Cluster("a mixed household", FOLDER / "household.toml"),
    Cluster("a mixed household", FOLDER / "household.toml", wifi=True),
)


def result_of(cluster: Cluster, shape: ModelShape) -> Result:
    """1, N, 2N and 4N people on N machines, and the first token of a long prompt.

    Raises UsageError, PlanError.
    """
    described = machines(cluster.path, wifi=cluster.wifi)
    n = len(described.workers)
    rows = [
        row_of(described, shape, people, SESSION, wifi=cluster.wifi)
        for people in dict.fromkeys((1, n, 2 * n, 4 * n))
    ]
    long = row_of(described, shape, 1, LONG_PROMPT, wifi=cluster.wifi)
    network = "Wi-Fi" if cluster.wifi else "cable"
    return Result(cluster.title, cluster.path, network, tuple(rows), long, LONG_PROMPT.n_prompt)


def machines(path: Path, *, wifi: bool) -> Description:
    """A workers file, with kernels that read READ_SHARE of the bandwidth. Raises UsageError."""
    said = workers_file.read(path)
    workers = (
        replace(w, read_bytes_per_second=READ_SHARE * w.read_bytes_per_second) for w in said.workers
    )
    return replace(said, workers=tuple(workers), links=Links(WIFI) if wifi else said.links)


def row_of(
    described: Description, shape: ModelShape, people: int, arrival: Arrival, *, wifi: bool
) -> Row:
    """Plans for so many people and lets them ask at once. Raises PlanError."""
    asked = Asked(
        arrival.n_prompt + arrival.max_tokens,
        max_sessions=people,
        sessions=people,
        positions=arrival.n_prompt + arrival.max_tokens // 2,
        one_pipeline=True,
    )
    workers = workers_of(described, shape.sizes, layer_macs(shape.config))
    planned = planner.plan(
        shape.sizes, workers, asked, links=described.links, limits=described.limits
    )
    pipe = pipe_of(planned.forecast, shape.sizes.row_bytes, "air" if wifi else "")
    limits = limits_of(planned.plan, planned.forecast, shape, people)
    return Row(people, planned.plan, planned.forecast, simulate(pipe, limits, [arrival] * people))


def pipe_of(forecast: Forecast, row_bytes: int, medium: str = "") -> Pipe:
    """What the planner expects of each stage and link, to be simulated; `medium`: all share it."""
    links = (
        SimulatedLink(x.figures.rtt_seconds / 2, x.figures.bytes_per_second, medium)
        for x in forecast.links
    )
    stages = (SimulatedStage(stage.worker, _seconds(stage)) for stage in forecast.stages)
    return Pipe(tuple(stages), tuple(links), row_bytes)


def limits_of(plan: Plan, forecast: Forecast, shape: ModelShape, people: int) -> Limits:
    """As coordinator.engine makes them; whoever has no place waits."""
    return Limits(
        n_stages=len(plan.stages),
        max_sessions=people,
        queue=people,
        chunk_tokens=min(chunk_of(len(plan.stages)), shape.step_tokens),
        step_tokens=shape.step_tokens,
        step_picks=shape.step_tokens,
        kv_tokens=planner.kv_tokens(plan, shape.sizes),
        spread=forecast.spread(people),
    )


def _seconds(stage: StageForecast) -> Callable[[Work], float]:
    speed, n_layers = stage.speed, stage.span.n_layers

    def seconds(work: Work) -> float:
        if work.rows == 0:
            return stage.fixed_seconds
        layer = speed.layer_seconds(work.rows) + work.positions * speed.kv_position_seconds
        head = speed.head_seconds(work.picks) if stage.has_head and work.picks else 0.0
        return stage.fixed_seconds + n_layers * layer + head

    return seconds


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    what.add_argument("--workers", type=Path, metavar="FILE")
    parser.add_argument("--model", default=MODEL, help=f"of --workers ({MODEL})")
    parser.add_argument("--wifi", action="store_true", help="the machines of FILE on one radio")
    args = parser.parse_args()
    if args.workers:
        try:
            cluster = Cluster(args.workers.name, args.workers, wifi=args.wifi)
            result = result_of(cluster, shape_of(args.model, 0))
        except PotluckError as error:
            print(f"simulate: error: {error.message}\n  {error.remedy}".rstrip(), file=sys.stderr)
            return 1
        print(f"{table([result])}\n\n{first_token(result)}")
        return 0
    shape = shape_of(MODEL, 0)
    results = [result_of(cluster, shape) for cluster in CLUSTERS]
    text = PAGE.read_text(encoding="utf-8")
    made = filled(text, results, CHECKED.read_text(encoding="utf-8"))
    if args.check:
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
