"""Writes the measured table of README.md from bench/results/*.csv, or checks that it is fresh.

A model's test is a row and a thread count a column. What was measured again counts as it was last;
with several machines in the results each has a table of its own.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from potluck.cli.measuring import Test

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)

Row = dict[str, str]


def rows(folder: Path) -> list[Row]:
    """All rows of all results files, files by name and rows in their order."""
    return [
        row
        for path in sorted(folder.glob("*.csv"))
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    ]


def table(found: Sequence[Row]) -> str:
    """The tables as Markdown, one a machine."""
    machines = dict.fromkeys((row["cpu"], row["isa"]) for row in found)
    parts = []
    for cpu, isa in machines:
        of_machine = [row for row in found if (row["cpu"], row["isa"]) == (cpu, isa)]
        parts.append("".join(f"{line}\n" for line in _lines(of_machine)))
        if len(machines) > 1:
            parts[-1] = f"{cpu}, {isa}:\n\n{parts[-1]}"
    return "\n".join(parts)


def _lines(found: Sequence[Row]) -> Iterable[str]:
    newest = {
        (
            row["model"],
            row["type"],
            row.get("kv_type", "f16"),
            row["test"],
            int(row["threads"]),
        ): row
        for row in found
    }
    counts = sorted({threads for *_, threads in newest})
    heads = [f"{n} thread" if n == 1 else f"{n} threads" for n in counts]
    yield f"| model | test | {' | '.join(heads)} |"
    yield "|---|---|" + "---|" * len(counts)
    for model, kind in dict.fromkeys(key[:2] for key in newest):
        name = f"{model.removesuffix(f'.{kind}').removesuffix(f'.{kind.lower()}')} {kind}"
        for kv_type in dict.fromkeys(v for m, k, v, *_ in newest if (m, k) == (model, kind)):
            of_kv = "" if kv_type == "f16" else f", KV in {kv_type}"
            tests = [t for *key, t, _ in newest if key == [model, kind, kv_type]]
            for test in _shown(tests):
                cells = [_cell(newest.get((model, kind, kv_type, test.name, n))) for n in counts]
                yield f"| {name} | {_words(test)}{of_kv} | {' | '.join(cells)} |"
                name = ""  # once is enough


def _shown(names: Iterable[str]) -> list[Test]:
    """Each test once, without short ones that were run only to compare several sessions with."""
    tests = [Test.named(name) for name in dict.fromkeys(names)]
    alone = [t for t in tests if not t.n_prompt and t.n_sessions == 1]
    return [
        t
        for t in tests
        if t not in alone or not any(o.n_depth == t.n_depth and o.n_gen > t.n_gen for o in alone)
    ]


def _words(test: Test) -> str:
    """What a test does: "making 32 tokens in each of 4 sessions, after 4,096 positions"."""
    parts = [f"reading a prompt of {test.n_prompt:,}"] if test.n_prompt else []
    parts += [f"making {test.n_gen:,} tokens"] if test.n_gen else []
    each = f" in each of {test.n_sessions} sessions" if test.n_sessions > 1 else ""
    before = f", after {test.n_depth:,} positions" if test.n_depth else ""
    return " and ".join(parts) + each + before


def _cell(row: Row | None) -> str:
    """The result first: "**1.65x** 258 / 156 t/s, 95% of memory"."""
    if row is None:
        return ""
    rates = f"{_rate(row['potluck_tps'])} / {_rate(row['llama_tps'])} t/s"
    said = f"**{float(row['ratio']):.2f}x** {rates}"
    if row["potluck_over_one"]:
        one, other = float(row["potluck_over_one"]), float(row["llama_over_one"])
        return f"{said}, {one:.2f}x of one (llama.cpp {other:.2f}x)"
    if row["potluck_of_bandwidth"]:
        return f"{said}, {float(row['potluck_of_bandwidth']):.0%} of memory"
    return said


def _rate(text: str) -> str:
    """Three figures or more: "1,750", "78.2", "3.45"."""
    rate = float(text)
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if README.md is stale")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    made = table(rows(ROOT / "bench" / "results"))
    fresh, places = PLACE.subn(lambda found: found[1] + made + found[2], text)
    if places != 1:
        raise SystemExit("README.md has no place for the table")
    if args.check:
        return int(fresh != text)
    readme.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
