"""Show which worker holds what, and where the time goes."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict

from potluck.cli import asking, load_progress, quantities, running, terminal
from potluck.replies import (
    ForecastReport,
    LinkReport,
    MeasuredLinkReport,
    ServiceReport,
    StageReport,
    WorkerReport,
)

HELP = "Show the stages, the workers and the live figures"
WATCH_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck status`."""
    asking.add_connect(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--watch", action="store_true", help="show it again every second")


def run(args: argparse.Namespace) -> int:
    """Prints the state of a service; with --json and --watch one object a line."""
    address = running.address_of(args.connect)
    return asyncio.run(_show(address, as_json=args.json, watch=args.watch))


async def _show(address: str, *, as_json: bool, watch: bool) -> int:
    from potluck.client import Client

    async with Client(address) as client:
        while True:
            report = await client.status()
            if watch and not as_json and terminal.is_live(sys.stdout):
                print("\x1b[H\x1b[2J", end="")  # home, clear
            if as_json:
                print(json.dumps(json_of(report)), flush=True)
            else:
                print(summary(report, address))
                terminal.print_tables(tables(report))
            if not watch:
                return 0
            await asyncio.sleep(WATCH_SECONDS)


def summary(report: ServiceReport, address: str) -> str:
    """What the service does now, in a line or two."""
    figures = report.figures
    lines = [f"{report.model} at {address}: {report.state}, epoch {report.epoch}"]
    if report.detail:
        lines.append(report.detail)
    lines.append(
        f"{quantities.count(report.sessions, 'session')}, queue {report.queue}, "
        f"{figures.tokens_per_second:.1f} tokens/s, "
        f"{quantities.count(figures.answer_tokens, 'token')} answered, "
        f"context {report.context_tokens:,}, KV {report.kv_type}, wire {report.wire}"
    )
    if report.forecast is not None:
        lines += _forecast_lines(report.forecast, len(report.plan))
    return "\n".join(lines) + "\n"


def _forecast_lines(forecast: ForecastReport, n_stages: int) -> list[str]:
    """What was predicted, who holds nothing, and what would help."""
    predicted = f"{forecast.tokens_per_second:.1f} tokens/s for one answer"
    if n_stages > 1:
        total = f"{forecast.total_tokens_per_second:.1f} in all for {n_stages} at once"
        predicted += f", {total}"
    prompt = quantities.duration(forecast.first_token_seconds)
    told = [("predicted ", f"{predicted}, first token of a prompt of 512 after {prompt}")]
    if forecast.spares:
        told.append(("spare ", quantities.names(forecast.spares)))
    told += [("advice ", line) for line in forecast.advice]
    width = terminal.columns(sys.stdout)
    return [terminal.folded(start, text, width) for start, text in told]


def tables(report: ServiceReport) -> list[terminal.Table]:
    """Stages, workers and links; those that are empty are left out."""
    found = [
        stage_table(report),
        _worker_table(report.workers),
        load_progress.table(report.workers),
        _link_table(report.links),
    ]
    return [table for table in found if table.rows]


def stage_table(report: ServiceReport) -> terminal.Table:
    """The plan: who holds which layers, and the milliseconds of a decode step in each stage."""
    columns = (
        *("stage", "worker", "layers", "memory"),
        *("compute", "predicted", "serialise", "wire", "wait"),
    )
    rows = tuple(
        (
            str(s.stage),
            s.worker,
            f"{s.span[0]}-{s.span[1] - 1}",
            quantities.memory(s.memory_bytes),
            *(quantities.milliseconds(x) for x in _parts(s)),
        )
        for s in report.plan
    )
    return terminal.Table(
        columns, rows, frozenset(columns[3:]), title="Stages (milliseconds a step, medians)"
    )


def _parts(stage: StageReport) -> tuple[float, ...]:
    return (
        stage.compute_seconds,
        stage.predicted_seconds,
        stage.serialise_seconds,
        stage.wire_seconds,
        stage.wait_seconds,
    )


def _worker_table(workers: tuple[WorkerReport, ...]) -> terminal.Table:
    columns = ("worker", "state", "address", "isa", "threads", "free", "reads", "seen")
    rows = tuple(
        (
            w.id,
            w.state,
            w.address,
            w.isa,
            str(w.threads),
            quantities.memory(w.memory_free_bytes),
            f"{quantities.size(w.read_bytes_per_second)}/s",
            quantities.duration(w.seen_seconds),
        )
        for w in workers
    )
    return terminal.Table(columns, rows, frozenset(columns[4:]), title="Workers")


def _link_table(links: tuple[LinkReport, ...]) -> terminal.Table:
    columns = ("from", "to", "round trip", "rate", "sent")
    rows = tuple(
        (
            x.start,
            x.end,
            f"{quantities.milliseconds(x.rtt_seconds)} ms",
            f"{quantities.size(x.bytes_per_second)}/s",
            quantities.size(x.sent_bytes),
        )
        for x in links
    )
    return terminal.Table(columns, rows, frozenset(columns[2:]), title="Links")


def json_of(report: ServiceReport) -> dict[str, object]:
    """The object of --json; names never change once released."""
    return {
        "model": report.model,
        "state": report.state,
        "detail": report.detail,
        "epoch": report.epoch,
        "plan": [_stage_json(s) for s in report.plan],
        "workers": [_worker_json(w) for w in report.workers],
        "links": [_link_json(x) for x in report.links],
        "measured_links": [_measured_json(x) for x in report.measured_links],
        "forecast": None if report.forecast is None else _forecast_json(report.forecast),
        "sessions": report.sessions,
        "queue": report.queue,
        "figures": {
            name: getattr(report.figures, name) for name in report.figures.__dataclass_fields__
        },
        "context_tokens": report.context_tokens,
        "expected_workers": report.expected_workers,
        "kv_type": report.kv_type,
        "wire": report.wire,
        "kv_bytes_per_token": report.kv_bytes_per_token,
        "potluck_version": report.potluck_version,
        "protocol": report.protocol,
    }


def _stage_json(stage: StageReport) -> dict[str, object]:
    fields = {name: getattr(stage, name) for name in stage.__dataclass_fields__}
    return {**fields, "span": list(stage.span)}


def _worker_json(worker: WorkerReport) -> dict[str, object]:
    return asdict(worker)


def _forecast_json(forecast: ForecastReport) -> dict[str, object]:
    fields = asdict(forecast)
    return {**fields, "advice": list(forecast.advice), "spares": list(forecast.spares)}


def _measured_json(link: MeasuredLinkReport) -> dict[str, object]:
    return {
        "from": link.start,
        "to": link.end,
        "rtt_seconds": link.rtt_seconds,
        "bytes_per_second": link.bytes_per_second,
    }


def _link_json(link: LinkReport) -> dict[str, object]:
    return {
        "from": link.start,
        "to": link.end,
        "rtt_seconds": link.rtt_seconds,
        "bytes_per_second": link.bytes_per_second,
        "sent_bytes": link.sent_bytes,
        "activation_bytes": link.activation_bytes,
    }
