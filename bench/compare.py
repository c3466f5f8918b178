"""Alternates potluck and llama.cpp on the same files and prints ratios.

Both sides are processes that hold the model and compute one at a time, taking turns; a round is
one run of potluck and one of each setting of llama.cpp: without and with flash attention and, where
potluck keeps its KV in q8, with that and its own q8. The ratio of a test is the median over its
rounds, against the setting whose median is best. Needs a Python with
llama-cpp-python in it (bench/README.md says how); potluck itself never does.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import hashlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import potluck
from potluck import catalogue, gguf
from potluck.cli import measuring, memory, quantities, timing
from potluck.errors import PlanError, PotluckError
from potluck.model import KvType

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

HERE = Path(__file__).parent
TESTS = ["pp512", "tg128", "pp512@d4096", "tg64@d4096", "tg32", "tg32x2", "tg32x4", "tg32x8"]
# Of llama.cpp, as llama_side.py numbers them: flash attention, type of the KV. The last takes part
# only where potluck keeps its KV in q8, too.
SETTINGS = [(0, "f16"), (1, "f16"), (1, "q8_0")]
REST_SECONDS = 0.05  # before a run, for the other side's threads to stop spinning


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the results file. Rates and ratios are medians."""

    cpu: str
    isa: str
    threads: int
    model: str
    type: str
    sha256: str
    test: str
    potluck_tps: float
    llama_tps: float
    ratio: float
    ratio_min: float
    ratio_max: float
    rounds: int
    kv_type: str  # potluck's
    flash_attention: int  # of llama.cpp: the best setting
    llama_kv_type: str
    read_gb_per_second: float
    potluck_of_bandwidth: float | None  # generation: bytes of weights and KV a second, over that
    potluck_over_one: float | None  # several sessions: all their tokens/s, over those of one
    llama_over_one: float | None
    potluck: str
    commit: str
    llama_cpp_python: str

    def __str__(self) -> str:
        threads = quantities.count(self.threads, "thread")
        flash = "on" if self.flash_attention else "off"
        kv = f"  KV {self.kv_type} against {self.llama_kv_type}" if self.kv_type != "f16" else ""
        said = [
            f"{self.model} ({self.type})  {threads}  {self.test:13}{kv}"
            f"  {self.ratio:.2f}x ({self.ratio_min:.2f} to {self.ratio_max:.2f})",
            f"{self.potluck_tps:.2f} against {self.llama_tps:.2f} t/s (flash attention {flash})",
        ]
        if self.potluck_of_bandwidth is not None:
            said.append(f"{self.potluck_of_bandwidth:.0%} of {self.read_gb_per_second:.1f} GB/s")
        if self.potluck_over_one is not None:
            one = f"{self.potluck_over_one:.2f}x one session's"
            said.append(f"total {one} (llama.cpp {self.llama_over_one:.2f}x)")
        return ", ".join(said)


@dataclass(frozen=True, slots=True)
class Rounds:
    """Seconds of each round: potluck's, and those of llama.cpp's SETTINGS."""

    ours: Sequence[float]
    theirs: Sequence[Sequence[float]]

    @property
    def best(self) -> int:
        """The setting whose median is best."""
        return min(range(len(self.theirs)), key=lambda s: statistics.median(self.theirs[s]))

    @property
    def ratios(self) -> list[float]:
        """How many times as fast as llama.cpp, each round; lowest first."""
        pairs = zip(self.theirs[self.best], self.ours, strict=True)
        return sorted(theirs / ours for theirs, ours in pairs)


class Side:
    """A process that answers each order with a line."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.pid = self._process.pid
        self.ready = self._read()

    def ask(self, **order: object) -> dict[str, Any]:
        """Sends an order and waits. Raises SideLost."""
        stdin: IO[str] | None = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # what it says about itself follows from reading
        return self._read()

    def seconds(self, **order: object) -> float:
        """Of a run."""
        time.sleep(REST_SECONDS)
        return float(self.ask(do="run", **order)["seconds"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process by closing its input; one that is at work is not waited for."""
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        stdout: IO[str] | None = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise SideLost(f"{Path(self._process.args[1]).name} ended with {self._process.wait()}")  # type: ignore[index,arg-type]  # given as a list above
        answer: dict[str, Any] = json.loads(line)
        return answer


class SideLost(Exception):
    """A side ended in the middle of a comparison; it has said why on stderr."""


def rounds_of(
    test: measuring.Test, room: int, ours: Side, theirs: Side, n: int, n_settings: int = 2
) -> Rounds:
    """Runs a test n times on each; who begins changes from round to round."""
    ours.ask(do="open", test=test.name)
    theirs.ask(do="open", room=room, settings=list(range(n_settings)), **asdict(test))
    order: list[int | None] = [None, *range(n_settings)]
    seconds: dict[int | None, list[float]] = {who: [] for who in order}
    for _ in range(n):
        for setting in order:
            run = ours.seconds() if setting is None else theirs.seconds(setting=setting)
            seconds[setting].append(run)
        order = [*order[1:], order[0]]
    return Rounds(seconds[None], [seconds[setting] for setting in range(n_settings)])


def settings(subject: measuring.Subject) -> int:
    """How many of SETTINGS take part; llama.cpp's q8_0 wants heads of whole blocks of 32."""
    return 3 if subject.kv_type is KvType.Q8 and subject.config.head_dim % 32 == 0 else 2


def row_of(
    subject: measuring.Subject,
    test: measuring.Test,
    rounds: Rounds,
    read_bandwidth: float,
    one: Row | None,
    about: dict[str, Any],
) -> Row:
    """The line of a test. `one` is that of a single session with the same counts, if it ran."""
    ours = test.n_tokens / statistics.median(rounds.ours)
    theirs = test.n_tokens / statistics.median(rounds.theirs[rounds.best])
    read = None if test.n_prompt else subject.bytes_read(test) / statistics.median(rounds.ours)
    return Row(
        test=test.name,
        type=subject.weight_type,
        potluck_tps=round(ours, 2),
        llama_tps=round(theirs, 2),
        ratio=round(statistics.median(rounds.ratios), 3),
        ratio_min=round(rounds.ratios[0], 3),
        ratio_max=round(rounds.ratios[-1], 3),
        rounds=len(rounds.ours),
        kv_type=subject.kv_type.value,
        flash_attention=SETTINGS[rounds.best][0],
        llama_kv_type=SETTINGS[rounds.best][1],
        read_gb_per_second=round(read_bandwidth / 1e9, 2),
        potluck_of_bandwidth=None if read is None else round(read / read_bandwidth, 3),
        potluck_over_one=None if one is None else round(ours / one.potluck_tps, 3),
        llama_over_one=None if one is None else round(theirs / one.llama_tps, 3),
        **about,
    )


def compare(
    subject: measuring.Subject, threads: int, tests: list[measuring.Test], args: argparse.Namespace
) -> Iterator[Row]:
    """All tests of one file with one thread count. Raises SideLost."""
    common = [str(subject.path), "--threads", str(threads)]
    names = [test.name for test in tests]
    own = ["--isa", args.isa, "--kv-type", args.kv_type]
    side = str(HERE / "potluck_side.py")
    llama_side = str(HERE / "llama_side.py")
    with (
        Side([sys.executable, side, *common, *own, "--tests", *names]) as ours,
        Side([args.llama_python, llama_side, *common]) as theirs,
    ):
        about = {
            "cpu": cpu_name(),
            "isa": ours.ready["isa"],
            "threads": threads,
            "model": subject.path.stem,
            "sha256": digest(subject.path),
            "potluck": potluck.__version__,
            "commit": commit(),
            "llama_cpp_python": theirs.ready["version"],
        }
        rows: dict[str, Row] = {}
        for test in tests:
            room = max(t.room for t in tests if t.n_sessions == test.n_sessions)
            before = float(ours.ask(do="read")["bytes_per_second"])
            rounds = rounds_of(test, room, ours, theirs, args.rounds, settings(subject))
            bandwidth = max(before, float(ours.ask(do="read")["bytes_per_second"]))
            one = rows.get(replace(test, n_sessions=1).name) if test.n_sessions > 1 else None
            rows[test.name] = row_of(subject, test, rounds, bandwidth, one, about)
            yield rows[test.name]


@functools.cache
def digest(path: Path) -> str:
    """The first 12 digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def cpu_name() -> str:
    """Model name and family of the first CPU: a virtual machine's name alone says little."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    family = re.search(r"^cpu family\s*: (.+)$", text, re.MULTILINE)
    return timing.cpu_name() + (f" family {family[1]}" if family else "")


def commit() -> str:
    """Of potluck's sources; with a + if something is changed."""
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def append(file: Path, row: DataclassInstance) -> None:
    """Adds a line to the results, whose columns must be the row's."""
    names = [field.name for field in fields(row)]
    is_new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, names, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))


def check(args: argparse.Namespace) -> None:
    """What would fail after long work is refused before. Raises SystemExit."""
    if args.csv:
        check_columns(args.csv, Row)
    if args.rounds < 1 or min(args.threads) < 1:
        raise SystemExit("--rounds and --threads: 1 or more")


def check_columns(path: Path, row: type[DataclassInstance]) -> None:
    """A results file that exists has the columns of `row`. Raises SystemExit."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        found = next(csv.reader(file), [])
    if found != [field.name for field in fields(row)]:
        raise SystemExit(f"{path} has other columns; name a new file")


def check_memory(subject: measuring.Subject, tests: list[measuring.Test]) -> None:
    """Both sides hold the weights and llama.cpp a KV of each setting. Raises PlanError."""
    f16 = replace(subject, kv_type=KvType.F16).kv_bytes(tests)
    theirs = sum(f16 if kv == "f16" else f16 * 17 // 32 for _, kv in SETTINGS[: settings(subject)])
    needed = 2 * subject.size_bytes + subject.kv_bytes(tests) + theirs
    free = memory.share_bytes(1)
    if free is not None and needed > free:
        sides = f"both sides need {quantities.memory(needed)}, {quantities.memory(free)} are free"
        raise PlanError(f"{subject.path}: {sides}; compare a file of fewer layers")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="path or catalogue name")
    parser.add_argument(
        "--llama-python", required=True, help="of the environment with llama-cpp-python"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tests", nargs="+", default=TESTS, help=f"default: {' '.join(TESTS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--kv-type", choices=["f16", "q8"], default="f16", help="potluck's (f16)")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    check(args)
    failed = False
    for name in args.models:
        try:
            tests = list(dict.fromkeys(measuring.Test.named(test) for test in args.tests))
            subject = timing.subject_of(gguf.read(catalogue.resolve(name)), KvType(args.kv_type))
            subject.check_context(tests)
            check_memory(subject, tests)
            for threads in args.threads:
                for row in compare(subject, threads, tests, args):
                    print(row, flush=True)
                    if args.csv:
                        append(args.csv, row)
        except (PotluckError, SideLost) as error:
            said = str(error)
            print(said if said.startswith(name) else f"{name}: {said}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
