"""Invariant 1: any number of workers, threads and any chunking gives the same bits.

Ten prompts run at once, so batches hold other rows in every run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from potluck.replies import AnswerOptions

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

LONG = " ".join(
    f"On day {day} the {who} carried {day * 7} jars of {what} over the hill."
    for day, who, what in zip(
        range(1, 41),
        itertools.cycle(["baker", "miller", "smith", "teacher"]),
        itertools.cycle(["honey", "oil", "salt", "flour", "vinegar"]),
        strict=False,
    )
)
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "List three colours:",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,",
    "Q: What do bees make?\nA:",
    "The quick brown fox",
    LONG,
]
GREEDY = AnswerOptions(max_tokens=64, temperature=0.0, logprobs=0, ignore_end=True)
SEEDED = AnswerOptions(
    max_tokens=64, temperature=0.9, top_k=50, top_p=0.95, seed=7, logprobs=0, ignore_end=True
)
Bits = tuple[tuple[int, str], ...]
RunAll = Callable[..., tuple[list[Bits], list[Bits]]]


@pytest.fixture
def run_all(start_cluster: Callable[..., object], smollm2: Path) -> RunAll:
    def run(
        workers: int, threads: int, chunk: int, kv_type: str = "f16"
    ) -> tuple[list[Bits], list[Bits]]:
        from typing import Any  # the cluster's class lives in conftest

        options = ("--kv-type", kv_type)
        cluster: Any = start_cluster(
            smollm2, workers=workers, threads=threads, chunk=chunk, options=options
        )
        report = cluster.status()
        assert (report.kv_type, report.kv_bytes_per_token) == (kv_type, KV_BYTES[kv_type])
        greedy = [a.bits for a in cluster.answers(PROMPTS, GREEDY)]
        seeded = [a.bits for a in cluster.answers(PROMPTS[:3], SEEDED)]
        cluster.stop()
        return greedy, seeded

    return run


# Of a position: keys and values of 30 layers, 3 heads of 64 each.
KV_BYTES = {"f16": 2 * 30 * 3 * 64 * 2, "q8": 2 * 30 * 3 * (64 + 4)}
REFERENCE: dict[str, tuple[list[Bits], list[Bits]]] = {}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("chunk", [512, 64, 7, 1])
def test_workers_threads_and_chunks_change_no_bit(
    run_all: RunAll, workers: int, threads: int, chunk: int
) -> None:
    if not REFERENCE:
        REFERENCE["one worker, one thread"] = run_all(1, 1, 512)
        greedy, seeded = REFERENCE["one worker, one thread"]
        assert len(set(greedy)) == len(PROMPTS), "prompts must give unlike answers"
        assert all(len(bits) == 64 for bits in greedy + seeded)
        assert seeded != greedy[:3], "sampling must differ from greedy"
    if (workers, threads, chunk) == (1, 1, 512):
        return
    assert run_all(workers, threads, chunk) == REFERENCE["one worker, one thread"]


def test_keys_and_values_in_bytes_change_no_bit_either(run_all: RunAll) -> None:
    greedy, seeded = one = run_all(1, 1, 512, "q8")
    assert len(set(greedy)) == len(PROMPTS), "prompts must give unlike answers"
    assert seeded != greedy[:3], "sampling must differ from greedy"
    for workers, threads, chunk in ((2, 1, 64), (2, 2, 7), (3, 2, 512)):
        assert run_all(workers, threads, chunk, "q8") == one
    assert run_all(1, 1, 512)[0] != greedy, "f16 must differ, or q8 was not used"
