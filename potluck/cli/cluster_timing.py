"""How fast a running service answers, one stream and several at once.

Asks through the client as anyone would; every prompt is another one, answers are greedy and go on
after the model's end token, so that each round does the same work. For one event loop.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING

from potluck.cli import cluster_figures
from potluck.cli.cluster_figures import ClusterFigures, LinkBytes, StreamsFigures
from potluck.errors import ContextExceeded, Full, StageLost
from potluck.replies import AnswerOptions, Piece, Prefill, ServiceReport
from potluck.rpc import options

if TYPE_CHECKING:
    from potluck.client import Client

SHORT_PROMPT_TOKENS = 16  # of a stream: what is measured is the answer
SEED = 1
_SETTLE_SECONDS = 2 * options.HEARTBEAT_SECONDS + 0.1  # workers tell their counters so often

Said = Callable[[str, int, int], None]  # what is measured now, rounds done, rounds in all


class ClusterTiming:
    """One service and the prompts that it has not seen."""

    def __init__(self, client: Client, report: ServiceReport, vocab: int, max_tokens: int) -> None:
        self._client = client
        self._report = report
        self._vocab = vocab
        self._max_tokens = max_tokens
        self._random = random.Random(SEED)

    async def places(self, wanted: int) -> int:
        """How many answers of this length have a place at once, `wanted` at most."""
        n = 0
        async with AsyncExitStack() as stack:
            for _ in range(wanted):
                answer = self._client.generate(self._prompt(SHORT_PROMPT_TOKENS), self._options())
                events = await stack.enter_async_context(aclosing(answer))
                try:
                    first = await anext(events)
                except Full:
                    break
                if isinstance(first, Prefill) and first.queue > 0:
                    break
                n += 1
        await self._quiet()
        return n

    async def rate(self, streams: int) -> float:
        """Tokens/s of so many answers at once, while all of them run."""
        tasks = [asyncio.create_task(self._token_times()) for _ in range(streams)]
        try:
            return cluster_figures.rate_together(await asyncio.gather(*tasks))
        finally:  # one that failed ends the others
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def first_token_seconds(self, prompt_tokens: int) -> float:
        """From asking to the first token of a prompt of so many, alone."""
        prompt = self._prompt(prompt_tokens)
        started = time.perf_counter()
        async with aclosing(self._client.generate(prompt, self._options(1))) as events:
            async for event in events:
                if isinstance(event, Piece) and event.tokens:
                    return time.perf_counter() - started
        raise StageLost("an answer without a token")

    async def links(self) -> tuple[LinkBytes, ...]:
        """What each link carries for a token of one stream, by the counters of both ends."""
        await asyncio.sleep(_SETTLE_SECONDS)
        before = await self._client.status()
        await self._token_times()
        await asyncio.sleep(_SETTLE_SECONDS)
        after = await self._client.status()
        # The last token of an answer is not computed any further.
        n_tokens = SHORT_PROMPT_TOKENS + self._max_tokens - 1
        done = after.figures.answer_tokens - before.figures.answer_tokens
        is_alone = done == self._max_tokens and before.epoch == after.epoch
        return cluster_figures.link_bytes(before.links, after.links, n_tokens if is_alone else 0)

    async def _token_times(self) -> list[float]:
        """When each token of one answer came."""
        times: list[float] = []
        prompt = self._prompt(SHORT_PROMPT_TOKENS)
        async with aclosing(self._client.generate(prompt, self._options())) as events:
            async for event in events:
                if isinstance(event, Piece):
                    times += [time.perf_counter()] * len(event.tokens)
        if not times:
            raise StageLost("an answer without a token")
        return times

    async def _quiet(self) -> None:
        """Returns when answers that were given up have left, or after a few seconds."""
        for _ in range(40):
            if (await self._client.status()).sessions <= self._report.sessions:
                return
            await asyncio.sleep(options.CANCEL_SECONDS / 40)

    def _prompt(self, n_tokens: int) -> list[int]:
        """Never the same one: a service that remembers prompts gains nothing by it."""
        return [self._random.randrange(self._vocab) for _ in range(n_tokens)]

    def _options(self, max_tokens: int = 0) -> AnswerOptions:
        return AnswerOptions(
            max_tokens=max_tokens or self._max_tokens, temperature=0.0, ignore_end=True
        )


async def measure(
    client: Client, prompt_tokens: int, max_tokens: int, rounds: int, said: Said
) -> ClusterFigures:
    """Everything, `rounds` times in turns after a warm-up.

    Raises Unreachable, StageLost (not serving, or lost meanwhile), ContextExceeded, UsageError.
    """
    report = await client.status()
    if not report.is_serving:
        raise StageLost(
            f"{report.model} is {report.state}: {report.detail}",
            remedy="`potluck status --watch` shows when it serves",
        )
    _check_context(report, prompt_tokens, max_tokens)
    vocab = (await client.models())[0].vocab
    timing = ClusterTiming(client, report, vocab, max_tokens)
    n_stages = len(report.plan)
    wanted = list(dict.fromkeys((1, n_stages, 2 * n_stages)))
    said("counting places", 0, rounds)
    places = await timing.places(wanted[-1])
    if places == 0:
        raise Full("no answer has a place now: others use the service", remedy="try again later")
    notes = _notes(report, places, wanted[-1])
    counts = list(dict.fromkeys(min(n, places) for n in wanted))
    said("warming up", 0, rounds)
    await timing.rate(counts[-1])
    samples: dict[int, list[float]] = {n: [] for n in counts}
    seen: dict[int, ServiceReport] = {}
    first: list[float] = []
    for done in range(rounds):
        for n in counts:
            said(f"{n} at once", done, rounds)
            samples[n].append(await timing.rate(n))
            seen[n] = await client.status()
            if seen[n].epoch != report.epoch:
                raise StageLost("the plan changed while it was measured", remedy="measure again")
        said("first token", done, rounds)
        first.append(await timing.first_token_seconds(prompt_tokens))
    said("links", rounds, rounds)
    links = await timing.links()
    if any(x.bytes_per_token is None for x in links):
        notes.append("bytes a token are unknown: others used the service meanwhile")
    streams = [
        StreamsFigures(
            n, tuple(samples[n]), seen[n].plan, cluster_figures.predicted_rate(report, n)
        )
        for n in counts
    ]
    return ClusterFigures(
        report, prompt_tokens, max_tokens, rounds, tuple(streams), tuple(first), links, tuple(notes)
    )


def _check_context(report: ServiceReport, prompt_tokens: int, max_tokens: int) -> None:
    """Raises ContextExceeded before anything is asked."""
    for option, needed in (
        ("--prompt-tokens", prompt_tokens + 1),
        ("--max-tokens", SHORT_PROMPT_TOKENS + max_tokens),
    ):
        if needed > report.context_tokens:
            raise ContextExceeded(
                f"{option} needs {needed} positions; the service's context is"
                f" {report.context_tokens}",
                remedy=f"lower {option}, or serve with a longer --context",
            )


def _notes(report: ServiceReport, places: int, wanted: int) -> list[str]:
    notes = []
    if report.sessions or report.queue:
        notes.append("others use the service now, so it is slower than it would be alone")
    if places < wanted:
        notes.append(
            f"the service has places for {places} of {wanted} answers at once; more are not"
            " measured (serve with --max-sessions, or more memory for KV)"
        )
    return notes
