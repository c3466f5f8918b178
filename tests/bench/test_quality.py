"""bench/quality.py and its table: what is run, and from lines of results to docs/quality.md."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from potluck.logit_base import BaseWriter

ROOT = Path(__file__).resolve().parents[2]
VALUES = {
    "model": "tiny",
    "text": "some text",
    "text_sha256": "0123456789ab",
    "context": "512",
    "n_tokens": "12345",
    "bits_per_weight": "4.5",
    "perplexity": "12.34567",
    "standard_error": "0.4",
    "ratio": "1.0123",
    "ratio_standard_error": "0.0012",
    "divergence": "0.012345",
    "divergence_p99": "0.12345",
    "same_top": "0.9321",
    "change_rms": "0.0345",
    "llama_perplexity": "12.3",
    "over_llama": "1.0037",
}


@pytest.fixture
def quality(script: Callable[[str], ModuleType]) -> Any:
    return script("quality")


@pytest.fixture
def table(script: Callable[[str], ModuleType]) -> Any:
    return script("quality_table")


def row(type_name: str, kv_type: str = "f16", **changes: str) -> dict[str, str]:
    return {**VALUES, "type": type_name, "kv_type": kv_type, **changes}


def test_a_file_is_a_row_and_the_base_has_no_distance_from_itself(table: Any) -> None:
    lines = table.table([row("f16"), row("f16", "q8"), row("q4_0")]).splitlines()
    assert lines[0] == (
        "tiny, windows of 512 tokens, 12,345 scored; text: some text (sha256 0123456789ab...)"
    )
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert len({len(line) for line in cells}) == 1
    assert [line[0] for line in cells] == ["weights", "---", "f16", "f16, KV in q8", "q4_0"]
    assert cells[2][3:7] == ["", "", "", ""]
    assert cells[4][1:] == [
        "4.50",
        "12.346 ± 0.400",
        "+1.23 % ± 0.12",
        "0.01235",
        "0.1235",
        "93.2%",
        "3.45%",
        "12.300",
        "1.0037",
    ]


def test_what_was_measured_again_counts_as_it_was_last(table: Any) -> None:
    found = [row("q4_0"), row("q4_0", perplexity="99", over_llama="", llama_perplexity="")]
    lines = table.table(found).splitlines()
    assert len(lines) == 5
    assert "99.000" in lines[-1]
    assert lines[-1].endswith("|  |  |")


def test_another_text_has_a_table_of_its_own(table: Any) -> None:
    text = table.table([row("q4_0"), row("q4_0", text="another")])
    assert text.count("| weights |") == 2


def test_the_pages_table_is_that_of_the_results(table: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["quality_table.py", "--check"])
    assert table.main() == 0


def test_results_have_the_columns_of_the_script(quality: Any) -> None:
    names = ",".join(field.name for field in fields(quality.Row))
    files = list((ROOT / "bench" / "results" / "quality").glob("*.csv"))
    assert [f.name for f in files if f.read_text().splitlines()[0] != names] == []


def test_the_text_is_the_same_for_a_release_of_python(quality: Any, tmp_path: Path) -> None:
    path, name = quality.text_of(tmp_path)
    assert name.startswith("topics of CPython 3.")
    assert path.stat().st_size >= 100_000
    before = path.read_bytes()
    assert quality.text_of(tmp_path)[0].read_bytes() == before


def test_a_row_holds_what_both_programs_say(
    quality: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.arange(24, dtype=np.int32).reshape(3, 8)
    base, model = tmp_path / "base", tmp_path / "tiny.q4_0.gguf"
    with BaseWriter(base, tokens, 30) as writer:
        writer.write(np.zeros((9, 30), np.float32))
    from potluck import testing

    testing.write_tiny(model)
    kl = dict.fromkeys(quality._OF_KL, 0.25)
    ours = {"context": 8, "n_tokens": 9, "perplexity": 12.0, "standard_error": 0.5, "kl": kl}
    theirs = {
        "perplexity": 10.0,
        "standard_error": 0.5,
        "tokens_sha256": hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest(),
        "version": "1.2.3",
    }
    asked: list[list[str]] = []

    def answer_of(command: list[str]) -> dict[str, Any]:
        asked.append(command)
        return theirs if command[0] == "python" else ours

    monkeypatch.setattr(quality, "answer_of", answer_of)
    args = argparse.Namespace(context=8, threads=2, llama_python="python")
    scoring = quality.Scoring(args, model, "text", base)
    found = scoring.row(model, "q4_0", "q8")
    assert (found.model, found.over_llama, found.same_top) == ("tiny", 1.2, 0.25)
    assert found.llama_cpp_python == "1.2.3"
    assert 4.5 <= found.bits_per_weight < 6
    assert all("--kv-type" in command for command in asked)
    assert asked[1][-2:] == ["--chunks", "3"]
    theirs["tokens_sha256"] = "other"
    with pytest.raises(quality.Failed, match="other tokens"):
        scoring.row(model, "q4_0", "f16")
