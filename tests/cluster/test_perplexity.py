"""`potluck perplexity` through services of one worker and of two: one figure, and the engine's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potluck import testing
from potluck.cli import command_line as cli
from potluck.replies import AnswerOptions

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

TEXT = " ".join(f"Jar {n} of {n * n} holds oil, jar {n + 1} holds honey." for n in range(60))
WINDOW = 64


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def score(text: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def score_(*arguments: str) -> dict[str, Any]:
        options = ["--file", str(text), "--context", str(WINDOW), "--json"]
        assert cli.main(["perplexity", *arguments, *options]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return score_


def test_any_split_gives_the_same_bits_and_the_engines_figure(
    start_cluster: Callable[..., Any],
    tmp_path: Path,
    score: Callable[..., dict[str, Any]],
) -> None:
    model = testing.write_tiny(tmp_path / "tiny.gguf", testing.TinyShape(n_layers=4))
    figures, bits = [], []
    for workers, chunk in ((1, 64), (2, 7)):
        cluster = start_cluster(model, workers=workers, chunk=chunk)
        figures.append(score("--connect", cluster.address))
        options = AnswerOptions(max_tokens=1, temperature=0.0, logprobs=0, prompt_logprobs=1)
        answer = cluster.answer(TEXT[:100], options)
        bits.append([(t.id, float(t.logprob).hex(), t.top) for t in answer.prompt])
        assert cluster.status().sessions == 0
        cluster.stop()
    one, two = figures
    assert one["n_tokens"] == (WINDOW // 2 - 1) * one["n_chunks"] > 300
    assert (one["nll"], one["nll_standard_error"]) == (two["nll"], two["nll_standard_error"])
    assert bits[0] == bits[1]
    assert len({logprob for _, logprob, _ in bits[0]}) > 20, "log-probabilities must differ"
    here = score(str(model), "--threads", "1")
    assert here["n_tokens"] == one["n_tokens"]
    # A service tells f32, whose rounding is all that differs.
    assert one["nll"] == pytest.approx(here["nll"], rel=1e-7)
