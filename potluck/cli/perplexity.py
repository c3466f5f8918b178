"""Measure how well a model predicts a text, and how far it is from a base model.

Windows and figures are those of llama.cpp's perplexity tool. One engine computes them here, or a
running service does.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from potluck.cli import asking, fetching, quantities, running, terminal, text_file, values
from potluck.cli.scored import Bar, Scored, show
from potluck.errors import UsageError
from potluck.logit_base import BaseFile, BaseWriter
from potluck.model import KvType
from potluck.perplexity import (
    F32,
    I32,
    LEAST_WINDOW_TOKENS,
    RowsToRead,
    as_read,
    compare,
    surprise,
    windows_of,
)

if TYPE_CHECKING:
    from potluck.cli.measuring import Subject
    from potluck.cli.predictions import Predictions

HELP = "Measure how well a model predicts a text"
USUAL_WINDOW_TOKENS = 512  # llama.cpp's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck perplexity`."""
    parser.epilog = (
        "Figures compare with llama.cpp's perplexity tool: the same windows, the second half of"
        " each scored, files of --save-base in its format."
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a GGUF file, or a name (`potluck list`); without it a running service is asked",
    )
    asking.add_connect(parser)
    parser.add_argument("--file", metavar="TEXT", help="the text, UTF-8; -: from stdin")
    parser.add_argument(
        "--context",
        type=values.whole(LEAST_WINDOW_TOKENS, 2**20),
        metavar="N",
        help=f"tokens of a window ({USUAL_WINDOW_TOKENS})",
    )
    parser.add_argument(
        "--chunks", type=values.whole(1), metavar="N", help="score the first N windows (all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_engine_arguments(parser)


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that need a model in this process."""
    here = parser.add_argument_group("with MODEL")
    here.add_argument(
        "--threads",
        type=values.whole(1, 1024),
        default=values.from_environment("THREADS"),
        metavar="N",
        help="of the engine (POTLUCK_THREADS, else all cores)",
    )
    here.add_argument(
        "--kv-type",
        choices=[kv_type.value for kv_type in KvType],
        help="how keys and values are kept (f16)",
    )
    base = here.add_mutually_exclusive_group()
    base.add_argument(
        "--save-base",
        metavar="FILE",
        type=Path,
        help="write the predictions, the base of others; an older base is replaced",
    )
    base.add_argument(
        "--kl-base",
        metavar="FILE",
        type=Path,
        help="compare with these predictions; it holds the text, too",
    )


def run(args: argparse.Namespace) -> int:
    """Scores and prints."""
    if args.file is None and args.kl_base is None:
        raise UsageError("--file is missing", remedy="see `potluck perplexity --help`")
    if args.model is None:
        for option in ("kl_base", "save_base"):
            if getattr(args, option) is not None:
                raise UsageError(
                    f"{asking.option_of(option)} needs one engine: a service tells no whole logits",
                    remedy="name the MODEL, which is then loaded here",
                )
        if args.kv_type is not None:
            raise UsageError("--kv-type: the service decides that", remedy="leave it out")
        scored = asyncio.run(_ask(running.address_of(args.connect), args))
    elif args.connect is not None:
        raise UsageError(
            "MODEL is loaded here, and --connect asks a service", remedy="leave one of them out"
        )
    else:
        scored = _score_here(args)
    show(scored, as_json=args.json)
    return 0


def _score_here(args: argparse.Namespace) -> Scored:
    """By one engine of this process."""
    with ExitStack() as stack:
        base = stack.enter_context(BaseFile(args.kl_base)) if args.kl_base is not None else None
        text = None if args.file is None else text_file.read(args.file)
        file = fetching.bring(args.model)

        from potluck import tokenizer
        from potluck.cli import predictions, timing

        kv_type = KvType(args.kv_type or KvType.F16)
        subject = timing.subject_of(file, kv_type)
        words = tokenizer.load(file)
        ids = None if text is None else words.encode(text, add_start=True)
        windows = _windows(ids, args, base, subject.config.vocab)
        scored = Scored(file.path.name, kv_type.value, windows.shape[1], len(windows))
        predictions.check(subject, scored.window_tokens)
        writer = None
        if args.save_base is not None:
            writer = BaseWriter(args.save_base, windows, subject.config.vocab)
            stack.enter_context(writer)
            taken, free = (quantities.size(n) for n in (writer.shape.size_bytes, writer.free_bytes))
            terminal.note(f"{args.save_base} will take {taken}; {free} are free")
        board = stack.enter_context(terminal.board())
        loaded = _load(subject, args.threads or 0, scored.window_tokens, board)
        bar = Bar(scored, board)
        started = time.perf_counter()
        for i, window in enumerate(windows):
            read = as_read(window, words.start_id if words.adds_start else None)
            rows = None if base is None else _BaseWindow(base, i)
            _score_window(scored, window, loaded.of(read), rows, writer, bar)
        scored.seconds = time.perf_counter() - started
    return scored


def _load(subject: Subject, threads: int, window_tokens: int, board: terminal.Board) -> Predictions:
    """The model in an engine, behind a bar."""
    from potluck import engine
    from potluck.cli import predictions

    meter = terminal.Meter(subject.path.name, "loading")

    def show(done_bytes: int) -> None:
        board.show([meter.line(done_bytes, subject.size_bytes, time.monotonic())])

    return predictions.Predictions(subject, engine.Engine(threads), window_tokens, show)


@dataclass(slots=True)
class _BaseWindow:
    """The rows of one window of a base, front to back."""

    file: BaseFile
    window: int
    n_taken: int = 0

    def next_rows(self, n: int) -> F32:
        """ln(probability) [n, vocab]."""
        rows = self.file.rows(self.window, self.n_taken, n)
        self.n_taken += n
        return rows


def _score_window(
    scored: Scored,
    window: I32,
    steps: Iterator[tuple[RowsToRead, F32]],
    base: _BaseWindow | None,
    writer: BaseWriter | None,
    bar: Bar,
) -> None:
    """Adds the surprises of one window to `scored`, step by step."""
    from potluck import engine

    for step, logits in steps:
        targets = window[step.stop - step.wanted + 1 : step.stop + 1]
        if step.wanted and base is not None:
            part = compare(logits, base.next_rows(step.wanted), targets, engine)
            scored.parts.append(part)
            scored.tally.add(part.surprise)
        elif step.wanted:
            scored.tally.add(surprise(logits, targets, engine))
        if step.wanted and writer is not None:
            writer.write(logits)
        bar.read(step.stop - step.start)


def _windows(
    ids: list[int] | None, args: argparse.Namespace, base: BaseFile | None, vocab: int
) -> I32:
    """Of the text, of the base, or of both, which must then agree."""
    if base is None:
        assert ids is not None, "checked before"
        return windows_of(ids, args.context or USUAL_WINDOW_TOKENS, args.chunks)
    shape = base.shape
    if shape.vocab != vocab:
        raise UsageError(
            f"{args.kl_base} is of a model with {shape.vocab:,} tokens, this one has {vocab:,}"
        )
    if args.context not in (None, shape.window_tokens):
        raise UsageError(
            f"{args.kl_base} has windows of {shape.window_tokens:,} tokens, not {args.context:,}",
            remedy="leave --context out, or make the base again",
        )
    windows = base.tokens[: args.chunks]
    if ids is None:
        return windows
    found = windows_of(ids, shape.window_tokens, len(windows))
    differing = (found != windows[: len(found)]).ravel().nonzero()[0]
    if len(differing):
        raise UsageError(
            f"{args.kl_base} is of another text, or cut by another tokenizer: from token"
            f" {differing[0]:,} on they differ",
            remedy="leave --file out to use the text of the base",
        )
    return found


async def _ask(address: str, args: argparse.Namespace) -> Scored:
    """Through the service at `address`."""
    from potluck.cli import prompt_scores
    from potluck.client import Client

    text = text_file.read(args.file)
    window_tokens = args.context or USUAL_WINDOW_TOKENS
    async with Client(address) as client:
        report = await client.status()
        prompt_scores.check(report, window_tokens)
        ids, start_id = await prompt_scores.tokens_of(client, text)
        windows = windows_of(ids, window_tokens, args.chunks)
        scored = Scored(report.model, report.kv_type, window_tokens, len(windows))
        with terminal.board() as board:
            bar = Bar(scored, board)
            read = (as_read(window, start_id) for window in windows)
            started = time.perf_counter()
            # A step more than stages is in flight, and as many windows keep it filled.
            n_asked = len(report.plan) + 1
            async with aclosing(
                prompt_scores.surprises(client, read, n_asked, bar.read)
            ) as surprises:
                async for found in surprises:
                    scored.tally.add(found)
            scored.seconds = time.perf_counter() - started
    return scored
