"""bench/quantizers.py: what the noise does, and what is made of two programs' answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from potluck import gguf, testing
from potluck.testing import TinyShape

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def quantizers(script: Callable[[str], ModuleType]) -> Any:
    return script("quantizers")


def test_no_value_moves_by_more_than_half_a_step_of_its_block(quantizers: Any) -> None:
    values = np.random.default_rng(1).standard_normal(3200).astype(np.float16)
    moved = quantizers.moved(values, np.random.default_rng(2)).astype(np.float32)
    blocks = values.astype(np.float32).reshape(-1, 32)
    step = np.ptp(blocks, axis=1, keepdims=True) / 15
    by = (moved.reshape(-1, 32) - blocks) / step
    assert np.abs(by).max() < 0.51  # f16 rounds
    assert 0.27 < by.std() < 0.31  # uniform: 0.289


def test_a_copy_differs_in_its_matrices_and_by_its_seed(quantizers: Any, tmp_path: Path) -> None:
    source = testing.write_tiny(tmp_path / "tiny.gguf", TinyShape(weight_type="f16"))
    files = [tmp_path / name for name in ("a", "b", "other")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        quantizers.noisy_copy(source, file, seed)
    before, first, again, other = (path.read_bytes() for path in (source, *files))
    assert first == again != other
    for tensor in gguf.read(source).tensors.values():
        part = slice(tensor.offset_bytes, tensor.offset_bytes + tensor.size_bytes)
        assert (before[part] == first[part]) == (tensor.type_name != "f16"), tensor.name


def test_both_quantizers_are_scored_on_each_copy_and_files_go(
    quantizers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = testing.write_tiny(tmp_path / "tiny.f16.gguf", TinyShape(weight_type="f16"))
    text = tmp_path / "text.txt"
    text.write_text("words")
    folder = tmp_path / "work"
    folder.mkdir()
    kl = {"ratio": 1.25, "divergence": 0.5, "divergence_standard_error": 0.125}
    scored = {"context": 512, "n_tokens": 7, "perplexity": 20.0, "kl": kl}

    def answer_of(command: list[str]) -> dict[str, Any]:
        if command[0] == "other-python":
            Path(command[3]).write_bytes(b"theirs")
            return {"version": "1.2.3"}
        return scored

    monkeypatch.setattr(quantizers, "answer_of", answer_of)
    args = argparse.Namespace(
        model=model,
        folder=folder,
        file=text,
        types=["q4_0"],
        chunks=2,
        threads=1,
        llama_python="other-python",
    )
    found = [row for copy in (0, 1) for row in quantizers.Comparing(args).rows(copy)]
    assert [(r.copy, r.quantizer) for r in found] == [
        (0, "potluck"),
        (0, "llama.cpp"),
        (1, "potluck"),
        (1, "llama.cpp"),
    ]
    assert {r.llama_cpp_python for r in found if r.quantizer == "llama.cpp"} == {"1.2.3"}
    assert len({r.sha256 for r in found if r.quantizer == "potluck"}) == 2
    assert list(folder.iterdir()) == []
    assert next(quantizers.means(found)).split()[1:5] == ["potluck", "mean", "KL", "0.5000"]


def test_results_have_the_columns_of_the_script(quantizers: Any) -> None:
    names = ",".join(field.name for field in fields(quantizers.Row))
    files = list((ROOT / "bench" / "results" / "quantizers").glob("*.csv"))
    assert files
    assert [f.name for f in files if f.read_text().splitlines()[0] != names] == []
