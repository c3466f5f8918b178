"""The engine against the oracle on a real model, at 2,000 positions of English text.

What 8-bit activations cost belongs to the type and not to this engine: on the same file and text
llama.cpp (llama-cpp-python 0.3.36) has the oracle's top token at 96.0 % of the positions, with a
mean divergence of 3.5e-3; this engine has it at 96.4 %, with 3.4e-3. Near ties decide: at 6 % of
the positions the oracle's first two tokens are less than 0.1 apart. With the same weights stored
as f16, whose activations are not rounded, the figure is 99.9 %; and each layer alone equals the
oracle that rounds alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from potluck import gguf, tokenizer
from potluck.model import EMBEDDING, ModelConfig, config_of
from potluck.testing import Oracle, OracleKv, Tensor, quantize, tensor_values, write_gguf

if TYPE_CHECKING:
    from tests.engine.conftest import Comparison, Runner

F32 = NDArray[np.float32]
TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
N_POSITIONS = 2000

# The oracle needs 20 s of two cores, and each type a few more; tests of a loaded machine wait.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Reading:
    """The text, and what the oracle expects after each of its tokens."""

    file: gguf.GgufFile
    config: ModelConfig
    tokens: list[int]
    expected: F32  # logits [n, vocab]

    @property
    def lead(self) -> F32:
        """By how much the oracle prefers its first token to its second; [n]."""
        best = np.partition(self.expected, -2, axis=1)[:, -2:]  # the smaller one first
        lead: F32 = best[:, 1] - best[:, 0]
        return lead


@pytest.fixture(scope="module")
def reading(smollm2: Path) -> Reading:
    file = gguf.read(smollm2)
    config = config_of(file)
    text = TEXT.read_text(encoding="utf-8")
    tokens = tokenizer.load(file).encode(text, add_start=False)[:N_POSITIONS]
    assert len(tokens) == N_POSITIONS
    assert len(set(tokens)) > 400
    oracle = Oracle(file, config)
    hidden = oracle.hidden(tokens)
    expected = np.empty((N_POSITIONS, config.vocab), dtype=np.float32)
    for at in range(0, N_POSITIONS, 250):  # in float64 all of them would take 0.8 GB
        expected[at : at + 250] = oracle.head(hidden[at : at + 250])
    return Reading(file, config, tokens, expected)


@pytest.fixture(scope="module")
def found(reading: Reading, runner: Runner) -> F32:
    """The engine's logits [n, vocab] of the file as it is: Q4_1, with a Q8_0 embedding."""
    return runner.logits(reading.file, reading.config, reading.tokens, 512)


def test_the_top_token_is_the_oracle_s_unless_it_is_nearly_a_tie(
    reading: Reading, found: F32
) -> None:
    agrees = reading.expected.argmax(axis=1) == found.argmax(axis=1)
    clear = reading.lead > 0.1
    assert clear.mean() > 0.9
    assert agrees[clear].mean() >= 0.98
    assert agrees.mean() >= 0.955


def test_logits_and_probabilities_stay_in_their_range(
    reading: Reading, found: F32, compare: type[Comparison]
) -> None:
    assert 1e-4 < compare(reading.expected.astype(np.float64), found).nmse < 2.5e-3
    expected, seen = log_probabilities(reading.expected), log_probabilities(found)
    divergence = (np.exp(expected) * (expected - seen)).sum(axis=1)
    assert divergence.mean() < 5e-3
    assert divergence.max() < 0.5
    nexts = (np.arange(N_POSITIONS - 1), reading.tokens[1:])
    assert abs(seen[nexts].mean() - expected[nexts].mean()) < 3e-3  # perplexity within 0.3 %


def test_in_f16_the_top_token_is_the_oracle_s_at_98_of_100_positions(
    reading: Reading, runner: Runner, compare: type[Comparison], tmp_path: Path
) -> None:
    """The same weights, stored as f16, so that activations stay f32: the claim without rounding."""
    tensors = []
    for name, info in reading.file.tensors.items():
        kind = "f32" if len(info.shape) == 1 else "f16"
        data = quantize(tensor_values(reading.file, name), kind)
        tensors.append(Tensor(name, kind, info.shape, data))
    pairs = [(k, v) for k, v in reading.file.metadata.items() if not k.startswith("tokenizer.")]
    file = gguf.read(write_gguf(tmp_path / "f16.gguf", pairs, tensors))
    found = runner.logits(file, config_of(file), reading.tokens, 512)
    (tmp_path / "f16.gguf").unlink()  # 270 MB
    comparison = compare(reading.expected.astype(np.float64), found)
    assert comparison.same_top >= 0.98
    assert comparison.nmse < 1e-5
    assert comparison.signed_error < 1e-3


def test_each_layer_alone_is_the_oracle_s(
    reading: Reading, runner: Runner, compare: type[Comparison]
) -> None:
    """From the oracle's own states, so that errors of 30 layers do not add up and hide."""
    file, config, n = reading.file, reading.config, 128
    exact, rounding = Oracle(file, config), Oracle(file, config, rounds=True)
    x = tensor_values(file, EMBEDDING)[reading.tokens[:n]]
    for layer in range(config.n_layers):
        before = x.astype(np.float32)
        added = runner.layer(file, config, layer, before) - before
        x = exact.layer(layer, before.astype(np.float64), OracleKv())
        assert compare(x - before, added).nmse < 1e-3
        assert compare(x - before, added).signed_error < 1e-3
        rounded = rounding.layer(layer, before.astype(np.float64), OracleKv())
        assert compare(rounded - before, added).nmse < 6e-5
        assert compare(rounded - before, added).signed_error < 3e-5


def log_probabilities(logits: F32) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    out: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return out
