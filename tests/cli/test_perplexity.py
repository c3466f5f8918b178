"""`potluck perplexity`: a tiny model beside an oracle, bases, services, wrong turns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck import gguf, testing, tokenizer
from potluck.cli import command_line as cli
from potluck.cli import memory, predictions
from potluck.model import config_of

TEXT = "".join(
    f"On day {day} the {who} carried {day * 7} jars of {what} over the hill. "
    for day, (who, what) in enumerate(
        [("baker", "honey"), ("miller", "oil"), ("smith", "salt"), ("teacher", "flour")] * 4
    )
)
Run = Callable[..., Any]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return testing.write_tiny(folder / "tiny.gguf", testing.TinyShape(weight_type="f16"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_(*arguments: object) -> Any:
        assert cli.main(["perplexity", *map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run_


def by_oracle(path: Path, window: int, text: str) -> list[float]:
    """Surprises by the rules of llama.cpp's tool, written out, in f64."""
    file = gguf.read(path)
    words = tokenizer.load(file)
    ids = words.encode(text, add_start=True)
    oracle = testing.Oracle(file, config_of(file), rounds=True)
    found = []
    for start in range(0, len(ids) - window + 1, window):
        read = ids[start : start + window]
        if words.adds_start and words.start_id is not None:
            read[0] = words.start_id
        logits = oracle.logits(read)
        for i in range(window // 2, window - 1):
            row = logits[i] - logits[i].max()
            found.append(math.log(np.exp(row).sum()) - row[read[i + 1]])
    return found


@pytest.mark.parametrize("vocabulary", ["bpe", "spm"])
def test_figures_are_those_of_the_oracle(
    vocabulary: str, tmp_path: Path, text: Path, run: Run
) -> None:
    shape = testing.TinyShape(weight_type="f16", vocabulary=vocabulary)
    path = testing.write_tiny(tmp_path / "tiny.gguf", shape)
    found = run(path, "--file", text, "--context", 64, "--threads", 1)
    wanted = by_oracle(path, 64, TEXT)
    assert len(wanted) == found["n_tokens"] == 31 * found["n_chunks"] > 100
    assert found["nll"] == pytest.approx(np.mean(wanted), rel=2e-3)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    error = np.std(wanted) / math.sqrt(len(wanted) - 1)
    assert found["nll_standard_error"] == pytest.approx(error, rel=0.02)
    assert found["standard_error"] == pytest.approx(
        found["perplexity"] * found["nll_standard_error"]
    )
    assert (found["model"], found["kv_type"], found["context"]) == ("tiny.gguf", "f16", 64)
    assert found["kl"] is None
    assert found["seconds"] > 0


def test_the_first_windows_are_scored_if_fewer_are_asked_for(
    model: Path, text: Path, run: Run
) -> None:
    found = run(model, "--file", text, "--context", 64, "--chunks", 2)
    assert (found["n_chunks"], found["n_tokens"]) == (2, 62)
    wanted = by_oracle(model, 64, TEXT)[:62]
    assert found["nll"] == pytest.approx(np.mean(wanted), rel=2e-3)


def test_steps_with_few_logits_change_no_bit(
    model: Path, text: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model, "--file", text, "--context", 64)
    monkeypatch.setattr(predictions, "LOGITS_BYTES", 4 * 421 * 5)
    monkeypatch.setattr(predictions, "CHUNK_ROWS", 7)
    assert run(model, "--file", text, "--context", 64)["nll"] == whole["nll"]


def test_people_read_one_line(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["perplexity", str(model), "--file", str(text), "--context", "64"]) == 0
    said = capsys.readouterr()
    line = said.out.splitlines()[-1]
    assert line.startswith("perplexity ")
    for part in (" +- ", " tokens scored in ", "windows of 64, ", " tokens/s"):
        assert part in line
    assert "scoring" in said.err


def test_a_model_is_at_no_distance_from_its_own_base(
    model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    base = tmp_path / "base.bin"
    first = run(model, "--file", text, "--context", 64, "--save-base", base)
    found = run(model, "--kl-base", base)
    assert found["nll"] == first["nll"]
    kl = found["kl"]
    assert abs(kl["divergence"]) < 1e-5
    assert kl["same_top"] == 1.0
    # Random weights find some tokens less likely than the file can say (e ** -16 of the best).
    assert 1.0 <= kl["ratio"] < 1.05
    assert kl["base_perplexity"] * kl["ratio"] == pytest.approx(first["perplexity"])
    assert run(model, "--kl-base", base, "--file", text)["kl"] == kl
    assert run(model, "--kl-base", base, "--chunks", 1)["n_chunks"] == 1


def test_fewer_bits_are_further_away(
    model: Path, text: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.bin"
    run(model, "--file", text, "--context", 64, "--save-base", base)
    distances = []
    for name in ("q8_0", "q4_0"):
        shape = testing.TinyShape(weight_type=name)
        path = testing.write_tiny(tmp_path / f"{name}.gguf", shape)
        found = run(path, "--kl-base", base)["kl"]
        distances.append(found["divergence"])
        assert 0 <= found["divergence_median"] <= found["divergence_p99"]
        assert found["divergence_p99"] <= found["divergence_max"]
        assert 0 < found["same_top"] <= 1
        assert found["change_rms"] > 0
    assert 1e-6 < distances[0] < distances[1] / 10
    cached = run(model, "--kl-base", base, "--kv-type", "q8")
    assert cached["kv_type"] == "q8"
    assert 1e-7 < cached["kl"]["divergence"] < distances[1]
    assert cli.main(["perplexity", str(tmp_path / "q4_0.gguf"), "--kl-base", str(base)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["perplexity", "base", "KL", "same", "token's"]


def test_an_ended_run_leaves_no_base(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("potluck.cli.perplexity.surprise", interrupted)
    base = tmp_path / "base.bin"
    options = ["--file", str(text), "--context", "64", "--save-base", str(base)]
    assert cli.main(["perplexity", str(model), *options]) == 130
    assert not list(tmp_path.glob("base*"))


def test_a_base_of_something_else_is_refused(
    model: Path, text: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    base, other = tmp_path / "base.bin", tmp_path / "other.txt"
    run(model, "--file", text, "--context", 64, "--save-base", base)
    other.write_text(TEXT.replace("day 3", "day 4"), encoding="utf-8")
    small = testing.write_tiny(tmp_path / "s.gguf", testing.TinyShape(vocab=430))
    for arguments, says in (
        ([model, "--context", 32], "has windows of 64 tokens, not 32"),
        ([model, "--file", other], "is of another text, or cut by another tokenizer"),
        ([small], "is of a model with 421 tokens, this one has 430"),
    ):
        assert cli.main(["perplexity", "--kl-base", str(base), *map(str, arguments)]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "--file is missing"),
        (["{model}"], 2, "--file is missing"),
        (["{model}", "--file", "{none}"], 2, "can't be read (No such file or directory)"),
        (["{model}", "--file", "{latin}"], 2, "is not UTF-8: byte 3 is no text"),
        (["{model}", "--file", "{text}", "--context", "300"], 2, "the model's context is 256"),
        (["{model}", "--file", "{latin}x", "--context", "64"], 2, "can't be read"),
        (["{model}", "--file", "{short}"], 2, "the text has"),
        (["{model}", "--file", "{text}", "--context", "3"], 2, "--context: 4 to"),
        (["{model}", "--file", "{text}", "--chunks", "0"], 2, "--chunks: 1 or more"),
        (["{model}", "--file", "{text}", "--connect", "a:1"], 2, "--connect asks a service"),
        (["{model}", "--kl-base", "{text}"], 1, "no base of logits"),
        (["{model}", "--kl-base", "a", "--save-base", "b"], 2, "not allowed with"),
        (
            ["{model}", "--file", "{text}", "--context", "64", "--save-base", "{none}/x"],
            1,
            "can't write",
        ),
        (
            ["{model}", "--file", "{text}", "--context", "64", "--save-base", "{model}"],
            1,
            "is there and no base of logits",
        ),
        (["--file", "{text}", "--kl-base", "a"], 2, "--kl-base needs one engine"),
        (["--file", "{text}", "--save-base", "a"], 2, "--save-base needs one engine"),
        (["--file", "{text}", "--kv-type", "q8"], 2, "--kv-type: the service decides that"),
        (["{none}", "--file", "{text}"], 1, "no such file"),
    ],
)
def test_a_wrong_turn_is_two_lines(
    arguments: list[str],
    code: int,
    says: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "short").write_text("A word or two.")
    text.write_text(TEXT * 3)
    names = {"model": model, "text": text, "none": tmp_path / "none"}
    names |= {name: tmp_path / name for name in ("latin", "short")}
    assert cli.main(["perplexity", *(a.format(**names) for a in arguments)]) == code
    said = capsys.readouterr()
    assert says in said.err.splitlines()[0]
    assert len(said.err.splitlines()) <= 2
    assert said.out == ""


def test_what_does_not_fit_into_memory_is_refused_with_its_bytes(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "share_bytes", lambda n_workers: 2**20)
    assert cli.main(["perplexity", str(model), "--file", str(text), "--context", "64"]) == 1
    assert "1.0 MiB are free" in capsys.readouterr().err


def test_a_service_scores_windows_as_prompts(service: Any, text: Path, run: Run) -> None:
    text.write_text("abcdefghijklmnopqrstuvw")
    found = run("--connect", service.address, "--file", text, "--context", 8)
    assert (found["model"], found["n_chunks"], found["n_tokens"]) == ("tiny", 3, 9)
    assert found["nll"] == pytest.approx(np.mean([5 / 8, 6 / 8, 7 / 8]))
    asked = sorted(service.asked, key=lambda request: list(request.tokens.ids)[1:])
    assert [list(request.tokens.ids) for request in asked] == [
        [1, *b"abcdefg"],
        [1, *b"ijklmno"],
        [1, *b"qrstuvw"],
    ]
    options = asked[0].options
    assert (options.max_tokens, options.prompt_logprobs, options.prompt_logprobs_start) == (1, 0, 5)


def test_windows_beyond_a_services_context_are_refused(
    service: Any, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.context_tokens = 64
    options = ["--connect", service.address, "--file", str(text), "--context", "64"]
    assert cli.main(["perplexity", *options]) == 2
    assert "the service's context is 64" in capsys.readouterr().err


def test_a_service_of_an_older_release_is_told_apart(
    service: Any, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.scores = False
    options = ["--connect", service.address, "--file", str(text), "--context", "8"]
    assert cli.main(["perplexity", *options]) == 2
    assert "the service scored 0 of 3 tokens" in capsys.readouterr().err
