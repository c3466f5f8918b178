"""Synthetic weights: the engine's bytes are the definition's, and a model of them is alive."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck import catalogue, engine, gguf, synthetic
from potluck.convert import open_source
from potluck.errors import ModelError, UsageError
from potluck.gguf import GgufFile
from potluck.model import WEIGHT_TYPES, config_of, span_tensors
from potluck.model_writer import write_model
from potluck.packs import MappedWeights, PackFolder
from potluck.plan import Span
from potluck.testing.dequantize import tensor_values
from potluck.testing.oracle import Oracle
from potluck.testing.synthetic import tensor_bytes
from potluck.type_mix import choice_of

TOKENS = [1, 300, 7, 999, 42, 512, 300, 800, 3, 640, 17, 900, 88, 444, 300, 2]


def of_type(type_name: str) -> GgufFile:
    """The tiny model with all matrices of one type; only their names and types count."""
    file = catalogue.open_model("synthetic:tiny-q4_0")
    tensors = {
        t.name: replace(t, type_name=type_name) if t.rows > 1 else t for t in file.tensors.values()
    }
    return replace(file, tensors=tensors)


def maker(file: GgufFile) -> engine.Synthetic:
    origin = engine.origin_of(file)
    assert isinstance(origin, engine.Synthetic)
    return origin


def test_python_and_the_engine_speak_of_the_same_generator() -> None:
    assert engine.SYNTHETIC_VERSION == synthetic.GENERATOR_VERSION


@pytest.mark.parametrize("type_name", WEIGHT_TYPES)
def test_the_bytes_of_every_type_are_those_of_the_definition(type_name: str) -> None:
    file = of_type(type_name)
    for name in ("token_embd", "blk.2.attn_norm", "blk.2.attn_k", "blk.3.ffn_down", "output"):
        t = file.tensors[f"{name}.weight"]
        expected = tensor_bytes(file, t.name)
        assert maker(file).rows(t.name, t.type_name, t.cols, 0, t.rows) == expected
        row_bytes = len(expected) // t.rows
        last = maker(file).rows(t.name, t.type_name, t.cols, t.rows - 1, 1)
        assert last == expected[-row_bytes:]
        values = np.frombuffer(expected, np.uint8)
        assert len(np.unique(values)) > 100, "the random bytes do not vary"


def test_what_has_no_rows_is_refused() -> None:
    make = engine.Synthetic(seed=1, n_layers=4)
    with pytest.raises(UsageError, match="48 columns of q4_0"):
        make.rows("x.weight", "q4_0", 48, 0, 1)
    with pytest.raises(UsageError, match="weight type q9"):
        make.rows("x.weight", "q9", 64, 0, 1)
    with pytest.raises(ModelError, match="norms are f32"):
        make.rows("output_norm.weight", "f16", 64, 0, 1)
    with pytest.raises(ModelError, match="no layers"):
        engine.Synthetic(seed=1, n_layers=0)
    with pytest.raises(ModelError, match="the most are 65536"):
        engine.Synthetic(seed=1, n_layers=2**63)


@pytest.mark.parametrize(
    ("type_name", "cols", "n_rows"),
    [("f32", 1, 2**62), ("q4_0", 64, 2**62), ("q8_0", 64, 2**57), ("f32", 2**62 + 1, 1)],
)
def test_counts_whose_bytes_overflow_are_refused(type_name: str, cols: int, n_rows: int) -> None:
    make = engine.Synthetic(seed=1, n_layers=4)
    with pytest.raises(UsageError, match=r"rows, more than fit|columns of"):
        make.rows("x.weight", type_name, cols, 0, n_rows)


@pytest.mark.parametrize("kind", ["q4_0", "q4_k_m", "q8_0", "f16"])
def test_the_engine_agrees_with_the_oracle(kind: str, runner: Any, compare: Any) -> None:
    file = catalogue.open_model(f"synthetic:tiny-{kind}")
    config = config_of(file)
    expected = Oracle(file, config, rounds=True).logits(TOKENS)
    both = compare(expected, runner.logits(file, config, TOKENS))
    assert both.nmse < 1e-3
    assert both.same_top == 1


def test_eighty_layers_stay_finite_and_alive(monkeypatch: pytest.MonkeyPatch, runner: Any) -> None:
    deep = synthetic.Shape("a deep model", 256, 80, 4, 2, 512, vocab=1000)
    monkeypatch.setattr(synthetic, "SHAPES", {"deep": deep})
    for kind in ("q4_0", "q5_k_m", "q6_k"):
        file = catalogue.open_model(f"synthetic:deep-{kind}")
        logits = runner.logits(file, config_of(file), TOKENS)
        assert np.isfinite(logits).all()
        assert 2 < logits.std() < 4, "logits spread over several units"
        assert len(set(logits.argmax(axis=1))) > len(TOKENS) // 2
        other = runner.logits(file, config_of(file), [5, *TOKENS[1:]])
        assert np.corrcoef(logits[-1], other[-1])[0, 1] < 0.9, "the first token is forgotten"


def test_packs_of_synthetic_weights_hold_their_bits(tmp_path: Path, runner: Any) -> None:
    file = catalogue.open_model("synthetic:tiny-q4_0")
    config = config_of(file)
    tensors = span_tensors(file, config, Span(0, config.n_layers), embeds=True, has_head=True)
    folder = PackFolder(tmp_path)
    stamps = set()
    for _ in range(2):
        shard = engine.Shard(
            *(runner.machine, engine.config_for(config), 0, config.n_layers),
            embeds=True,
            has_head=True,
            kv_bytes=2**22,
        )
        MappedWeights(shard, file, tensors, folder).load(lambda *_: None, 2**40)
        assert shard.mapped_bytes > 0
        shard.open(1, len(TOKENS))
        out = np.empty((len(TOKENS), config.vocab), np.float32)
        rows = [engine.RowSpan(1, 0, len(TOKENS), len(TOKENS))]
        shard.forward(np.array(TOKENS, np.int32), rows, out)
        np.testing.assert_array_equal(out, runner.logits(file, config, TOKENS))
        stamps.add(tuple(p.stat().st_ino for p in sorted(tmp_path.glob("*/*"))))
    assert len(stamps) == 1, "the second start wrote nothing"


def test_a_synthetic_model_can_be_written_as_a_file(tmp_path: Path) -> None:
    made = catalogue.open_model("synthetic:tiny-q8_0")
    path = tmp_path / "tiny.gguf"
    write_model(open_source(Path("synthetic:tiny-q8_0")), path, choice_of("q8_0"))
    written = gguf.read(path)
    assert written.tensors == made.tensors
    for name in written.tensors:
        np.testing.assert_array_equal(tensor_values(written, name), tensor_values(made, name))
