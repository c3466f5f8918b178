"""docs/simulations.md: its tables, in the places that the page has for them.

Pure but for the page and the files that it quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from bench.simulation import Outcome
from coordinator.forecast import Forecast
from potluck.plan import Plan

PAGE = Path(__file__).parents[1] / "docs" / "simulations.md"
CHECKED = Path(__file__).parent / "results" / "simulation.json"

# What their makers say of models of this size; system and place, model, tokens/s.
PUBLISHED = (
    ("prima.cpp: M1, two i9 with RTX 3070 and 2080 Ti, phone, Wi-Fi (README)", "65B Q4K", "1.76"),
    ("llama.cpp on the same machines (there)", "LLaMA-65B", "0.11"),
    ("exo: eight M4 Pro Mac minis (project blog)", "Llama-3.3-70B 4-bit", "3.89"),
    ("ten Raspberry Pi CM5 16 GB (geerlingguy/ai-benchmarks)", "Llama-70B", "0.85"),
    ("distributed-llama: eight Raspberry Pi 4B, cable (its report)", "Llama-2-70B", "0.21"),
    ("distributed-llama: four cloud machines, 20 Gbit/s (README)", "Llama-2-70B", "3.41"),
    ("Petals: GPUs over the Internet (README)", "Llama-2-70B", "up to 6"),
    ("llama.cpp: one Ryzen 3700X, 128 GB (llama.cpp #34, 2023)", "LLaMA-65B q4_0", "0.92"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """So many people at once, the plan that is made for them, and what happened."""

    people: int
    plan: Plan
    forecast: Forecast
    outcome: Outcome

    @property
    def tokens_per_second(self) -> float | None:
        """Of all together; None if they were never all answered at once: KV for fewer."""
        try:
            return self.outcome.tokens_per_second
        except ValueError:
            return None

    @property
    def places(self) -> int:
        """People whose answers began before the first one ended."""
        first_end = min(times[-1] for times in self.outcome.token_times.values())
        return sum(times[0] < first_end for times in self.outcome.token_times.values())


@dataclass(frozen=True, slots=True)
class Result:
    """One cluster: some numbers of people, and a long prompt of one."""

    title: str
    path: Path
    network: str
    rows: tuple[Row, ...]
    first_token: Row
    prompt: int  # tokens of it


def filled(text: str, results: Sequence[Result], checked: str) -> str:
    """The page with its tables. ValueError: it lacks a place."""
    tables = {
        "checked": _checked(json.loads(checked)),
        "clusters": "\n\n".join(_clusters(results)),
        "records": _records(results),
    }
    for name, made in tables.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not (begin and end):
            raise ValueError(f"no place for the table {name}")
        text = f"{before}{begin}\n{made}\n\n{end}{after}"
    return text


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for each network and number of people."""
    lines = [
        "| network | people | layers | tokens/s, all | each | planner's forecast | busy |",
        "|---|---:|---|---:|---:|---:|---|",
    ]
    lines += [f"| {' | '.join(_cells(result, row))} |" for result in results for row in result.rows]
    return "\n".join(lines)


def first_token(result: Result) -> str:
    """A sentence."""
    row = result.first_token
    said = row.forecast.first_token_seconds(result.prompt)
    return (
        f"First token of a prompt of {result.prompt}, {result.network}, on"
        f" {_layers(row)}: {row.outcome.first_token_seconds:.1f} s (forecast {said:.1f})."
    )


def _clusters(results: Sequence[Result]) -> Iterator[str]:
    for title, same in groupby(results, key=lambda r: r.title):
        group = list(same)
        yield f"### {title}"
        for path in dict.fromkeys(result.path for result in group):
            yield f"`{path.parent.name}/{path.name}`:"
            yield f"```toml\n{path.read_text(encoding='utf-8').strip()}\n```"
        yield table(group)
        yield from map(first_token, group)


def _cells(result: Result, row: Row) -> Iterator[str]:
    yield from (result.network, str(row.people), _layers(row))
    if (rate := row.tokens_per_second) is None:
        yield from (f"KV for {row.places} at once", "", "", "")
        return
    said = row.forecast.tokens_per_second(row.people)
    yield from (f"{rate:.2f}", f"{rate / row.people:.2f}", f"{said:.2f}")
    busy = [row.outcome.utilisation(i) for i in range(len(row.plan.stages))]
    yield " to ".join(dict.fromkeys((f"{min(busy):.0%}", f"{max(busy):.0%}")))


def _layers(row: Row) -> str:
    """Alike neighbours together: "8 pis of 10"."""
    parts = []
    for (kind, n), same in groupby(
        row.plan.stages, key=lambda s: (re.sub(r"-\d+$", "", s.worker), s.span.n_layers)
    ):
        names = [stage.worker for stage in same]
        parts.append(f"{len(names)} {kind}s of {n}" if len(names) > 1 else f"{names[0]} {n}")
    return ", ".join(parts)


def _checked(rows: Sequence[dict[str, object]]) -> str:
    has_own = any(row["from_reported"] is not None for row in rows)
    last = (" ratio with its own stages' seconds |", "---:|") if has_own else ("", "")
    lines = [
        f"| model | | measured | simulated | ratio |{last[0]}",
        f"|---|---|---:|---:|---:|{last[1]}",
    ]
    for row in rows:
        measured, made = float(str(row["measured"])), float(str(row["simulated"]))
        own = "" if row["from_reported"] is None else f"{float(str(row['from_reported'])):.2f}"
        unit = "s" if str(row["what"]).startswith("first") else "tokens/s"
        cells = [str(row["model"]), f"{row['what']}, {unit}", f"{measured:.2f}", f"{made:.2f}"]
        cells += [f"{made / measured:.2f}", own] if has_own else [f"{made / measured:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _records(results: Sequence[Result]) -> str:
    lines = ["| | model | tokens/s |", "|---|---|---|"]
    for result in results:
        rates = {row.people: row.tokens_per_second for row in result.rows}
        known = {n: rate for n, rate in rates.items() if rate is not None}
        most = max(known, key=lambda n: known[n])
        said = f"{known[1]:.2f} for one, {known[most]:.1f} for {most} at once"
        lines.append(f"| *simulated*: {result.title}, {result.network} | LLaMA-65B Q4_0 | {said} |")
    lines += [f"| {' | '.join(row)} |" for row in PUBLISHED]
    return "\n".join(lines)
