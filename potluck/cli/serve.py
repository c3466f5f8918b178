"""Serve a model: starts the coordinator and local workers, waits for others, keeps all running."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
from pathlib import Path

from potluck.cli import fetching, programs, running, terminal, values
from potluck.cli.cluster import ClusterSettings, LocalCluster
from potluck.cli.join import MACHINE_OPTIONS, add_machine_options
from potluck.cli.plan import PLAN_OPTIONS, add_plan_options
from potluck.model import KvType
from potluck.plan import WIRES
from potluck.rpc.options import DEFAULT_FLEET_PORT, DEFAULT_GRPC_PORT
from potluck.synthetic import is_synthetic

HELP = "Serve a model, on this machine or with others"
EXAMPLE = "The capital of France is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck serve`."""
    parser.add_argument("model", metavar="MODEL", help="a GGUF file, or a name (`potluck list`)")
    parser.add_argument(
        "--local-workers",
        type=values.whole(0, 64),
        default=0,
        metavar="N",
        help="start N workers on this machine; ports not asked for are then any free ones",
    )
    parser.add_argument(
        "--workers",
        type=values.whole(1, 256),
        metavar="N",
        help="workers to wait for, local ones included (default: the local ones, or 1)",
    )
    parser.add_argument("--host", metavar="H", help="address to listen on (default 127.0.0.1)")
    port = values.whole(0, 65535)
    parser.add_argument(
        "--grpc-port", type=port, metavar="P", help=f"for people (default {DEFAULT_GRPC_PORT})"
    )
    parser.add_argument(
        "--fleet-port", type=port, metavar="P", help=f"for workers (default {DEFAULT_FLEET_PORT})"
    )
    parser.add_argument(
        "--context",
        type=values.whole(1),
        metavar="N",
        help="most tokens of prompt and answer together (default: the model's, up to 4096)",
    )
    parser.add_argument(
        "--prefill-chunk",
        type=values.whole(1, 512),
        metavar="N",
        help="tokens of a prompt a step (default 64 with one worker, 32 with several)",
    )
    parser.add_argument(
        "--max-sessions", type=values.whole(1), metavar="N", help="answers at once (default 8)"
    )
    parser.add_argument(
        "--queue", type=values.whole(0), metavar="N", help="requests that may wait (default 32)"
    )
    add_plan_options(parser)
    parser.add_argument(
        "--limits", metavar="FILE", help="TOML of what workers may be used for: docs/planning.md"
    )
    parser.add_argument(
        "--kv-type",
        choices=[kv_type.value for kv_type in KvType],
        help="how keys and values are kept: f16 (default), or q8 in about half the memory",
    )
    parser.add_argument(
        "--wire",
        choices=WIRES,
        help="how activations travel: f32 (default, exact), f16 in half, q8 in a quarter the bytes",
    )
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="instead of the model's own: alpaca, chatml, llama-2, llama-3, mistral, vicuna",
    )
    add_machine_options(parser)
    parser.add_argument("--log-level", metavar="L", help="debug, info, warning or error")
    parser.add_argument("--json", action="store_true", help="print one JSON line when it serves")


def run(args: argparse.Namespace) -> int:
    """Serves until it is stopped. 0 after Ctrl-C or SIGTERM, 130 if it did not serve yet."""
    file = fetching.bring(args.model)
    try:
        return asyncio.run(_serve(settings_of(args, file.path), args.model, as_json=args.json))
    except asyncio.CancelledError:  # a second signal while it drained
        return 130


def settings_of(args: argparse.Namespace, path: Path) -> ClusterSettings:
    """What is to be started. The programs get the name if it is one: workers elsewhere know it."""
    is_file = "/" in args.model or Path(args.model).exists()
    names = ["host", "grpc_port", "fleet_port", "context", "prefill_chunk", "max_sessions"]
    names += ["queue", "kv_type", "wire", "chat_template", "log_level", "limits", *PLAN_OPTIONS]
    if args.local_workers:
        if args.workers is None or args.workers <= args.local_workers:
            args.use = args.use or "all"  # who asks for N on one machine wants to see N
        args.grpc_port = args.grpc_port or 0
        args.fleet_port = args.fleet_port or 0
    return ClusterSettings(
        model=str(path.absolute()) if is_file and not is_synthetic(args.model) else args.model,
        local_workers=args.local_workers,
        workers=args.workers or args.local_workers or 1,
        coordinator_options=tuple(programs.options(args, *names)),
        worker_options=tuple(programs.options(args, *MACHINE_OPTIONS, "log_level")),
    )


async def _serve(settings: ClusterSettings, name: str, *, as_json: bool) -> int:
    from potluck.client import Client

    cluster = LocalCluster(settings)
    served = False
    async with cluster.stopped_in_the_end() as signals:
        await cluster.start()
        here = running.RunningCluster(os.getpid(), cluster.address, name)
        with running.announced(here):
            async with Client(cluster.address) as client:
                _tell_how_to_join(cluster)
                await cluster.until_serving(client)
                served = True
                _tell_ready(cluster, name, as_json=as_json)
                await cluster.keep(client)
    return 0 if served or not signals.interrupted else 130


def _tell_how_to_join(cluster: LocalCluster) -> None:
    missing = cluster.settings.workers - cluster.settings.local_workers
    if missing > 0:
        terminal.note(f"waiting for {missing} more; on each machine run")
        terminal.note(f"  potluck join {cluster.address}")


def _tell_ready(cluster: LocalCluster, name: str, *, as_json: bool) -> None:
    if as_json:
        ready = {
            "model": name,
            "address": cluster.address,
            "pids": {"serve": os.getpid(), **cluster.pids},
        }
        print(json.dumps(ready), flush=True)
        return
    terminal.note(f"serving {name} at {cluster.address}; Ctrl-C stops it")
    if is_synthetic(name):
        terminal.note("  its weights are random: answers show how fast it is, and say nothing")
    terminal.note(f"  potluck chat --connect {cluster.address}")
    terminal.note(f"  potluck generate --connect {cluster.address} {shlex.quote(EXAMPLE)}")
    terminal.aside(f"  (log: {cluster.log})")
