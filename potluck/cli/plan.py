"""Show which machine would hold what of a model, and how fast they would be together."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from typing import Any

from potluck.cli import described, programs, quantities, running, terminal, values
from potluck.cli.join import MACHINE_OPTIONS, add_machine_options
from potluck.errors import PlanError, PotluckError, UsageError
from potluck.model import KvType
from potluck.plan import WIRES

HELP = "Show how machines would share a model, before it is downloaded"
USES = ("best", "all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck plan`."""
    parser.add_argument(
        "model", metavar="MODEL", help="a GGUF file, or a name such as synthetic:65b-q4_0"
    )
    parser.add_argument(
        "--workers",
        metavar="FILE",
        help="TOML that describes the machines, docs/planning.md (default: the workers of the"
        " cluster that runs, else this machine alone)",
    )
    parser.add_argument(
        "--connect", metavar="HOST:PORT", help="the cluster whose workers are planned"
    )
    parser.add_argument(
        "--limits", metavar="FILE", help="TOML of what workers may be used for, as of `serve`"
    )
    add_plan_options(parser)
    parser.add_argument(
        "--context",
        type=values.whole(1),
        metavar="N",
        help="most tokens of prompt and answer together (default: the model's, up to 4096)",
    )
    parser.add_argument(
        "--max-sessions",
        type=values.whole(1, 256),
        metavar="N",
        help="contexts that KV is wanted for (default 8); fewer if no more fit",
    )
    parser.add_argument(
        "--kv-type",
        choices=[kv_type.value for kv_type in KvType],
        help="how keys and values are kept (f16)",
    )
    parser.add_argument("--wire", choices=WIRES, help="how activations travel (f32)")
    parser.add_argument(
        "--replicas",
        action="store_true",
        default=None,
        help="plan further pipelines of the model too, each a service of its own",
    )
    parser.add_argument(
        "--describe", action="store_true", help="measure this machine and print its [[worker]]"
    )
    add_machine_options(
        parser.add_argument_group("this machine, described or planned alone (as of `join`)")
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """What a plan is made for; `serve` has them too."""
    parser.add_argument(
        "--sessions",
        type=values.whole(1, 256),
        metavar="N",
        help="answers at once that the plan is made to be fast for (default 1)",
    )
    parser.add_argument(
        "--use",
        choices=USES,
        help="best: who would slow the others is a spare; all: each worker holds layers",
    )


PLAN_OPTIONS = ("sessions", "use")


def run(args: argparse.Namespace) -> int:
    """Prints the plan. Exit code 1, with the numbers, if there is none."""
    if args.describe:
        return _describe(args)
    options = programs.options(args, *PLAN_OPTIONS, "context", "max_sessions", "kv_type", "wire")
    options += programs.options(args, "limits", "replicas")
    if args.workers is not None:
        if args.connect is not None:
            raise UsageError("--workers and --connect exclude each other")
        _refuse_machine_options(args, "--workers describes machines")
        options += ["--workers-file", _file(args.workers)]
        description = ""
    else:
        description = json.dumps(_machines(args))
    said = programs.output_of(
        "potluck-coordinator", args.model, "--plan", *options, stdin=description
    )
    planned: dict[str, Any] = json.loads(said)
    if args.json:
        print(json.dumps(planned))
        return 0
    print(heading(planned) + "\n")
    terminal.print_tables([stage_table(planned), speed_table(planned)])
    print("\n" + told(planned, terminal.columns(sys.stdout)))
    return 0


def _file(workers: str) -> str:
    if workers.isdecimal():
        raise UsageError(
            f"--workers {workers}: a file that describes machines, not how many",
            remedy="in the file, `count = N` makes N alike; `potluck show MODEL --workers N`"
            " shows what N equal ones would hold",
        )
    return workers


def _machines(args: argparse.Namespace) -> dict[str, object]:
    """The workers of the cluster that is meant or runs here, else this machine."""
    asked = args.connect or os.environ.get("POTLUCK_CONNECT")
    if asked or running.clusters():
        address = running.address_of(args.connect)
        _refuse_machine_options(args, f"the workers of {address} are planned")
        found = asyncio.run(_workers_of(address))
        terminal.note(f"the workers of the cluster at {address}:")
        return found
    terminal.note("this machine alone; --workers FILE plans others (docs/planning.md):")
    return {"worker": [_this_machine(args)]}


def _refuse_machine_options(args: argparse.Namespace, why: str) -> None:
    """They would change nothing. A variable may set --threads, which is no mistake."""
    for name in MACHINE_OPTIONS:
        if name != "threads" and getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} is of this machine, and {why}")


async def _workers_of(address: str) -> dict[str, object]:
    from potluck.client import Client

    async with Client(address) as client:
        report = await client.status()
    found = described.of_service(report)
    if not found["worker"]:
        raise PlanError(
            f"the cluster at {address} has no worker yet",
            remedy="start some with `potluck join`, or describe them with --workers FILE",
        )
    return found


def _describe(args: argparse.Namespace) -> int:
    table = _this_machine(args)
    print(json.dumps(table) if args.json else described.toml_of(table), end="\n" * args.json)
    return 0


def _this_machine(args: argparse.Namespace) -> described.Table:
    options = programs.options(args, *MACHINE_OPTIONS)
    said = programs.output_of("potluck-worker", "--describe", args.model, *options)
    try:
        found = json.loads(said)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise PotluckError(f"potluck-worker --describe said {said[:80]!r}, not what it offers")
    return described.of_machine(found)


def heading(planned: dict[str, Any]) -> str:
    """The model, and what it is planned for."""
    stages = quantities.count(len(planned["stages"]), "worker")
    if planned["replicas"]:
        stages += f" and {quantities.count(len(planned['replicas']), 'further pipeline')}"
    weights = quantities.memory(planned["weights_bytes"])
    return (
        f"{planned['model']} on {stages}: {planned['n_layers']} layers, {weights} of weights,\n"
        f"context {planned['context_tokens']:,}, KV {planned['kv_type']}, planned for"
        f" {quantities.count(planned['sessions'], 'answer')} at once"
    )


def stage_table(planned: dict[str, Any]) -> terminal.Table:
    """Who would hold what, in the order of the pipeline; milliseconds are of one token."""
    columns = ("worker", "layers", "memory", "of free", "ms a token", "share")
    rows = tuple(
        (
            s["worker"],
            f"{s['span'][0]}-{s['span'][1] - 1}",
            quantities.memory(s["memory_bytes"]),
            quantities.memory(s["memory_free_bytes"]),
            quantities.milliseconds(s["predicted_seconds"]),
            f"{s['share']:.0%}",
        )
        for s in planned["stages"]
    )
    return terminal.Table(columns, rows, frozenset(columns[2:]))


def speed_table(planned: dict[str, Any]) -> terminal.Table:
    """Tokens a second for one answer, for one a stage, for twice as many."""
    columns = ("answers at once", "tokens/s each", "tokens/s in total")
    rows = tuple(
        (
            f"{s['sessions']}",
            _rate(s["tokens_per_second_each"]),
            _rate(s["tokens_per_second"]),
        )
        for s in planned["forecast"]["speeds"]
    )
    return terminal.Table(columns, rows, frozenset(columns))


def facts(planned: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values below the tables."""
    forecast, stages, kv = planned["forecast"], planned["stages"], planned["kv"]
    prompt = forecast["first_token_prompt_tokens"]
    slowest = max(stages, key=lambda s: float(s["predicted_seconds"]))
    link = max(planned["links"], key=lambda x: float(x["predicted_seconds"]))
    contexts = kv["tokens"] // planned["context_tokens"]
    room = f"{kv['tokens']:,} tokens, {quantities.count(contexts, 'whole context')}"
    found = [
        ("first token", f"{quantities.duration(forecast['first_token_seconds'])}, prompt {prompt}"),
        ("loading", _loading(forecast["load_seconds"])),
        ("slowest stage", f"{slowest['worker']}, {_ms(slowest)}"),
        ("slowest link", f"{link['from']} to {link['to']}, {_ms(link)}"),
        ("room for KV", room),
    ]
    if planned["spares"]:
        found.append(("spare", quantities.names(planned["spares"])))
    for i, replica in enumerate(planned["replicas"]):
        held = ", ".join(f"{s['worker']} {s['span'][0]}-{s['span'][1] - 1}" for s in replica)
        found.append((f"pipeline {i + 2}", held))
    return found


def told(planned: dict[str, Any], width: int) -> str:
    """Facts and advice in lines of at most `width` columns."""
    rows = [*facts(planned), *(("advice", line) for line in planned["advice"])]
    indent = max(len(name) for name, _ in rows) + 2
    return "\n".join(terminal.folded(name.ljust(indent), value, width) for name, value in rows)


def _ms(thing: dict[str, Any]) -> str:
    return f"{quantities.milliseconds(thing['predicted_seconds'])} ms"


def _loading(seconds: float) -> str:
    return quantities.duration(seconds) if seconds else "nothing has to be sent"


def _rate(per_second: float) -> str:
    """Three figures: 1.36, 12.4, 230; more of thousands: 1,776."""
    return f"{per_second:,.0f}" if per_second >= 999.5 else f"{per_second:#.3g}".rstrip(".")
