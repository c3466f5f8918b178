"""Writes the measured table of README.md from bench/results/*.csv, or checks that it is fresh."""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)
WORDS = {"pp": "reading a prompt of {}", "tg": "making {} tokens"}


def rows(folder: Path) -> list[dict[str, str]]:
    """All rows of all results files, files by name and rows in their order."""
    return [
        row
        for path in sorted(folder.glob("*.csv"))
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    ]


def table(folder: Path) -> str:
    """The table as Markdown."""
    lines = [
        "| model | what | threads | potluck | llama.cpp | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows(folder):
        kind, n = row["test"][:2], row["test"][2:]
        lines.append(
            f"| {row['model']} | {WORDS[kind].format(n)} | {row['threads']} "
            f"| {float(row['potluck_tps']):,.0f} t/s | {float(row['llama_tps']):,.0f} t/s "
            f"| **{float(row['ratio']):.2f}x** |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if README.md is stale")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    made = table(ROOT / "bench" / "results")
    fresh, places = PLACE.subn(lambda found: found[1] + made + found[2], text)
    if places != 1:
        raise SystemExit("README.md has no place for the table")
    if args.check:
        return int(fresh != text)
    readme.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
