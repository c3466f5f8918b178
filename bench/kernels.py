"""Matrix kernels alone: GMAC/s and GB/s by type, rows and ISA, beside the read bandwidth.

    python bench/kernels.py [--threads N] [--rounds N] [--shape ROWSxCOLS] [--csv FILE]

ISAs take turns at each point, so their ratio holds on a shared machine; the times alone do not.
Weights come from memory (several times the last cache), as in decode.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from potluck import engine

TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "f16")
BATCHES = (1, 2, 4, 8, 16, 64, 512)


@dataclass(frozen=True)
class Row:
    """One point; `of_bandwidth`: bytes/s of weights over bytes/s of a plain read in this run."""

    cpu: str
    isa: str
    threads: int
    type: str
    rows: int
    cols: int
    batch: int
    milliseconds: float
    gmac_per_second: float
    gb_per_second: float
    of_bandwidth: float


def cpu_name() -> str:
    """The CPU as the system names it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def weight_bytes(type_name: str, rows: int, cols: int) -> int:
    """Bytes of a matrix."""
    values, size_bytes = engine.block_layout(type_name)
    return rows * cols // values * size_bytes


def measure(engines: list[engine.Engine], rows: int, cols: int, rounds: int) -> list[Row]:
    """All points of one shape; the engines take turns at each."""
    found = []
    bandwidth = max(one.read_bandwidth() for one in engines)
    for type_name in TYPES:
        if cols % engine.block_layout(type_name)[0]:
            continue
        size_bytes = weight_bytes(type_name, rows, cols)
        for batch in BATCHES:
            for one in engines:
                seconds = engine.benchmark_matmul(one, type_name, rows, cols, batch, rounds)
                row = Row(
                    cpu=cpu_name(),
                    isa=one.isa,
                    threads=one.threads,
                    type=type_name,
                    rows=rows,
                    cols=cols,
                    batch=batch,
                    milliseconds=round(seconds * 1e3, 4),
                    gmac_per_second=round(rows * cols * batch / seconds / 1e9, 1),
                    gb_per_second=round(size_bytes / seconds / 1e9, 1),
                    of_bandwidth=round(size_bytes / seconds / bandwidth, 2),
                )
                print(
                    f"{row.type:5} M {row.batch:3}  {row.isa:10}  {row.milliseconds:9.3f} ms  "
                    f"{row.gmac_per_second:6.1f} GMAC/s  {row.gb_per_second:5.1f} GB/s  "
                    f"{row.of_bandwidth:4.2f} of a read",
                    flush=True,
                )
                found.append(row)
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shape", default="4096x4096")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows, cols = (int(part) for part in args.shape.split("x"))
    isas = [isa for isa in engine.available_isas() if isa != "scalar"] or ["scalar"]
    found = measure([engine.Engine(args.threads, isa) for isa in isas], rows, cols, args.rounds)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
