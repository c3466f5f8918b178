"""Alternates potluck and llama.cpp on one file and prints ratios.

Both sides are processes with the model loaded that compute one at a time, A, B, A, B; each ratio is
taken from a pair of neighbouring runs, and its median is what counts. llama.cpp runs with and
without flash attention, and its better median stands. Needs a Python with llama-cpp-python in it
(bench/README.md says how); potluck itself never does.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

import potluck
from potluck import catalogue, engine, gguf, model
from potluck.plan import Span

HERE = Path(__file__).parent
COLUMNS = [
    "cpu", "isa", "threads", "model", "sha256", "test", "potluck_tps", "llama_tps", "ratio",
    "ratio_min", "ratio_max", "rounds", "potluck", "llama_cpp_python", "read_gb_per_second",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Test:
    """kind "pp" reads n tokens at once, "tg" makes n tokens one by one."""

    kind: str
    n: int

    def __str__(self) -> str:
        return f"{self.kind}{self.n}"


class Side:
    """A process that answers one test a line with its seconds."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready = str(self._read()["ready"])

    def run(self, test: Test) -> float:
        """Seconds of one test."""
        stdin: IO[str] | None = self._process.stdin
        assert stdin is not None
        stdin.write(json.dumps({"test": test.kind, "n": test.n}) + "\n")
        stdin.flush()
        return float(str(self._read()["seconds"]))

    def close(self) -> None:
        """Ends the process by closing its input."""
        self._process.communicate()

    def _read(self) -> dict[str, object]:
        stdout: IO[str] | None = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args!r} ended with {self._process.wait()}")
        answer: dict[str, object] = json.loads(line)
        return answer


def potluck_side(path: Path, threads: int, isa: str, context: int) -> int:
    """The potluck process: whole model in one shard, no network."""
    file = gguf.read(path)
    config = model.config_of(file)
    span = Span(0, config.n_layers)
    kv = model.kv_bytes_per_token(config, span, model.KvType.F16) * (context + 16)
    machine = engine.Engine(threads=threads, isa=isa)
    shard = engine.Shard(
        machine,
        engine.config_for(config),
        0,
        config.n_layers,
        embeds=True,
        has_head=True,
        kv_bytes=kv,
    )
    engine.load(
        shard,
        file,
        model.span_tensors(file, config, span, embeds=True, has_head=True),
        lambda *_: None,
    )
    bandwidth = machine.read_bandwidth()
    print(json.dumps({"ready": f"{machine.isa} {bandwidth / 1e9:.2f}"}), flush=True)
    logits = np.zeros((1, config.vocab), dtype=np.float32)

    def step(ids: list[int], at: int) -> None:
        rows = [engine.RowSpan(1, at, len(ids), 1)]
        shard.forward(np.array(ids, dtype=np.int32), rows, logits)

    for line in sys.stdin:
        order = json.loads(line)
        shard.close(1)
        shard.open(1, context)
        if order["test"] == "pp":
            start = time.perf_counter()
            step([(i * 7) % 1000 + 300 for i in range(order["n"])], 0)
        else:
            step([1], 0)
            start = time.perf_counter()
            for i in range(order["n"]):
                step([(i * 7) % 1000 + 300], i + 1)
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    return 0


def compare(path: Path, threads: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of the results file for one thread count."""
    common = [str(path), "--threads", str(threads)]
    ours = Side([sys.executable, __file__, *common, "--side", "--isa", args.isa])
    llama = [args.llama_python, str(HERE / "llama_side.py"), *common]
    theirs = [Side([*llama, "--flash", str(flash)]) for flash in (0, 1)]
    isa, bandwidth = ours.ready.split()
    rows: list[dict[str, object]] = []
    for test in (Test("pp", args.prompt), Test("tg", args.generate)):
        for side in (ours, *theirs):
            side.run(test)  # warm-up
        pairs = [
            [(ours.run(test), other.run(test)) for other in theirs] for _ in range(args.rounds)
        ]
        best = min((0, 1), key=lambda f: statistics.median(p[f][1] for p in pairs))
        ratios = sorted(p[best][1] / p[best][0] for p in pairs)
        row: dict[str, object] = {
            "cpu": cpu_name(), "isa": isa, "threads": threads, "model": path.stem,
            "sha256": args.sha256, "test": str(test),
            "potluck_tps": round(test.n / statistics.median(p[best][0] for p in pairs), 2),
            "llama_tps": round(test.n / statistics.median(p[best][1] for p in pairs), 2),
            "ratio": round(statistics.median(ratios), 3), "ratio_min": round(ratios[0], 3),
            "ratio_max": round(ratios[-1], 3), "rounds": args.rounds,
            "potluck": potluck.__version__, "llama_cpp_python": theirs[0].ready,
            "read_gb_per_second": bandwidth,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{path.stem} {row['test']} threads {threads}: potluck {row['potluck_tps']} t/s, "
            f"llama.cpp {row['llama_tps']} t/s (flash attention {'on' if best else 'off'}), "
            f"ratio {row['ratio']} ({row['ratio_min']} to {row['ratio_max']})"
        )
    for side in (ours, *theirs):
        side.close()
    return rows


def cpu_name() -> str:
    """Model name of the first CPU and the number of those allowed here."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return f"{fields.get('model name', 'unknown')} family {fields.get('cpu family', '?')}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="path or catalogue name")
    parser.add_argument("--llama-python", help="Python of the environment with llama-cpp-python")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = catalogue.resolve(args.model)
    if args.side:
        return potluck_side(path, args.threads[0], args.isa, 2048)
    if not args.llama_python:
        parser.error("--llama-python is needed: bench/README.md says how to make one")
    args.sha256 = hashlib.file_digest(path.open("rb"), "sha256").hexdigest()[:12]
    rows = [row for threads in args.threads for row in compare(path, threads, args)]
    if args.csv:
        is_new = not args.csv.exists()
        with args.csv.open("a", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
