"""Measure one engine on this machine: prompt processing and generation, no network.

Options, tests and results are llama-bench's, but for -b, which counts sessions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from potluck.cli import fetching, measuring, memory, quantities, reporting, terminal, values
from potluck.errors import PlanError, UsageError
from potluck.gguf import GgufFile
from potluck.model import KvType

if TYPE_CHECKING:
    from potluck.engine import Engine

HELP = "Measure one engine on this machine, without a network"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck bench`."""
    parser.epilog = (
        "Options of the test take lists (-p 128,512), ranges (-b 1-8*2, -d 0-4096+1024) and may be"
        " given again; every combination is measured."
    )
    parser.add_argument("model", metavar="MODEL", help="a GGUF file, or a name (`potluck list`)")
    count = values.wholes(0, 2**20)
    test = parser.add_argument_group("the test")
    for names, kind, default, text in (
        (("-p", "--n-prompt"), count, [512], "tokens of the prompt (512; 0: none)"),
        (("-n", "--n-gen"), count, [128], "tokens made (128; 0: none)"),
        (("-pg", "--prompt-gen"), values.pair(0, 2**20), [], "P,N: a prompt and then generation"),
        (("-d", "--n-depth"), count, [0], "positions in the KV before the test (0)"),
        (
            ("-b", "--batch"),
            values.wholes(1, measuring.MOST_SESSIONS),
            [1],
            "sessions that also generate at once, besides one (1)",
        ),
        (
            ("-t", "--threads"),
            values.wholes(1, 1024),
            values.from_environment("THREADS") or [0],
            "of the engine (POTLUCK_THREADS, else all cores)",
        ),
    ):
        test.add_argument(*names, type=kind, default=default, action=values.Several, help=text)
    parser.add_argument(
        "--layers",
        type=_layer_count,
        metavar="N",
        help="measure only the first N layers and the head, or `fit`: as many as memory holds"
        " (all; of synthetic models, as many as fit)",
    )
    parser.add_argument("-r", "--repetitions", type=values.whole(1, 1000), default=5, help="(5)")
    parser.add_argument(
        "--kv-type",
        choices=[kv_type.value for kv_type in KvType],
        default=KvType.F16.value,
        help="how keys and values are kept (f16)",
    )
    parser.add_argument("--isa", default="auto", metavar="NAME", help="kernels (POTLUCK_ISA)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("-o", "--output", choices=reporting.STYLES, default="table", help="(table)")
    output.add_argument(
        "--json", action="store_const", const="json", dest="output", help="print a list of objects"
    )


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    tests = measuring.grid(args.n_prompt, args.n_gen, args.prompt_gen, args.n_depth, args.batch)
    if not tests:
        raise UsageError("-p 0 and -n 0 leave nothing to measure")
    file = fetching.bring(args.model)

    from potluck import engine as engines
    from potluck.cli import timing

    subject = _subject(file, KvType(args.kv_type), tests, args.layers)
    makers = [engines.Engine(threads, args.isa) for threads in dict.fromkeys(args.threads)]
    results = _measured(subject, makers, tests, args.repetitions)
    reporting.write(args.output, subject, results, timing.cpu_name())
    return 0


FIT = 0  # of --layers


def _layer_count(text: str) -> int:
    return FIT if text == "fit" else values.whole(1, 2**12)(text)


def _subject(
    file: GgufFile, kv_type: KvType, tests: Sequence[measuring.Test], layers: int | None
) -> measuring.Subject:
    """What is measured: the layers that were asked for, or those that fit.

    Raises UsageError (a context or layers that the model does not have) and, before anything is
    loaded, PlanError with the bytes.
    """
    from potluck.cli import timing

    subject = timing.subject_of(file, kv_type, layers or None)
    subject.check_context(tests)
    free_bytes = memory.share_bytes(1)
    if free_bytes is None or _needed_bytes(subject, tests) <= free_bytes:
        return subject
    most = _most_layers(subject, tests, free_bytes)
    adapts = layers == FIT or (layers is None and file.synthetic is not None)
    if most == 0 or not adapts:
        raise _too_large(subject, tests, free_bytes, most)
    terminal.note(f"{most} of {subject.whole.n_layers} layers fit into memory and are measured")
    return timing.subject_of(file, kv_type, most)


def _needed_bytes(subject: measuring.Subject, tests: Sequence[measuring.Test]) -> int:
    return subject.size_bytes + subject.kv_bytes(tests) + subject.buffer_bytes(tests)


def _most_layers(
    subject: measuring.Subject, tests: Sequence[measuring.Test], free_bytes: int
) -> int:
    """How many of the first layers fit beside embedding and head; 0: none."""
    from potluck.cli import timing

    for n_layers in range(subject.config.n_layers - 1, 0, -1):
        part = timing.subject_of(subject.file, subject.kv_type, n_layers)
        if _needed_bytes(part, tests) <= free_bytes:
            return n_layers
    return 0


def _too_large(
    subject: measuring.Subject, tests: Sequence[measuring.Test], free_bytes: int, most: int
) -> PlanError:
    sessions = measuring.rooms(tests)
    count = quantities.count(len(sessions), "session")
    kv_bytes, weight_bytes = subject.kv_bytes(tests), subject.size_bytes
    remedies = ["lower -d, -b, -p or -n"] if weight_bytes < free_bytes else []
    remedies += [f"take --layers {most}: as many as fit"] if most else []
    return PlanError(
        f"the KV of {count} of up to {max(sessions):,} positions takes"
        f" {quantities.memory(kv_bytes)} beside {quantities.memory(weight_bytes)} of weights and"
        f" {quantities.memory(subject.buffer_bytes(tests))} of buffers;"
        f" {quantities.memory(free_bytes)} are free",
        remedy=", or ".join(remedies),
    )


def _measured(
    subject: measuring.Subject,
    makers: Sequence[Engine],
    tests: Sequence[measuring.Test],
    repeats: int,
) -> Iterator[measuring.Measured]:
    """Each test on each engine; one engine at a time holds the model."""
    from potluck.cli import timing

    done, total = 0, len(makers) * len(tests) * (repeats + 1)
    with terminal.board() as board:
        meter = terminal.Meter(subject.path.name, "loading")

        def show(done_bytes: int) -> None:
            board.show([meter.line(done_bytes, subject.size_bytes, time.monotonic())])

        for engine in makers:
            loaded = timing.Loaded(subject, engine, tests, show)
            for test in tests:
                state = f"{test.name}, {quantities.count(engine.threads, 'thread')}"
                started = datetime.now(UTC)
                board.show([terminal.Line("measuring", state, done, total)])
                before = engine.read_bandwidth()
                loaded.warm_up(test)
                seconds: list[float] = []
                for _ in range(repeats):
                    done += 1
                    board.show([terminal.Line("measuring", state, done, total)])
                    seconds.append(loaded.run(test))
                done += 1
                # The better reading: what else runs on the machine lowers one of them.
                bandwidth = max(before, engine.read_bandwidth())
                yield measuring.Measured(
                    test, tuple(seconds), bandwidth, started, engine.isa, engine.threads
                )
            del loaded  # its memory, before the next is loaded
