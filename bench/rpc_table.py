"""Writes the table beside llama.cpp's RPC from bench/results/rpc/*.csv, or checks that it is fresh.

python -m bench.rpc_table [--check]
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Sequence
from pathlib import Path

from potluck.cli import quantities
from potluck.cli.measuring import Test

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "bench" / "README.md"
PLACE = re.compile(r"(<!-- rpc -->\n).*?(<!-- /rpc -->)", re.DOTALL)

Row = dict[str, str]


def rows(folder: Path) -> list[Row]:
    """All rows of all results files, files by name and rows in their order."""
    return [
        row
        for path in sorted(folder.glob("*.csv"))
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    ]


def table(found: Sequence[Row]) -> str:
    """As Markdown, a table for each machine and model; what was measured again counts as last."""
    newest = {(*_group(row), row["test"]): row for row in found}
    parts = []
    for group in dict.fromkeys(key[:-1] for key in newest):
        of_group = [row for key, row in newest.items() if key[:-1] == group]
        parts.append("".join(f"{line}\n" for line in _lines(of_group)))
    return "\n".join(parts)


def _group(row: Row) -> tuple[str, str, str, str]:
    return row["cpu"], row["isa"], row["model"], row["workers"]


def _lines(found: Sequence[Row]) -> list[str]:
    first = found[0]
    one = max(float(row["read_one_gb_per_second"]) for row in found)
    every = max(float(row["read_all_gb_per_second"]) for row in found)
    workers = quantities.count(int(first["workers"]), "worker")
    n = first["workers"]
    lines = [
        f"{first['model']}, {workers} of one thread on {first['cpu']} ({first['isa']}); one thread"
        f" reads {one:.1f} GB/s, {n} read {every:.1f}: {every / one:.2f} times as much.",
        "",
        f"| t/s in all | potluck | RPC, {n} servers | one process, {n} threads | times RPC"
        " | times one process |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = [_words(Test.named(row["test"]))]
        for side in ("potluck", "rpc", "process"):
            over = f", {float(row[f'{side}_over_one']):.2f}x" if row[f"{side}_over_one"] else ""
            cells.append(f"{float(row[f'{side}_tps']):.2f}{over}")
        cells += [_ratio(row, "rpc"), _ratio(row, "process")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ratio(row: Row, other: str) -> str:
    low, high = float(row[f"over_{other}_min"]), float(row[f"over_{other}_max"])
    return f"**{float(row[f'over_{other}']):.2f}** ({low:.2f} to {high:.2f})"


def _words(test: Test) -> str:
    """What a test does: "4 streams of 32 tokens"."""
    if test.n_prompt:
        return f"{quantities.count(test.n_sessions, 'prompt')} of {test.n_prompt:,}"
    return f"{quantities.count(test.n_sessions, 'stream')} of {test.n_gen:,} tokens"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is stale")
    args = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    made = table(rows(ROOT / "bench" / "results" / "rpc"))
    fresh, places = PLACE.subn(lambda found: found[1] + made + found[2], text)
    if places != 1:
        raise SystemExit(f"{PAGE} has no place for the table")
    if args.check:
        return int(fresh != text)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
