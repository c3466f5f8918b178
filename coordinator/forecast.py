"""How fast a plan will be: seconds of its stages and links, and what follows from them.

Pure. One sweep (Lambda) is the sum of all stages and links, one
slot (tau) the slowest of them; stages compute at the same time for different steps, so a slot is
what a step costs once the pipeline is full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from coordinator.layer_times import Speed, speed_of
from coordinator.sizes import ModelSizes
from potluck.plan import (
    COORDINATOR,
    LinkFigures,
    Links,
    Plan,
    Span,
    Stage,
    WorkerId,
    WorkerInfo,
)

MESSAGE_BYTES = 100  # of a step besides its values: epoch, rows, ids, crc
RESULT_BYTES = 16  # of a row on its way to and from the coordinator: ids and positions
# Rows of a prompt in one step. With several stages small ones are better: the last of N begins N-1
# chunks after the first, so that 512 tokens take two stages 33, 17, 9 or 5 steps of 16, 32, 64 or
# 128 rows; and other sessions wait less. But kernels want some rows: a worker of one thread (Zen 5;
# Q4_0) reads with 16, 32 and 128 at 0.93, 0.99 and 1.07 times the speed of 64; with 32 at 0.97
# (Q4_K), 1.00 (Q8_0) and, by AVX2, 0.98 times (medians of 4 or 5; another core was busy).
CHUNK_ALONE, CHUNK_OF_SEVERAL = 64, 32


@dataclass(frozen=True, slots=True)
class StageForecast:
    """One stage of a plan and the seconds it computes."""

    worker: WorkerId
    span: Span
    has_head: bool
    speed: Speed
    positions: int  # that a session's KV holds, as assumed
    fixed_seconds: float  # of any step

    def seconds(self, rows: int) -> float:
        """A step of `rows` sessions, a token each, which all want a pick."""
        kv = rows * self.positions * self.speed.kv_position_seconds
        head = self.speed.head_seconds(rows) if self.has_head else 0.0
        layer = self.speed.layer_seconds(rows) + kv
        return self.fixed_seconds + self.span.n_layers * layer + head

    def prompt_seconds(self, rows: int, positions: int) -> float:
        """A step of `rows` tokens of one prompt at `positions`, without the head: the rows share
        the KV that is read.
        """
        layer = self.speed.layer_seconds(rows) + positions * self.speed.kv_position_seconds
        return self.fixed_seconds + self.span.n_layers * layer


@dataclass(frozen=True, slots=True)
class LinkForecast:
    """One link of a plan: to the first stage, between two, or back from the last."""

    source: WorkerId  # COORDINATOR: to the first stage
    target: WorkerId
    figures: LinkFigures
    row_bytes: int

    def seconds(self, rows: int) -> float:
        """From sending a step of `rows` rows to its arrival."""
        return self.figures.seconds(MESSAGE_BYTES + rows * self.row_bytes)

    def busy_seconds(self, rows: int) -> float:
        """How long such a step occupies the link: latency lets others follow."""
        return (MESSAGE_BYTES + rows * self.row_bytes) / self.figures.bytes_per_second


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of one pipeline."""

    stages: tuple[StageForecast, ...]
    links: tuple[LinkForecast, ...]  # one more than stages, in the order of a step's way
    load_seconds: Mapping[WorkerId, float]  # of each stage's worker, if it alone loads
    line_seconds: float = 0.0  # that the coordinator's own line takes for all that is missing

    def sweep_seconds(self, rows: int = 1) -> float:
        """Lambda: a step's way through all stages and back to the coordinator."""
        stages = sum(stage.seconds(rows) for stage in self.stages)
        return stages + sum(link.seconds(rows) for link in self.links)

    def slot_seconds(self, rows: int = 1) -> float:
        """tau: the slowest stage or link; with enough steps under way, one ends in each slot."""
        slowest = max(stage.seconds(rows) for stage in self.stages)
        return max(slowest, *(link.busy_seconds(rows) for link in self.links))

    def steps(self, sessions: int) -> tuple[int, int]:
        """Steps under way and rows of each that give `sessions` sessions the most tokens/s."""
        return min(
            groups(sessions),
            key=lambda g: max(self.sweep_seconds(g[1]), g[0] * self.slot_seconds(g[1])),
        )

    def spread(self, most_sessions: int) -> tuple[int, ...]:
        """[u - 1]: steps under way that are best for u sessions, up to 64 of them: beyond that a
        step has so many rows that it hardly matters.
        """
        return tuple(self.steps(u)[0] for u in range(1, min(most_sessions, 64) + 1))

    def tokens_per_second(self, sessions: int = 1) -> float:
        """Of all sessions together: U / max(Lambda(m), G tau(m)) with the best G."""
        steps, rows = self.steps(sessions)
        return sessions / max(self.sweep_seconds(rows), steps * self.slot_seconds(rows))

    def first_token_seconds(self, tokens: int = 512, chunk: int = 0) -> float:
        """From sending a prompt of `tokens` tokens in chunks to its first token, alone.

        `chunk` 0: as `chunk_of` says.

        The first chunk passes every stage, the others follow a slot apart: for equal stages
        (ceil(P/c) + N - 1) slots, and links, and the head for one row.
        """
        rows = min(chunk or chunk_of(len(self.stages)), tokens)
        n_chunks = -(-tokens // rows)
        each = [stage.prompt_seconds(rows, tokens // 2) for stage in self.stages]
        way = sum(link.seconds(rows) for link in self.links)
        slot = max(*each, *(link.busy_seconds(rows) for link in self.links))
        head = self.stages[-1].speed.head_seconds(1)
        return sum(each) + way + (n_chunks - 1) * slot + head

    def slowest_stage(self, rows: int = 1) -> StageForecast:
        """The stage that bounds the total."""
        return max(self.stages, key=lambda stage: stage.seconds(rows))

    def slowest_link(self, rows: int = 1) -> LinkForecast:
        """The link that takes longest."""
        return max(self.links, key=lambda link: link.seconds(rows))

    @property
    def whole_load_seconds(self) -> float:
        """Until the last worker is loaded, if all weights come from the coordinator."""
        return max(self.line_seconds, *self.load_seconds.values())


def chunk_of(n_stages: int) -> int:
    """Rows of a prompt in one step, where nobody asked for another number."""
    return CHUNK_OF_SEVERAL if n_stages > 1 else CHUNK_ALONE


def groups(sessions: int) -> list[tuple[int, int]]:
    """How sessions may be spread: (steps under way, rows of the largest), fewest steps first.

    Of all counts of steps with the same rows the fewest: more would only wait for one another.
    8 sessions: 1 step of 8, 2 of 4, 3 of 3, 4 of 2, 8 of 1.
    """
    found: dict[int, int] = {}
    for steps in range(1, sessions + 1):
        found.setdefault(-(-sessions // steps), steps)
    return [(steps, rows) for rows, steps in found.items()]


def shared(forecasts: Sequence[Forecast], sessions: int) -> float:
    """Tokens/s of so many sessions in several pipelines, each where it adds most."""
    if len(forecasts) == 1:
        return forecasts[0].tokens_per_second(sessions)
    totals, counts = [0.0] * len(forecasts), [0] * len(forecasts)
    following = [forecast.tokens_per_second(1) for forecast in forecasts]
    for _ in range(sessions):
        i = max(range(len(forecasts)), key=lambda i: following[i] - totals[i])
        totals[i], counts[i] = following[i], counts[i] + 1
        following[i] = forecasts[i].tokens_per_second(counts[i] + 1)
    return sum(totals)


def forecast_of(
    plan: Plan,
    sizes: ModelSizes,
    workers: Sequence[WorkerInfo],
    links: Links,
    positions: int,
    stored: Mapping[WorkerId, frozenset[int]],
) -> Forecast:
    """What is expected of `plan`; each session's KV holds `positions` positions.

    `stored`: layers that a worker has already, as in `planner.plan`.
    """
    infos = {worker.id: worker for worker in workers}
    stages = tuple(
        StageForecast(
            stage.worker,
            stage.span,
            stage.has_head,
            speed_of(sizes, infos[stage.worker]),
            positions,
            links.hand_over_seconds,
        )
        for stage in plan.stages
    )
    way = [COORDINATOR, *(stage.worker for stage in stages), COORDINATOR]
    between = tuple(
        LinkForecast(a, b, links.of(a, b), link_row_bytes(sizes, a, b)) for a, b in pairwise(way)
    )
    load = {
        stage.worker: _load_seconds(stage, sizes, infos[stage.worker], links, stored)
        for stage in plan.stages
    }
    return Forecast(stages, between, load, _line_seconds(plan, sizes, links, stored))


def link_row_bytes(sizes: ModelSizes, source: WorkerId, target: WorkerId) -> int:
    """Bytes of one row on a link: values between workers, ids to and from the coordinator."""
    return RESULT_BYTES if COORDINATOR in (source, target) else sizes.row_bytes


def missing_bytes(stage: Stage, sizes: ModelSizes, stored: frozenset[int]) -> int:
    """Weights of a stage that its worker does not have yet.

    Embeddings are taken to lie beside the first layer, the head beside the last.
    """
    span = stage.span
    missing = sum(sizes.layer_bytes[i] for i in range(span.start, span.stop) if i not in stored)
    if stage.embeds and span.start not in stored:
        missing += sizes.embedding_bytes
    if stage.has_head and span.stop - 1 not in stored:
        missing += sizes.head_bytes
    return missing


def _line_seconds(
    plan: Plan, sizes: ModelSizes, links: Links, stored: Mapping[WorkerId, frozenset[int]]
) -> float:
    """Of sending all that is missing: the coordinator's line is as fast as its fastest link."""
    missing = sum(
        missing_bytes(stage, sizes, stored.get(stage.worker, frozenset())) for stage in plan.stages
    )
    return missing / max(
        links.of(COORDINATOR, stage.worker).bytes_per_second for stage in plan.stages
    )


def _load_seconds(
    stage: Stage,
    sizes: ModelSizes,
    worker: WorkerInfo,
    links: Links,
    stored: Mapping[WorkerId, frozenset[int]],
) -> float:
    """Fetching what is missing, as fast as link and disk allow, then reading all of it."""
    rate = links.of(COORDINATOR, worker.id).bytes_per_second
    disk = worker.disk
    if disk is not None and disk.write_bytes_per_second:
        rate = min(rate, disk.write_bytes_per_second)
    seconds = missing_bytes(stage, sizes, stored.get(worker.id, frozenset())) / rate
    if disk is not None and disk.read_bytes_per_second:
        seconds += missing_bytes(stage, sizes, frozenset()) / disk.read_bytes_per_second
    return seconds
