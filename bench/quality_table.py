"""Writes the measured table of docs/quality.md from bench/results/quality/*.csv, or checks it.

A file is a row; what was measured again counts as it was last. Each model, text and window has a
table of its own.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "quality.md"
PLACE = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)
HEADS = (
    "weights",
    "bits a weight",
    "perplexity",
    "over F16",
    "KL",
    "KL, 99 %",
    "same top",
    "change of p, RMS",
    "llama.cpp",
    "ratio",
)

Row = dict[str, str]


def rows(folder: Path) -> list[Row]:
    """All rows of all results files, files by name and rows in their order."""
    return [
        row
        for path in sorted(folder.glob("*.csv"))
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    ]


def table(found: Sequence[Row]) -> str:
    """The tables as Markdown."""
    parts = []
    for group in dict.fromkeys(_group(row) for row in found):
        of_group = [row for row in found if _group(row) == group]
        model, text, text_sha256, context = group
        tokens = int(of_group[-1]["n_tokens"])
        title = (
            f"{model}, windows of {int(context):,} tokens, {tokens:,} scored; text: {text}"
            f" (sha256 {text_sha256}...)\n\n"
        )
        parts.append(title + "".join(f"{line}\n" for line in _lines(of_group)))
    return "\n".join(parts)


def _group(row: Row) -> tuple[str, str, str, str]:
    return row["model"], row["text"], row["text_sha256"], row["context"]


def _lines(found: Sequence[Row]) -> Iterable[str]:
    newest = {(row["type"], row["kv_type"]): row for row in found}
    yield f"| {' | '.join(HEADS)} |"
    yield "|---" * len(HEADS) + "|"
    for (type_name, kv_type), row in newest.items():
        name = type_name if kv_type == "f16" else f"{type_name}, KV in {kv_type}"
        yield f"| {' | '.join([name, *_cells(row)])} |"


def _cells(row: Row) -> list[str]:
    is_base = (row["type"], row["kv_type"]) == ("f16", "f16")
    theirs = row["llama_perplexity"]
    return [
        f"{float(row['bits_per_weight']):.2f}",
        f"{float(row['perplexity']):.3f} ± {float(row['standard_error']):.3f}",
        ""
        if is_base
        else f"{_more(row['ratio'])} ± {100 * float(row['ratio_standard_error']):.2f}",
        "" if is_base else f"{float(row['divergence']):.5f}",
        "" if is_base else f"{float(row['divergence_p99']):.4f}",
        "" if is_base else f"{float(row['same_top']):.1%}",
        "" if is_base else f"{float(row['change_rms']):.2%}",
        f"{float(theirs):.3f}" if theirs else "",
        f"{float(row['over_llama']):.4f}" if theirs else "",
    ]


def _more(ratio: str) -> str:
    """How much more than 1: "+1.23 %"."""
    return f"{100 * (float(ratio) - 1):+.2f} %"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if docs/quality.md is stale")
    args = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    made = table(rows(ROOT / "bench" / "results" / "quality"))
    fresh, places = PLACE.subn(lambda found: found[1] + made + found[2], text)
    if places != 1:
        raise SystemExit(f"{PAGE.name} has no place for the table")
    if args.check:
        return int(fresh != text)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
