"""Potluck's workers against llama.cpp's RPC servers: the same file, machine and thread count.

Three contenders hold the model and take turns, one at work at a time: `potluck serve` with some
workers of one thread, reached through potluck.client; llama.cpp with all layers on as many RPC
servers of one thread; and llama.cpp in one process with as many threads. A round is a run of each;
ratios are taken within a round. A round in which something else took CPU time does not count and
is run again. Needs a llama.cpp built with RPC and a Python with llama-cpp-python of that very
release (bench/README.md says how); potluck itself never does.

    python -m bench.rpc MODEL --llama-bin FOLDER --llama-python PYTHON
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import potluck
from bench import cpu_time
from bench.compare import (
    HERE,
    REST_SECONDS,
    Side,
    SideLost,
    append,
    check_columns,
    commit,
    cpu_name,
    digest,
)
from potluck import catalogue, engine
from potluck.cli import quantities
from potluck.cli.measuring import Test
from potluck.client import Client
from potluck.errors import PotluckError, UsageError
from potluck.replies import AnswerOptions, Done

BIN = Path(sys.executable).parent
TESTS = ["tg32", "tg32x2", "tg32x4", "tg32x8", "pp512"]
# Of llama.cpp, as llama_side.py numbers them; the one that is fastest when it warms up takes part.
# Flash attention, rows at once. Several servers can only be busy at once with less than all rows.
SETTINGS = {0: (0, 512), 1: (1, 512), 3: (1, 128), 4: (1, 64)}
# CPU time of others, as a share of a run, up to which a round counts: a shell, the system.
MOST_FOREIGN = 0.04
TRIES = 3  # rounds run for each that is to count, before the machine is given up
START_SECONDS = 60.0  # for a server to listen
READ_BYTES, READ_ROUNDS = 2**29, 5  # of the bandwidth, as bench/potluck_side.py


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the results file. Rates are tokens/s of all sessions; medians."""

    cpu: str
    isa: str
    model: str
    sha256: str
    workers: int  # of one thread each; servers likewise; threads of the one process
    test: str
    rounds: int
    potluck_tps: float
    rpc_tps: float
    process_tps: float
    over_rpc: float  # potluck, as a multiple of RPC in the same round
    over_rpc_min: float
    over_rpc_max: float
    over_process: float
    over_process_min: float
    over_process_max: float
    rpc_setting: str
    process_setting: str
    potluck_over_one: float | None  # several sessions: all their tokens/s, over those of one
    rpc_over_one: float | None
    process_over_one: float | None
    read_one_gb_per_second: float  # one thread's
    read_all_gb_per_second: float  # as many threads' as workers
    potluck: str
    commit: str
    llama_cpp_python: str

    def __str__(self) -> str:
        said = (
            f"{self.test:8}  {self.over_rpc:.2f}x RPC"
            f" ({self.over_rpc_min:.2f} to {self.over_rpc_max:.2f}),"
            f" {self.over_process:.2f}x one process"
            f" ({self.over_process_min:.2f} to {self.over_process_max:.2f}):"
            f" {self.potluck_tps:.2f} against {self.rpc_tps:.2f} ({self.rpc_setting})"
            f" and {self.process_tps:.2f} t/s ({self.process_setting})"
        )
        if self.potluck_over_one is None:
            return said
        limit = self.read_all_gb_per_second / self.read_one_gb_per_second
        return (
            f"{said}; total {self.potluck_over_one:.2f}x one session's (RPC {self.rpc_over_one:.2f}"
            f", one process {self.process_over_one:.2f}; memory reads {limit:.2f}x as fast)"
        )


class Contender(Protocol):
    """Who takes part: holds the model, and computes only in `open` and `seconds`."""

    pids: Sequence[int]  # of all its processes

    def open(self, test: Test) -> str:
        """Makes a test ready and warms up; says in which setting."""
        ...

    def seconds(self) -> float:
        """Runs the test that was made ready."""
        ...


class Cluster:
    """`potluck serve` with local workers of one thread, asked as people ask it: over gRPC.

    A generation begins with a prompt of one token, so that as many steps as tokens are timed. Times
    are the client's: opening the session, the first step and the way of the tokens are in them.
    """

    def __init__(self, model: Path, workers: int, options: Sequence[str]) -> None:
        command = [str(BIN / "potluck"), "serve", str(model), "--json", "--context", "1024"]
        command += ["--local-workers", str(workers), "--threads", "1"]
        command += ["--use", "all", "--sessions", str(workers), *options]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SideLost(f"{' '.join(command)} ended with {self._process.wait()}")
        ready = json.loads(line)
        self.pids: Sequence[int] = list(ready["pids"].values())
        self._loop = asyncio.Runner()
        self._client = Client(ready["address"])
        self._test = Test(0, 1)
        self._vocab = self._loop.run(self._client.models())[0].vocab
        stages = len(self._loop.run(self._client.status()).plan)
        if stages != workers:
            self.__exit__()
            raise SideLost(f"potluck's plan has {stages} stages for {workers} workers")
        self._random = random.Random(1)

    def open(self, test: Test) -> str:
        """Runs it once, with fewer tokens."""
        self._test = replace(test, n_gen=min(test.n_gen, 8))
        self.seconds()
        self._test = test
        return ""

    def seconds(self) -> float:
        """Until the last session has its last token."""
        return self._loop.run(self._run(self._test))

    def stages(self) -> str:
        """Layers of each worker, and medians of its decode steps."""
        report = self._loop.run(self._client.status())
        return "; ".join(
            f"{s.worker} layers {s.span[0]}-{s.span[1] - 1}:"
            f" compute {s.compute_seconds * 1e3:.2f} ms, serialise {s.serialise_seconds * 1e3:.2f},"
            f" wire {s.wire_seconds * 1e3:.2f}, wait {s.wait_seconds * 1e3:.2f}"
            for s in report.plan
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run(self._client.aclose())
        self._loop.close()
        self._process.terminate()
        self._process.communicate()

    async def _run(self, test: Test) -> float:
        n = max(test.n_prompt, 1)
        ids = [[self._random.randrange(self._vocab) for _ in range(n)] for _ in range(8)]
        start = time.perf_counter()
        async with asyncio.TaskGroup() as sessions:
            for i in range(test.n_sessions):
                sessions.create_task(self._answer(ids[i % len(ids)], max(test.n_gen, 1)))
        return time.perf_counter() - start

    async def _answer(self, prompt: Sequence[int], n_tokens: int) -> None:
        options = AnswerOptions(max_tokens=n_tokens, temperature=0.0, ignore_end=True)
        done = None
        async for event in self._client.generate(prompt, options):
            done = event if isinstance(event, Done) else done
        if done is None or done.answer_tokens != n_tokens:
            raise SideLost(f"potluck's answer has {done and done.answer_tokens} tokens")


class Llama:
    """A process of llama.cpp, and the RPC servers that belong to it, if any."""

    def __init__(self, side: Side, settings: Sequence[int], servers: Sequence[int] = ()) -> None:
        self.pids: Sequence[int] = [side.pid, *servers]
        self._side = side
        self._settings = settings
        self._best = settings[0]

    def open(self, test: Test) -> str:
        """Runs it in each setting; the fastest is kept."""
        settings = [s for s in self._settings if SETTINGS[s][1] == 512 or test.n_prompt]
        order = {"room": test.room, "settings": settings, **asdict(test)}
        seconds = self._side.ask(do="open", **order)["seconds"]
        if not test.n_prompt:  # it warmed up with fewer tokens; a prompt takes long enough
            seconds = [self._side.seconds(setting=s) for s in settings]
        self._best = settings[seconds.index(min(seconds))]
        flash, rows = SETTINGS[self._best]
        return f"flash attention {'on' if flash else 'off'}" + (
            f", {rows} rows at once" if test.n_prompt else ""
        )

    def seconds(self) -> float:
        """In the setting that was kept."""
        return self._side.seconds(setting=self._best)


@contextlib.contextmanager
def rpc_servers(folder: Path, count: int) -> Iterator[dict[str, int]]:
    """Servers of one thread on loopback: their process ids by address. Raises SideLost."""
    names = ["rpc-server", "ggml-rpc-server"]
    program = next((folder / name for name in names if (folder / name).is_file()), None)
    if program is None:
        raise SideLost(f"{folder} has no rpc-server; build llama.cpp with -DGGML_RPC=ON")
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for _ in range(count):
            port = free_port()
            command = [str(program), "-H", "127.0.0.1", "-p", str(port), "-t", "1"]
            started[f"127.0.0.1:{port}"] = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        for address, process in started.items():
            wait_for(address, process)
        yield {address: process.pid for address, process in started.items()}
    finally:
        for process in started.values():
            process.kill()  # a server has no other end
            process.wait()


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """Until somebody listens there. Raises SideLost."""
    host, port = address.split(":")
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.05)
    raise SideLost(f"the RPC server at {address} does not listen")


@dataclass(frozen=True, slots=True)
class Run:
    """One contender's turn."""

    seconds: float
    foreign: float  # CPU time of others, over the run's time
    idle: float  # CPU time of the contenders that did not run, likewise


def run_of(name: str, contenders: Mapping[str, Contender]) -> Run:
    """One turn, with what else happened meanwhile."""
    groups = {who: contender.pids for who, contender in contenders.items()}
    groups["bench"] = [os.getpid()]  # asks, and receives tokens: potluck's client is in it
    time.sleep(REST_SECONDS)
    before, start = cpu_time.seconds_of(groups), time.perf_counter()
    seconds = contenders[name].seconds()
    elapsed = time.perf_counter() - start
    spent = {who: after - before[who] for who, after in cpu_time.seconds_of(groups).items()}
    machine = spent.pop("")
    foreign = max(0.0, machine - sum(spent.values()))
    idle = sum(seconds for who, seconds in spent.items() if who not in (name, "bench"))
    return Run(seconds, foreign / elapsed, idle / elapsed)


def rounds_of(
    contenders: Mapping[str, Contender], n: int, most_foreign: float
) -> dict[str, list[Run]]:
    """n rounds that count, a run of each in changing order. Raises SideLost if there are none."""
    order = list(contenders)
    kept: dict[str, list[Run]] = {name: [] for name in order}
    for _ in range(n * TRIES):
        runs = {name: run_of(name, contenders) for name in order}
        order = [*order[1:], order[0]]
        if (foreign := max(run.foreign for run in runs.values())) > most_foreign:
            print(f"  a round does not count: others took {foreign:.0%} of a CPU", file=sys.stderr)
            continue
        for name, run in runs.items():
            kept[name].append(run)
        if len(kept[order[0]]) == n:
            return kept
    raise SideLost("the machine is not quiet; see what runs, or raise --most-foreign")


def rates(test: Test, runs: Mapping[str, Sequence[Run]]) -> dict[str, float]:
    """Tokens/s of each contender: the median."""
    return {
        name: round(test.n_tokens / statistics.median(run.seconds for run in of_name), 3)
        for name, of_name in runs.items()
    }


def ratios(ours: Sequence[Run], theirs: Sequence[Run]) -> tuple[float, float, float]:
    """How many times as fast we are in a round: median, least, most."""
    all_rounds = [b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)]
    return (
        round(statistics.median(all_rounds), 3),
        round(min(all_rounds), 3),
        round(max(all_rounds), 3),
    )


def row_of(
    test: Test,
    runs: Mapping[str, Sequence[Run]],
    settings: Mapping[str, str],
    read: tuple[float, float],
    one: Row | None,
    about: Mapping[str, object],
) -> Row:
    """The line of a test; `one` is that of a single session. `read`: GB/s of one thread, of all."""
    tps = rates(test, runs)
    rpc, process = (ratios(runs["potluck"], runs[name]) for name in ("rpc", "process"))
    return Row(
        test=test.name,
        rounds=len(runs["potluck"]),
        potluck_tps=tps["potluck"],
        rpc_tps=tps["rpc"],
        process_tps=tps["process"],
        over_rpc=rpc[0],
        over_rpc_min=rpc[1],
        over_rpc_max=rpc[2],
        over_process=process[0],
        over_process_min=process[1],
        over_process_max=process[2],
        rpc_setting=settings["rpc"],
        process_setting=settings["process"],
        potluck_over_one=round(tps["potluck"] / one.potluck_tps, 3) if one else None,
        rpc_over_one=round(tps["rpc"] / one.rpc_tps, 3) if one else None,
        process_over_one=round(tps["process"] / one.process_tps, 3) if one else None,
        read_one_gb_per_second=round(read[0], 2),
        read_all_gb_per_second=round(read[1], 2),
        **about,  # type: ignore[arg-type]  # the columns that are alike in all rows
    )


def read_gb_per_second(workers: int) -> tuple[float, float]:
    """Of one thread, and of as many as there are workers."""
    one, every = (
        engine.Engine(threads, "auto").read_bandwidth(READ_BYTES, READ_ROUNDS) / 1e9
        for threads in (1, workers)
    )
    return one, every


def tests_of(names: Sequence[str]) -> list[Test]:
    """Raises UsageError for one that is not the same on all sides."""
    tests = [Test.named(name) for name in dict.fromkeys(names)]
    for test in tests:
        if test.n_depth or (test.n_prompt and test.n_gen):
            raise UsageError(f"{test.name}: a test reads prompts or makes tokens, from the start")
    return tests


def compare(model: Path, tests: Sequence[Test], args: argparse.Namespace) -> Iterator[Row]:
    """All tests, all contenders loaded meanwhile. Raises SideLost."""
    command = [args.llama_python, str(HERE / "llama_side.py"), str(model), "--threads"]
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(args.llama_bin.absolute())}
    options = ["--max-sessions", str(max(test.n_sessions for test in tests)), *args.serve]
    with (
        rpc_servers(args.llama_bin, args.workers) as servers,
        Side([*command, "1", "--rpc", *servers], environment) as host,
        Side([*command, str(args.workers)], environment) as process,
        Cluster(model, args.workers, options) as cluster,
    ):
        contenders: dict[str, Contender] = {
            "potluck": cluster,
            "rpc": Llama(host, list(SETTINGS), list(servers.values())),
            "process": Llama(process, [0, 1]),
        }
        about = {
            "cpu": cpu_name(),
            "isa": engine.Engine(1, "auto").isa,
            "model": model.stem,
            "sha256": digest(model),
            "workers": args.workers,
            "potluck": potluck.__version__,
            "commit": commit(),
            "llama_cpp_python": process.ready["version"],
        }
        rows: dict[str, Row] = {}
        for test in tests:
            before = read_gb_per_second(args.workers)
            settings = {name: contender.open(test) for name, contender in contenders.items()}
            runs = rounds_of(contenders, args.rounds, args.most_foreign)
            after = read_gb_per_second(args.workers)
            read = (max(before[0], after[0]), max(before[1], after[1]))
            one = rows.get(replace(test, n_sessions=1).name) if test.n_sessions > 1 else None
            rows[test.name] = row_of(test, runs, settings, read, one, about)
            yield rows[test.name]
            print(f"  {cluster.stages()}; {said_of(runs)}", file=sys.stderr)


def said_of(runs: Mapping[str, Sequence[Run]]) -> str:
    """How quiet it was."""
    every = [run for of_name in runs.values() for run in of_name]
    foreign, idle = max(run.foreign for run in every), max(run.idle for run in every)
    return f"others took up to {foreign:.1%} of a CPU, contenders that rested {idle:.1%}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="path or catalogue name")
    parser.add_argument(
        "--llama-bin", type=Path, required=True, help="rpc-server and llama.cpp's libraries"
    )
    parser.add_argument(
        "--llama-python", required=True, help="of the environment with llama-cpp-python"
    )
    parser.add_argument("--workers", type=int, default=2, help="of one thread each (2)")
    parser.add_argument("--tests", nargs="+", default=TESTS, help=f"default: {' '.join(TESTS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--most-foreign",
        type=float,
        default=MOST_FOREIGN,
        help=f"share of a CPU that others may take in a round that counts ({MOST_FOREIGN:g})",
    )
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument(
        "--serve", nargs=argparse.REMAINDER, default=[], help="all that follows: `potluck serve`'s"
    )
    args = parser.parse_args()
    if args.rounds < 1 or args.workers < 1:
        parser.error("--rounds and --workers: 1 or more")
    if args.csv:
        check_columns(args.csv, Row)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers end with us
    try:
        tests = tests_of(args.tests)
        model = catalogue.resolve(args.model)
        size = quantities.size(model.stat().st_size)
        print(f"{model.stem}, {size}, {args.workers} workers of one thread", flush=True)
        for row in compare(model, tests, args):
            print(row, flush=True)
            if args.csv:
                append(args.csv, row)
    except (PotluckError, SideLost) as error:
        print(f"{args.model}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
