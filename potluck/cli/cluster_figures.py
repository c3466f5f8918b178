"""What `bench-cluster` found out: the nouns, the object of --json, and tables for people. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from potluck import __version__
from potluck.cli import quantities, terminal
from potluck.errors import UsageError
from potluck.replies import LinkReport, ServiceReport, StageReport

_PARTS = ("compute", "serialise", "wire", "wait")
PREDICTED_PROMPT_TOKENS = 512  # of the forecast's first token


@dataclass(frozen=True, slots=True)
class StreamsFigures:
    """So many answers at once: tokens/s of each round, and the stages right after the last."""

    streams: int
    samples: tuple[float, ...]
    stages: tuple[StageReport, ...]
    predicted: float | None  # tokens/s by the planner; None: it did not say

    @property
    def tokens_per_second(self) -> float:
        """Of all streams together; the median of the rounds."""
        return statistics.median(self.samples)

    def predicted_seconds(self, stage: StageReport) -> float | None:
        """Of the stage's compute, by the planner: for a step of one row. None: it did not say."""
        return stage.predicted_seconds or None if self.streams == 1 else None


@dataclass(frozen=True, slots=True)
class LinkBytes:
    """What one link carried for each token that passed the stages; None: it was not counted."""

    start: str
    end: str
    rtt_seconds: float
    bytes_per_token: float | None
    activation_bytes_per_token: float | None


@dataclass(frozen=True, slots=True)
class ClusterFigures:
    """Everything that was measured."""

    report: ServiceReport
    prompt_tokens: int
    max_tokens: int
    rounds: int
    streams: tuple[StreamsFigures, ...]
    first_token_samples: tuple[float, ...]  # seconds
    links: tuple[LinkBytes, ...]
    notes: tuple[str, ...]  # what people should know before they believe it

    @property
    def first_token_seconds(self) -> float:
        """From asking to the first token; the median of the rounds."""
        return statistics.median(self.first_token_samples)

    @property
    def first_token_predicted(self) -> float | None:
        """Seconds, by the planner, which thinks of a prompt of 512 tokens."""
        forecast = self.report.forecast
        if forecast is None or self.prompt_tokens != PREDICTED_PROMPT_TOKENS:
            return None
        return forecast.first_token_seconds


def rate_together(times: Sequence[Sequence[float]]) -> float:
    """Tokens/s of answers that ran at once, while all of them did; each its tokens' times.

    From the first token of the last to begin to the last token of the first to end.
    Raises UsageError: they were never all under way.
    """
    begin, end = max(t[0] for t in times), min(t[-1] for t in times)
    if end <= begin:
        raise UsageError(
            "the first answer ended before the last one began, so they never ran at once",
            remedy="ask for more with --max-tokens",
        )
    return sum(begin < t <= end for answer in times for t in answer) / (end - begin)


def predicted_rate(report: ServiceReport, streams: int) -> float | None:
    """What the planner expects of so many streams; None: it did not say of this number."""
    if report.forecast is None:
        return None
    n = len(report.plan)
    said = {
        2 * n: report.forecast.most_tokens_per_second,
        n: report.forecast.total_tokens_per_second,
        1: report.forecast.tokens_per_second,
    }
    return said.get(streams) or None


def link_bytes(
    before: Sequence[LinkReport], after: Sequence[LinkReport], n_tokens: int
) -> tuple[LinkBytes, ...]:
    """Bytes a token from two readings of the counters. A link that is new or began again since the
    first reading has none.
    """
    old = {(x.start, x.end): x for x in before}
    found = []
    for link in after:
        was = old.get((link.start, link.end))
        counted = n_tokens > 0 and was is not None and was.sent_bytes <= link.sent_bytes
        total = activations = None
        if counted and was is not None:
            total = (link.sent_bytes - was.sent_bytes) / n_tokens
            activations = (link.activation_bytes - was.activation_bytes) / n_tokens
        found.append(LinkBytes(link.start, link.end, link.rtt_seconds, total, activations))
    return tuple(found)


def shares(stage: StageReport) -> dict[str, float]:
    """Which part of a step's time in this stage went where; all zero before the first step."""
    seconds = {part: float(getattr(stage, f"{part}_seconds")) for part in _PARTS}
    total = sum(seconds.values())
    return {part: value / total if total else 0.0 for part, value in seconds.items()}


def json_of(figures: ClusterFigures) -> dict[str, object]:
    """The object of --json; names never change once released. Times in seconds, None: unknown."""
    report = figures.report
    return {
        "model": report.model,
        "potluck_version": __version__,
        "epoch": report.epoch,
        "n_stages": len(report.plan),
        "kv_type": report.kv_type,
        "wire": report.wire,
        "rounds": figures.rounds,
        "max_tokens": figures.max_tokens,
        "streams": [_streams_json(s) for s in figures.streams],
        "first_token": {
            "prompt_tokens": figures.prompt_tokens,
            "seconds": figures.first_token_seconds,
            "samples": list(figures.first_token_samples),
            "predicted_seconds": figures.first_token_predicted,
        },
        "links": [
            {
                "from": x.start,
                "to": x.end,
                "rtt_seconds": x.rtt_seconds,
                "bytes_per_token": x.bytes_per_token,
                "activation_bytes_per_token": x.activation_bytes_per_token,
            }
            for x in figures.links
        ],
        "notes": list(figures.notes),
    }


def _streams_json(streams: StreamsFigures) -> dict[str, object]:
    return {
        "streams": streams.streams,
        "tokens_per_second": streams.tokens_per_second,
        "samples": list(streams.samples),
        "predicted_tokens_per_second": streams.predicted,
        "stages": [
            {
                "stage": s.stage,
                "worker": s.worker,
                "span": list(s.span),
                **{f"{part}_seconds": getattr(s, f"{part}_seconds") for part in _PARTS},
                **{f"{part}_share": share for part, share in shares(s).items()},
                "predicted_seconds": streams.predicted_seconds(s),
            }
            for s in streams.stages
        ],
    }


def summary(figures: ClusterFigures, address: str) -> str:
    """What was measured, in a line or two."""
    report = figures.report
    return (
        f"{report.model} at {address}: {quantities.count(len(report.plan), 'stage')}, KV"
        f" {report.kv_type}, wire {report.wire}; medians of"
        f" {quantities.count(figures.rounds, 'round')}, {figures.max_tokens} tokens an answer\n"
    )


def tables(figures: ClusterFigures) -> list[terminal.Table]:
    """Speed, each stage's time for one stream and for the most, and links."""
    ends = dict.fromkeys((figures.streams[0], figures.streams[-1]))
    return [
        _speed_table(figures),
        *(_stage_table(streams) for streams in ends),
        _link_table(figures.links),
    ]


def _speed_table(figures: ClusterFigures) -> terminal.Table:
    columns = ("measured", "least", "median", "most", "", "predicted", "of it")
    rows = []
    for s in figures.streams:
        name = quantities.count(s.streams, "stream")
        rows.append((name, *_spread(s.samples, "tokens/s"), *_against(s.predicted, s.samples)))
    prompt = f"first token of {figures.prompt_tokens}"
    seconds = figures.first_token_samples
    rows.append((prompt, *_spread(seconds, "s"), *_against(figures.first_token_predicted, seconds)))
    return terminal.Table(columns, tuple(rows), frozenset({*columns[1:4], *columns[5:]}), "Speed")


def _spread(samples: Sequence[float], unit: str) -> tuple[str, str, str, str]:
    low, middle, high = min(samples), statistics.median(samples), max(samples)
    return f"{low:.2f}", f"{middle:.2f}", f"{high:.2f}", unit


def _against(predicted: float | None, samples: Sequence[float]) -> tuple[str, str]:
    """What was predicted, and the median as a part of it."""
    if not predicted:
        return "", ""
    return f"{predicted:.2f}", f"{statistics.median(samples) / predicted:.0%}"


def _stage_table(streams: StreamsFigures) -> terminal.Table:
    columns: tuple[str, ...] = ("stage", "worker", "layers", *_PARTS)
    is_predicted = any(map(streams.predicted_seconds, streams.stages))
    columns += ("predicted",) if is_predicted else ()
    rows = []
    for s in streams.stages:
        parts = [
            f"{quantities.milliseconds(getattr(s, f'{part}_seconds'))} {share:4.0%}"
            for part, share in shares(s).items()
        ]
        said = streams.predicted_seconds(s)
        expected = (quantities.milliseconds(said) if said else "",) if is_predicted else ()
        rows.append((str(s.stage), s.worker, f"{s.span[0]}-{s.span[1] - 1}", *parts, *expected))
    title = f"Stages with {quantities.count(streams.streams, 'stream')} (milliseconds a step)"
    return terminal.Table(columns, tuple(rows), frozenset(columns[3:]), title)


def _link_table(links: Sequence[LinkBytes]) -> terminal.Table:
    columns = ("from", "to", "round trip", "a token", "of it activations")
    rows = tuple(
        (
            x.start,
            x.end,
            f"{quantities.milliseconds(x.rtt_seconds)} ms",
            "" if x.bytes_per_token is None else f"{x.bytes_per_token:,.0f} B",
            ""
            if x.activation_bytes_per_token is None
            else f"{x.activation_bytes_per_token:,.0f} B",
        )
        for x in links
    )
    return terminal.Table(columns, rows, frozenset(columns[2:]), "Links with 1 stream")
