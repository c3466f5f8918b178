"""Make this machine a worker of a cluster: becomes `potluck-worker` with the same options."""

from __future__ import annotations

import argparse
import os
import sys

from potluck.cli import programs, running, values
from potluck.plan import WEIGHTS

HELP = "Make this machine a worker of a cluster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck join`: those of potluck-worker."""
    parser.add_argument("coordinator", metavar="HOST:PORT", help="what `potluck serve` printed")
    parser.add_argument("--token", metavar="T", help="the join token; not needed on one machine")
    parser.add_argument("--name", metavar="ID", help="this worker's name (default: the machine's)")
    parser.add_argument("--host", metavar="H", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=values.whole(0, 65535), metavar="P", help="0: any free one")
    add_machine_options(parser)
    parser.add_argument(
        "--pin",
        action="store_true",
        default=None,
        help="keep each thread on a CPU of its own, fast cores first; for the only worker of a"
        " machine",
    )
    parser.add_argument("--log-level", metavar="L", help="debug, info, warning or error")


def add_machine_options(parser: argparse._ActionsContainer) -> None:
    """What of this machine a worker may use."""
    parser.add_argument(
        "--threads",
        type=values.whole(1, 1024),
        default=values.from_environment("THREADS"),
        metavar="N",
        help="threads of the engine (default: POTLUCK_THREADS, else as many as are fastest)",
    )
    parser.add_argument(
        "--isa", metavar="NAME", help="kernels (default: POTLUCK_ISA, else the best)"
    )
    parser.add_argument(
        "--memory",
        type=values.size_bytes,
        metavar="SIZE",
        help="memory it may use, such as '2 GiB' (default: what is free)",
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="arena (default): in memory; mmap: on disk too, for a quick start and for more layers"
        " than memory holds",
    )
    parser.add_argument(
        "--pack-space",
        type=values.size_bytes,
        metavar="SIZE",
        help="most disk space that --weights mmap takes (default: all but 1 GiB)",
    )
    parser.add_argument(
        "--tensor-space",
        type=values.size_bytes,
        metavar="SIZE",
        help="most disk space for weights fetched from other machines (default: all but 1 GiB)",
    )


MACHINE_OPTIONS = ("threads", "isa", "memory", "weights", "pack_space", "tensor_space")


def run(args: argparse.Namespace) -> int:
    """Does not return: the worker takes this process over, and its exit code is ours."""
    command = [
        programs.path_of("potluck-worker"),
        *("--coordinator", running.with_port(args.coordinator)),
        *programs.options(args, "token", "name", "host", "port", *MACHINE_OPTIONS),
        *programs.options(args, "pin", "log_level"),
    ]
    sys.stdout.flush()
    os.execv(command[0], command)
