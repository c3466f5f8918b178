"""A model without a file, served by workers that each make their own part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from potluck import catalogue, engine, tokenizer
from potluck.model import config_of, span_tensors
from potluck.plan import Span
from potluck.replies import AnswerOptions

pytestmark = pytest.mark.cluster

NAME = "synthetic:tiny-q4_0"
PROMPT = "the capital of balomi"
GREEDY = AnswerOptions(max_tokens=12, temperature=0.0, logprobs=0, ignore_end=True)


def engine_alone() -> list[int]:
    """The answer of one engine with the whole model in it."""
    file = catalogue.open_model(NAME)
    config = config_of(file)
    shard = engine.Shard(
        *(engine.Engine(1), engine.config_for(config), 0, config.n_layers),
        embeds=True,
        has_head=True,
        kv_bytes=2**22,
    )
    tensors = span_tensors(file, config, Span(0, config.n_layers), embeds=True, has_head=True)
    engine.load(shard, file, tensors, lambda _: None)
    ids = tokenizer.load(file).encode(PROMPT, add_start=True)
    shard.open(1, 64)
    logits, answer, at = np.empty((1, config.vocab), np.float32), list[int](), 0
    while len(answer) < 12:
        shard.forward(np.array(ids, np.int32), [engine.RowSpan(1, at, len(ids), 1)], logits)
        at, ids = at + len(ids), [int(logits.argmax())]
        answer += ids
    return answer


@pytest.mark.parametrize("weights", ["arena", "mmap"])
def test_two_workers_answer_as_one_engine_does(
    start_cluster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any, weights: str
) -> None:
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path / "cache"))
    cluster = start_cluster(NAME, workers=2, worker_options=("--weights", weights))
    report = cluster.status()
    assert report.model == NAME
    answer = cluster.answer(PROMPT, GREEDY)
    tokens = [token.id for token in answer.tokens]
    assert tokens == engine_alone()
    assert len(set(tokens)) > 6
    cluster.stop()
    packs = sorted(p.name for p in (tmp_path / "cache").glob("packs/*/*"))
    assert len(packs) == (0 if weights == "arena" else 6)
