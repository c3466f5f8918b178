"""What the coordinator was told to do: its command line, as a frozen value."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from potluck import __version__
from potluck.errors import UsageError
from potluck.model import KvType
from potluck.plan import WIRES
from potluck.rpc import PROTOCOL, options

DEFAULT_CONTEXT_TOKENS = 4096  # or the model's own, if that is shorter
ROWS_LIMIT = 512  # of a step


class Use(Enum):
    """Which of the workers hold layers."""

    BEST = "best"  # those that make the plan fast; who would slow the others is a spare
    ALL = "all"  # each, so that what people started is what is used


@dataclass(frozen=True)
class Settings:
    """The command line. Raises UsageError, naming the option and its range."""

    model: str
    host: str = "127.0.0.1"
    grpc_port: int = options.DEFAULT_GRPC_PORT
    fleet_port: int = options.DEFAULT_FLEET_PORT
    workers: int = 1  # that the service waits for
    context_tokens: int = 0  # 0: DEFAULT_CONTEXT_TOKENS or the model's own
    prefill_chunk: int = 0  # prompt tokens of a step; 0: as forecast.chunk_of says
    max_sessions: int = 8
    queue: int = 32
    sessions: int = 1  # answers at once that the plan is made to be fast for
    use: Use = Use.BEST
    limits: str = ""  # a file of what workers may be used for; empty: none
    kv_type: KvType = KvType.F16
    wire: str = "f32"  # one of WIRES: how activations travel between workers
    chat_template: str = ""  # name of a built-in one; empty: the model's own
    stop_with_stdin: bool = False
    log_level: str = "info"
    plan_only: bool = False  # print a plan and end; nothing below matters without it
    replicas: bool = False  # plan further pipelines too, each a service of its own
    workers_file: str = ""  # of the described workers; empty: standard input, as JSON

    def __post_init__(self) -> None:
        check_loopback(self.host)
        for name, value, low, high in (
            ("--grpc-port", self.grpc_port, 0, 65535),
            ("--fleet-port", self.fleet_port, 0, 65535),
            ("--workers", self.workers, 1, 256),
            ("--context", self.context_tokens, 0, 2**20),
            ("--prefill-chunk", self.prefill_chunk, 0, ROWS_LIMIT),
            ("--max-sessions", self.max_sessions, 1, 256),
            ("--queue", self.queue, 0, 65536),
            ("--sessions", self.sessions, 1, 256),
        ):
            if not low <= value <= high:
                raise UsageError(f"{name}: {low} to {high}, not {value}")
        if self.grpc_port == self.fleet_port != 0:
            raise UsageError(f"--grpc-port and --fleet-port are both {self.grpc_port}")
        if self.workers_file and not self.plan_only:
            raise UsageError("--workers-file goes with --plan: a service plans its own workers")
        if self.replicas and not self.plan_only:
            raise UsageError("--replicas goes with --plan: a service has one pipeline")


def check_loopback(host: str) -> None:
    """Raises UsageError beyond loopback: without certificates nothing is served there."""
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise UsageError(
            f"--host {host}: this release serves on loopback only; it has no authentication yet",
            remedy="use --host 127.0.0.1, and an ssh tunnel to reach it from elsewhere",
        )


def settings_of(arguments: Sequence[str] | None = None) -> Settings:
    """Reads the command line (None: sys.argv). Raises UsageError; argparse exits on a bad one."""
    parser = argparse.ArgumentParser(
        prog="potluck-coordinator",
        description="Takes requests and lets workers answer them; `potluck serve` starts it.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a GGUF file, or a name that `potluck list` knows")
    add("--host", default=Settings.host, help="address to listen on (loopback only)")
    add("--grpc-port", type=int, default=Settings.grpc_port, help="for people; 0: any free one")
    add("--fleet-port", type=int, default=Settings.fleet_port, help="for workers; 0: any free one")
    add("--workers", type=int, default=Settings.workers, help="wait for so many workers")
    add("--context", type=_positive, default=0, help="most tokens of prompt and answer together")
    add("--prefill-chunk", type=int, default=0, help="prompt tokens of a step; 0: by the plan")
    add("--max-sessions", type=int, default=Settings.max_sessions, help="answers at the same time")
    add("--queue", type=int, default=Settings.queue, help="requests that may wait for a place")
    add("--sessions", type=int, default=Settings.sessions, help="plan for so many answers at once")
    uses = [use.value for use in Use]
    add("--use", choices=uses, default="best", help="best: who slows the others is a spare")
    add("--limits", metavar="FILE", default="", help="TOML: what workers may be used for")
    names = [kv_type.value for kv_type in KvType]
    add("--kv-type", choices=names, default="f16", help="how keys and values are kept")
    add("--wire", choices=WIRES, default=Settings.wire, help="how activations travel")
    add("--chat-template", metavar="NAME", default="", help="instead of the model's own")
    add("--replicas", action="store_true", help="with --plan: further pipelines too")
    add("--plan", action="store_true", help="print the plan for described workers and end")
    add(
        "--workers-file", metavar="FILE", default="", help="TOML of those workers; else JSON, stdin"
    )
    add("--stop-with-stdin", action="store_true", help="stop cleanly when standard input closes")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    version = f"potluck {__version__}, protocol {PROTOCOL}"
    add("--version", action="version", version=version)
    given = parser.parse_args(arguments)
    return Settings(
        model=given.model,
        host=given.host,
        grpc_port=given.grpc_port,
        fleet_port=given.fleet_port,
        workers=given.workers,
        context_tokens=given.context,
        prefill_chunk=given.prefill_chunk,
        max_sessions=given.max_sessions,
        queue=given.queue,
        sessions=given.sessions,
        use=Use(given.use),
        limits=given.limits,
        kv_type=KvType(given.kv_type),
        wire=given.wire,
        chat_template=given.chat_template,
        stop_with_stdin=given.stop_with_stdin,
        log_level=given.log_level,
        plan_only=given.plan,
        replicas=given.replicas,
        workers_file=given.workers_file,
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1, not {value}")
    return value
