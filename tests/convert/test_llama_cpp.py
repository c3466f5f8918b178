"""Files go both ways between potluck and llama.cpp, and both compute the same from them.

Needs a Python with llama-cpp-python, named by POTLUCK_LLAMA_PYTHON (bench/README.md says how to
make one), and is no part of an ordinary run: `scripts/test -m llama_cpp`.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from potluck import convert, gguf, tokenizer
from potluck.gguf_source import gguf_source
from potluck.model_writer import write_model
from potluck.testing import TinyShape, write_hugging_face, write_meta, write_tiny
from potluck.type_mix import choice_of

if TYPE_CHECKING:
    from tests.convert.conftest import Logits

pytestmark = pytest.mark.llama_cpp

CHILD = Path(__file__).with_name("llama_cpp_child.py")
SHAPE = TinyShape(
    weight_type="f16",
    dim=256,  # K types need rows of 256
    n_heads=8,
    n_kv_heads=4,
    head_dim=32,
    ffn_dim=512,
    vocab=432,
    vocabulary="spm",
)
TOKENS = [1, *range(270, 300), 5, 77, 431]
# By their names here, their numbers there.
MIXES = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
TEXTS = [
    "the potluck of 12345 things",
    "  two  spaces\n\n\tand a tab",
    "Grüße, 中文 \N{LLAMA} cafe\N{COMBINING ACUTE ACCENT}!",
    "don't <s> </s> <|im_start|>",
]
# Of logits, squared error over squared magnitude. Both round activations to 8 bits where weights
# have blocks, not alike; llama.cpp rounds them to 16 bits where weights are f16, potluck does not.
MOST_NMSE = {"f16": 1e-5, "quantized": 2e-3}


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp in a process of its own for each order."""

    python: str
    folder: Path

    def logits(self, model: Path) -> NDArray[np.float32]:
        """[n, vocab] after each of TOKENS."""
        out = self.folder / "logits.npy"
        self.ask(do="logits", model=str(model), tokens=TOKENS, out=str(out))
        found: NDArray[np.float32] = np.load(out)
        return found

    def tokens(self, model: Path, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self.ask(do="tokenize", model=str(model), texts=list(texts))
        return found

    def quantize(self, model: Path, out: Path, file_type: int) -> Path:
        self.ask(do="quantize", model=str(model), out=str(out), ftype=file_type)
        return out

    def ask(self, **order: object) -> Any:
        command = [self.python, str(CHILD), json.dumps(order)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-500:]
        return json.loads(done.stdout)


@pytest.fixture
def llama(tmp_path: Path) -> LlamaCpp:
    python = os.environ.get("POTLUCK_LLAMA_PYTHON")
    if not python:
        pytest.skip("POTLUCK_LLAMA_PYTHON names no Python with llama-cpp-python")
    return LlamaCpp(python, tmp_path)


def nmse(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    assert found.shape == expected.shape == (len(TOKENS), SHAPE.vocab)
    return float(np.sum((found - expected) ** 2) / np.sum(expected**2))


@pytest.mark.parametrize("n_shards", [1, 4])
def test_llama_cpp_computes_the_same_from_a_checkpoint_of_meta(
    llama: LlamaCpp, logits: Logits, tmp_path: Path, n_shards: int
) -> None:
    source = convert.open_source(write_meta(tmp_path / "meta", SHAPE, n_shards=n_shards))
    out = write_model(source, tmp_path / "out.gguf", choice_of("f16")).path
    assert nmse(logits(gguf.read(out), TOKENS), llama.logits(out)) < MOST_NMSE["f16"]


def test_llama_cpp_computes_the_same_from_a_folder_of_hugging_face(
    llama: LlamaCpp, logits: Logits, tmp_path: Path
) -> None:
    source = convert.open_source(write_hugging_face(tmp_path / "folder", SHAPE))
    out = write_model(source, tmp_path / "out.gguf", choice_of("f16")).path
    assert nmse(logits(gguf.read(out), TOKENS), llama.logits(out)) < MOST_NMSE["f16"]


@pytest.mark.parametrize(
    "shape",
    [
        replace(SHAPE, architecture="qwen2"),
        replace(SHAPE, architecture="qwen3"),
        replace(SHAPE, rope_divisors=tuple(1 + i / 4 for i in range(16))),
        replace(SHAPE, tied=True),
    ],
    ids=["qwen2", "qwen3", "rope_freqs", "tied"],
)
def test_llama_cpp_computes_the_same_of_each_architecture(
    llama: LlamaCpp, logits: Logits, tmp_path: Path, shape: TinyShape
) -> None:
    out = write_tiny(tmp_path / "out.gguf", shape)
    assert nmse(logits(gguf.read(out), TOKENS), llama.logits(out)) < MOST_NMSE["f16"]


@pytest.mark.parametrize("mix", MIXES)
def test_llama_cpp_computes_the_same_of_what_potluck_quantized(
    llama: LlamaCpp, logits: Logits, tmp_path: Path, mix: str
) -> None:
    source = gguf_source(gguf.read(write_tiny(tmp_path / "in.gguf", SHAPE)))
    out = write_model(source, tmp_path / "out.gguf", choice_of(mix)).path
    assert nmse(logits(gguf.read(out), TOKENS), llama.logits(out)) < MOST_NMSE["quantized"]


@pytest.mark.parametrize("mix", MIXES)
def test_potluck_computes_the_same_of_what_llama_cpp_quantized(
    llama: LlamaCpp, logits: Logits, tmp_path: Path, mix: str
) -> None:
    model = write_tiny(tmp_path / "in.gguf", SHAPE)
    out = llama.quantize(model, tmp_path / "out.gguf", MIXES[mix])
    assert nmse(logits(gguf.read(out), TOKENS), llama.logits(out)) < MOST_NMSE["quantized"]


@pytest.mark.parametrize("mix", MIXES)
def test_both_choose_the_same_types(llama: LlamaCpp, tmp_path: Path, mix: str) -> None:
    model = write_tiny(tmp_path / "in.gguf", SHAPE)
    theirs = gguf.read(llama.quantize(model, tmp_path / "theirs.gguf", MIXES[mix]))
    source = gguf_source(gguf.read(model))
    ours = gguf.read(write_model(source, tmp_path / "ours.gguf", choice_of(mix)).path)
    types = {name: tensor.type_name for name, tensor in theirs.tensors.items()}
    assert {name: tensor.type_name for name, tensor in ours.tensors.items()} == types
    assert ours.integer("general.file_type") == theirs.integer("general.file_type")


@pytest.mark.parametrize("vocabulary", ["spm", "bpe"])
def test_both_cut_texts_alike(llama: LlamaCpp, tmp_path: Path, vocabulary: str) -> None:
    model = write_tiny(tmp_path / "in.gguf", replace(SHAPE, vocabulary=vocabulary))
    ours = tokenizer.load(gguf.read(model))
    assert llama.tokens(model, TEXTS) == [ours.encode(text, add_start=False) for text in TEXTS]


def test_both_cut_texts_alike_by_a_converted_vocabulary(llama: LlamaCpp, tmp_path: Path) -> None:
    source = convert.open_source(write_meta(tmp_path / "meta", SHAPE))
    out = write_model(source, tmp_path / "out.gguf", choice_of("f16")).path
    ours = tokenizer.load(gguf.read(out))
    assert llama.tokens(out, TEXTS) == [ours.encode(text, add_start=False) for text in TEXTS]
