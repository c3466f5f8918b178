"""The engine against the oracle, on products and on tiny models of every kind.

Twice each: against the oracle that rounds nothing, where the error is that of the 8-bit activations
and must stay in a range (below it the comparison would be with itself); and against the one that
rounds as the engine does, where next to nothing is left but a value that falls on the other side of
a step now and then. The limits are about twice what was measured.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from potluck import blocks, engine, gguf
from potluck.blocks import BY_NAME
from potluck.model import WEIGHT_TYPES, KvType, config_of
from potluck.rope import UNSCALED
from potluck.testing import Oracle, TinyShape, dequantize, quantize, write_tiny
from potluck.testing.oracle import rounded_to_int8

if TYPE_CHECKING:
    from tests.engine.conftest import Comparison, Runner

FLOATS = ("f32", "f16", "bf16")
TOKENS = [*range(3, 103), *range(200, 100, -1)]  # two hundred, none twice in a row

# Columns for each type: multiples of its block, not of 64 where that can be.
GROUPED = TinyShape(dim=96, n_heads=3, n_kv_heads=1, head_dim=32, ffn_dim=160, seed=5)
UNGROUPED = TinyShape(
    dim=64, n_heads=4, n_kv_heads=4, head_dim=24, ffn_dim=96, vocab=424, rope_dim=16, tied=True
)
ODD = replace(GROUPED, dim=50, head_dim=10, ffn_dim=33)  # floats only: no blocks to fill


def shapes_of(type_name: str) -> list[TinyShape]:
    if BY_NAME[type_name].values == 256:
        shapes = [
            replace(GROUPED, dim=256, ffn_dim=512, n_heads=4, head_dim=64),
            replace(UNGROUPED, dim=256, ffn_dim=512, n_heads=8, n_kv_heads=8, head_dim=32),
        ]
    else:
        shapes = [GROUPED, replace(UNGROUPED, head_dim=16 if type_name not in FLOATS else 24)]
    if type_name in FLOATS:
        shapes.append(ODD)
    return [replace(shape, weight_type=type_name) for shape in shapes]


CASES = [
    pytest.param(shape, interleaved, id=f"{t}-{shape.dim}-{'pairs' if interleaved else 'halves'}")
    for t in WEIGHT_TYPES
    for shape in shapes_of(t)
    for interleaved in (True, False)
]


@pytest.mark.parametrize("type_name", WEIGHT_TYPES)
@pytest.mark.parametrize(("rows", "cols", "batch"), [(63, 256, 33), (9, 4864, 5), (301, 512, 1)])
def test_products_of_every_type_are_those_of_float64(
    runner: Runner, compare: type[Comparison], type_name: str, rows: int, cols: int, batch: int
) -> None:
    random = np.random.default_rng(rows)
    weights = quantize(random.normal(0.1, 1, (rows, cols)), type_name)
    x = random.normal(0.2, 1, (batch, cols)).astype(np.float32)
    out = np.empty((batch, rows), dtype=np.float32)
    engine.matmul(runner.machine, type_name, rows, cols, weights, x, out)
    values = dequantize(weights, type_name).reshape(rows, cols)
    exact = compare(x @ values.T, out)
    if type_name in FLOATS:
        assert exact.nmse < 1e-11
        return
    assert 1e-7 < exact.nmse < 5e-4
    block = blocks.BY_NAME[type_name].values
    rounded = compare(rounded_to_int8(x.astype(np.float64), block) @ values.T, out)
    # A tie in x / step may round the other way in f32: one step of one value.
    assert rounded.nmse < 1e-7
    assert np.abs(rounded.found - rounded.expected).mean() < 1e-3 * np.std(rounded.expected)


@pytest.mark.parametrize(("shape", "interleaved"), CASES)
def test_tiny_models_answer_like_the_oracle(
    tmp_path: Path,
    runner: Runner,
    compare: type[Comparison],
    shape: TinyShape,
    *,
    interleaved: bool,
) -> None:
    file = gguf.read(write_tiny(tmp_path / "x.gguf", shape))
    config = replace(config_of(file), rope_interleaved=interleaved)
    found = runner.logits(file, config, TOKENS)
    is_float = shape.weight_type in FLOATS
    exact = compare(Oracle(file, config).logits(TOKENS), found)
    assert (1e-9 if is_float else 5e-5) < exact.nmse < (1e-6 if is_float else 3e-3)
    assert exact.signed_error < (5e-5 if is_float else 2e-3)
    rounded = compare(Oracle(file, config, rounds=True).logits(TOKENS), found)
    assert rounded.nmse < (5e-8 if is_float else 4e-4)
    assert rounded.nmse < exact.nmse / 2
    assert rounded.signed_error < (5e-6 if is_float else 2e-4)


F32_GROUPED = replace(GROUPED, weight_type="f32", context_tokens=512)
F32_ODD = replace(ODD, weight_type="f32", context_tokens=512)
F32_PARTLY = replace(UNGROUPED, weight_type="f32", n_heads=5, n_kv_heads=5, context_tokens=512)
LINEAR = (("scaling.factor", 4.0),)
YARN = (
    ("scaling.type", "yarn"),
    ("scaling.factor", 4.0),
    ("scaling.original_context_length", 128),
    ("scaling.attn_factor", 1.1),
)
HALF_YARN = (*YARN, ("scaling.yarn_ext_factor", 0.5), ("scaling.yarn_beta_fast", 8.0))
DIVISORS = tuple(1 + 7 * i / 15 for i in range(16))  # of GROUPED's 32 rotated values
VARIANTS = {
    "qwen2": replace(F32_GROUPED, architecture="qwen2"),
    "qwen2 ungrouped": replace(F32_PARTLY, architecture="qwen2", head_dim=16, rope_dim=0),
    "qwen2 odd": replace(F32_ODD, architecture="qwen2"),
    "qwen3": replace(F32_GROUPED, architecture="qwen3"),
    "qwen3 ungrouped": replace(F32_PARTLY, architecture="qwen3", head_dim=16, rope_dim=0),
    "qwen3 odd": replace(F32_ODD, architecture="qwen3"),
    "qwen3 q4_0": replace(GROUPED, weight_type="q4_0", architecture="qwen3"),
    "biases": replace(F32_GROUPED, biases=True),
    "biases ungrouped": replace(F32_PARTLY, biases=True),
    "biases q4_0": replace(GROUPED, weight_type="q4_0", biases=True),
    "linear": replace(F32_GROUPED, rope_keys=LINEAR),
    "linear partly rotated": replace(F32_PARTLY, rope_keys=LINEAR),
    "yarn": replace(F32_GROUPED, rope_keys=YARN),
    "yarn partly rotated": replace(F32_PARTLY, rope_keys=YARN),
    "half a yarn": replace(F32_GROUPED, rope_keys=HALF_YARN),
    "divisors": replace(F32_GROUPED, rope_divisors=DIVISORS),
    "divisors and yarn": replace(F32_GROUPED, rope_divisors=DIVISORS, rope_keys=YARN),
    "qwen2 yarn": replace(F32_GROUPED, architecture="qwen2", rope_keys=YARN),
}


@pytest.mark.parametrize("other_layout", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_architectures_and_scalings_answer_like_the_oracle(
    tmp_path: Path, runner: Runner, compare: type[Comparison], name: str, *, other_layout: bool
) -> None:
    """In the file's layout of rotary pairs and in the other, whose rows are permuted or not."""
    shape = VARIANTS[name]
    file = gguf.read(write_tiny(tmp_path / "x.gguf", shape))
    config = config_of(file)
    config = replace(config, rope_interleaved=config.rope_interleaved is not other_layout)
    found = runner.logits(file, config, TOKENS)
    is_float = shape.weight_type in FLOATS
    exact = compare(Oracle(file, config).logits(TOKENS), found)
    assert (1e-9 if is_float else 5e-5) < exact.nmse < (1e-6 if is_float else 3e-3)
    assert exact.signed_error < (5e-5 if is_float else 2e-3)
    rounded = compare(Oracle(file, config, rounds=True).logits(TOKENS), found)
    assert rounded.nmse < (5e-8 if is_float else 4e-4)
    assert rounded.nmse < exact.nmse / 2
    if config.rope_scaling != UNSCALED:
        plain = Oracle(file, replace(config, rope_scaling=UNSCALED)).logits(TOKENS)
        assert compare(plain, found).nmse > 0.1


@pytest.mark.parametrize("type_name", ["q4_0", "f16"])
def test_many_layers_and_chunks_of_any_size_answer_like_the_oracle(
    tmp_path: Path, runner: Runner, compare: type[Comparison], type_name: str
) -> None:
    shape = TinyShape(type_name, n_layers=7, rope_theta=500_000.0, norm_eps=1e-6)
    file = gguf.read(write_tiny(tmp_path / "x.gguf", shape))
    config = config_of(file)
    expected = Oracle(file, config).logits(TOKENS)
    for chunk in (1, 7, 200):
        comparison = compare(expected, runner.logits(file, config, TOKENS, chunk))
        assert comparison.nmse < (5e-6 if type_name == "f16" else 8e-3)
        assert comparison.signed_error < 5e-3


@pytest.mark.parametrize("shape", [GROUPED, UNGROUPED, ODD], ids=lambda shape: f"{shape.dim}")
def test_keys_and_values_in_bytes_answer_like_the_oracle(
    tmp_path: Path, runner: Runner, compare: type[Comparison], shape: TinyShape
) -> None:
    """Weights of f32 leave no other error than that of the KV."""
    file = gguf.read(write_tiny(tmp_path / "x.gguf", replace(shape, weight_type="f32")))
    config = config_of(file)
    expected = Oracle(file, config).logits(TOKENS)
    found = [runner.logits(file, config, TOKENS, chunk, KvType.Q8) for chunk in (64, 7, 200)]
    assert all(np.array_equal(found[0], other) for other in found)
    exact = compare(expected, found[0])
    assert 3e-5 < exact.nmse < 3e-4  # f16: 2.5e-7
    assert exact.signed_error < 5e-5
    assert exact.same_top > 0.97


def test_a_wrong_rope_layout_is_far_outside_the_limits(
    tmp_path: Path, runner: Runner, compare: type[Comparison]
) -> None:
    """The limits above would notice: this is what a mistake looks like."""
    file = gguf.read(write_tiny(tmp_path / "x.gguf"))
    config = config_of(file)
    found = runner.logits(file, replace(config, rope_interleaved=False), TOKENS)
    assert compare(Oracle(file, config).logits(TOKENS), found).nmse > 0.1
