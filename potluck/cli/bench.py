"""Measure one engine on this machine: prompt processing and generation, no network.

The JSON has the field names of llama-bench, so that scripts which read the one read the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

from potluck.cli import fetching, measuring, quantities, terminal, values
from potluck.errors import UsageError
from potluck.model import KV_PAGE_TOKENS, config_of, kv_bytes_per_token, span_tensors
from potluck.plan import Span

HELP = "Measure one engine on this machine, without a network"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck bench`."""
    parser.add_argument("model", metavar="MODEL", help="a GGUF file, or a name (`potluck list`)")
    count = values.whole(0, 2**20)
    parser.add_argument(
        "-p", "--n-prompt", type=count, default=512, help="tokens of the prompt (512)"
    )
    parser.add_argument("-n", "--n-gen", type=count, default=128, help="tokens made (128)")
    parser.add_argument(
        "-b",
        "--batch",
        type=values.whole(1, 256),
        default=1,
        help="also generate for so many sessions at once (1)",
    )
    parser.add_argument(
        "-t",
        "--threads",
        type=values.whole(1, 1024),
        default=values.from_environment("THREADS"),
        help="of the engine (POTLUCK_THREADS, else all cores)",
    )
    parser.add_argument("-r", "--repetitions", type=values.whole(1, 1000), default=5, help="(5)")
    parser.add_argument("--isa", default="auto", metavar="NAME", help="kernels (POTLUCK_ISA)")
    parser.add_argument("--json", action="store_true", help="print a list of objects")


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    if not args.n_prompt and not args.n_gen:
        raise UsageError("-p 0 and -n 0 leave nothing to measure")
    path = fetching.bring(args.model)
    with terminal.board() as board:
        loaded = _load(path, args, board)
        tests = [measuring.Test("pp", args.n_prompt, 1), measuring.Test("tg", args.n_gen, 1)]
        if args.batch > 1:
            tests.append(measuring.Test("tg", args.n_gen, args.batch))
        measured = [_measure(loaded, t, args.repetitions, board) for t in tests if t.n_tokens]
    if args.json:
        print(json.dumps([m.json_of(loaded) for m in measured]))
    else:
        terminal.print_tables([_table(loaded, measured)])
    return 0


def _load(path: Path, args: argparse.Namespace, board: terminal.Board) -> measuring.Loaded:
    from potluck import engine as engines
    from potluck import gguf

    file = gguf.read(path)
    config = config_of(file)
    longest = max(args.n_prompt, args.n_gen)
    if longest > config.context_tokens:
        raise UsageError(f"{longest} tokens; the model's context is {config.context_tokens}")
    whole = Span(0, config.n_layers)
    tensors = span_tensors(file, config, whole, embeds=True, has_head=True)
    pages = args.batch * -(-longest // KV_PAGE_TOKENS)
    engine = engines.Engine(args.threads or 0, args.isa)
    shard = engines.Shard(
        engine,
        engines.config_for(config),
        whole.start,
        whole.stop,
        embeds=True,
        has_head=True,
        kv_bytes=pages * KV_PAGE_TOKENS * kv_bytes_per_token(config, whole),
    )
    meter = terminal.Meter(path.name, "loading")
    total = sum(t.size_bytes for t in tensors)
    engines.load(
        shard, file, tensors, lambda done: board.show([meter.line(done, total, time.monotonic())])
    )
    return measuring.Loaded(file, config, tuple(tensors), engine, shard)


def _measure(
    loaded: measuring.Loaded, test: measuring.Test, repeats: int, board: terminal.Board
) -> measuring.Measured:
    """One warm-up, then `repeats` runs."""
    once = (
        measuring.prompt_run(loaded, test)
        if test.kind == "pp"
        else measuring.generate_run(loaded, test)
    )
    started = datetime.now(UTC)
    board.show([terminal.Line(test.name, "measuring the read bandwidth")])
    bandwidth = loaded.engine.read_bandwidth()
    seconds: list[float] = []
    for i in range(repeats + 1):
        board.show([terminal.Line(test.name, "running" if i else "warming up", i, repeats + 1)])
        seconds.append(once())
    return measuring.Measured(test, tuple(seconds[1:]), bandwidth, started)


def _table(loaded: measuring.Loaded, measured: list[measuring.Measured]) -> terminal.Table:
    columns = ("model", "isa", "threads", "test", "tokens/s", "+-", "GB/s", "of memory", "GMAC/s")
    rows = []
    for m in measured:
        rate = m.gb_per_second(loaded)
        rows.append(
            (
                loaded.type_name,
                loaded.engine.isa,
                str(loaded.engine.threads),
                m.test.name,
                f"{statistics.mean(m.tokens_per_second):.2f}",
                f"{measuring.deviation(m.tokens_per_second):.2f}",
                "" if rate is None else f"{rate:.1f}",
                "" if rate is None else f"{rate * 1e9 / m.read_bandwidth:.0%}",
                f"{m.gmac_per_second(loaded):.1f}",
            )
        )
    best = max(m.read_bandwidth for m in measured)
    title = f"Memory reads {quantities.size(best)}/s on {measuring.cpu_name()}"
    return terminal.Table(columns, tuple(rows), frozenset((columns[2], *columns[4:])), title)
