"""Continue a prompt, token by token."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import replace

from potluck.cli import asking, running, streaming, terminal, values
from potluck.errors import ContextExceeded, UsageError
from potluck.replies import AnswerOptions, Done, Token

USUAL_TOKENS = 256  # or what the context has room for: a raw continuation may never end
HELP = "Continue a prompt as it is (a conversation: chat)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck generate`."""
    parser.add_argument(
        "prompt", type=values.plain, metavar="PROMPT", help="the text to continue; -: from stdin"
    )
    asking.add_connect(parser)
    asking.add_answer_options(parser, usual_tokens=str(USUAL_TOKENS))
    parser.add_argument(
        "--logprobs",
        type=values.whole(0, 20),
        metavar="N",
        help="log-probabilities of each token and of the N most likely (with --json)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> int:
    """Prints the continuation."""
    if args.logprobs is not None and not args.json:
        raise UsageError("--logprobs are printed with --json only", remedy="add --json")
    options = asking.answer_options(args)
    address = running.address_of(args.connect)
    asked_tokens = args.max_tokens is not None
    work = _ask(
        address, _prompt(args.prompt), options, asked_tokens=asked_tokens, shown=not args.json
    )
    answer = asyncio.run(work)
    assert answer.done is not None  # a stream ends with Done or raises
    if args.json:
        print(json.dumps(_report(answer, answer.done, options), ensure_ascii=False))
    elif sys.stderr.isatty():
        terminal.aside(f"({streaming.speed(answer.done)})")
    return 0


def _prompt(given: str) -> str:
    if given != "-":
        return given
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt is not UTF-8: byte {error.start} is no text") from error


async def _ask(
    address: str, prompt: str, options: AnswerOptions, *, asked_tokens: bool, shown: bool
) -> streaming.Answer:
    from potluck.client import Client

    answer = streaming.Answer()
    first = options if asked_tokens else replace(options, max_tokens=USUAL_TOKENS)
    async with Client(address) as client:
        try:
            await streaming.stream(client.generate(prompt, first), answer, shown=shown)
        except ContextExceeded:
            if asked_tokens:
                raise
            # The number was our wish and nobody's: then as many as there is room for.
            await streaming.stream(client.generate(prompt, options), answer, shown=shown)
    return answer


def _report(answer: streaming.Answer, done: Done, options: AnswerOptions) -> dict[str, object]:
    """The object of --json; names never change once released."""
    return {
        "text": answer.text,
        "tokens": [token.id for token in answer.tokens],
        "logprobs": None if options.logprobs is None else [_logprob(t) for t in answer.tokens],
        "finish_reason": done.finish_reason.value,
        "usage": {
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.answer_tokens,
            "total_tokens": done.prompt_tokens + done.answer_tokens,
        },
        "timings": {
            "queue_seconds": done.queue_seconds,
            "prefill_seconds": done.prefill_seconds,
            "decode_seconds": done.decode_seconds,
            "prompt_tokens_per_second": done.prompt_tokens_per_second,
            "tokens_per_second": done.tokens_per_second,
        },
        "seed": done.seed,
    }


def _logprob(token: Token) -> dict[str, object]:
    top = [{"token": t.token, "logprob": t.logprob} for t in token.top]
    return {"token": token.id, "logprob": token.logprob, "top": top}
