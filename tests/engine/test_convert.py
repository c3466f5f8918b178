"""Weights into other types: exact where the gguf package is, and better where it only rounds."""

from __future__ import annotations

import gguf.quants
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType

from potluck import engine
from potluck.blocks import BY_NAME
from potluck.errors import UsageError
from potluck.model import WEIGHT_TYPES

F32 = npt.NDArray[np.float32]
REFERENCE_QUANTIZERS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
QUANTIZED = tuple(t for t in WEIGHT_TYPES if BY_NAME[t].values > 1)


@pytest.fixture(scope="module")
def machine() -> engine.Engine:
    return engine.Engine(2)


def rows_of(kind: str) -> F32:
    """[32, 1024] of the size that weights have."""
    random = np.random.default_rng(7)
    if kind == "gaussian":
        values = random.standard_normal((32, 1024))
    elif kind == "heavy":
        values = random.standard_t(3, (32, 1024))
    else:  # columns of very different size, as embeddings have
        values = random.standard_normal((32, 1024)) * np.exp(random.standard_normal(1024))
    return np.asarray(values * 0.02, np.float32)


def converted(machine: engine.Engine, old: str, new: str, data: bytes | F32) -> bytes:
    n_bytes = data.nbytes if isinstance(data, np.ndarray) else len(data)
    n = n_bytes // BY_NAME[old].size_bytes * BY_NAME[old].values
    out = np.empty(n // BY_NAME[new].values * BY_NAME[new].size_bytes, np.uint8)
    assert engine.convert(machine, old, new, data, out) is None
    return out.tobytes()


def theirs(data: bytes, type_name: str) -> F32:
    """The gguf package's values."""
    kind = GGMLQuantizationType[type_name.upper()]
    return gguf.quants.dequantize(np.frombuffer(data, np.uint8), kind).reshape(-1)


def rmse(a: F32, b: F32) -> float:
    return float(np.sqrt(np.mean((a.reshape(-1).astype(np.float64) - b.reshape(-1)) ** 2)))


@pytest.mark.parametrize("type_name", [t for t in WEIGHT_TYPES if t != "f32"])
def test_values_are_exactly_those_of_the_gguf_package(
    machine: engine.Engine, type_name: str
) -> None:
    """On random blocks: codes and scales that no quantizer writes, too."""
    block = BY_NAME[type_name]
    random = np.random.default_rng(3)
    blocks = random.integers(0, 256, (8192 // block.values, block.size_bytes), dtype=np.uint8)
    halves = {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,), "q8_0": (0,), "q4_0": (0,)}
    halves |= {"q5_0": (0,), "bf16": (), "f16": ()}
    for at in halves.get(type_name, (0, 2)):  # a scale that is finite
        scales = random.normal(0, 0.1, len(blocks)).astype("<f2")
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    if block.values == 1:
        blocks = np.ascontiguousarray(random.normal(0, 1, 8192).astype("<f2")).view(np.uint8)
    data = blocks.tobytes()
    ours = np.frombuffer(converted(machine, type_name, "f32", data), np.float32)
    assert len(np.unique(ours)) > 100
    assert np.array_equal(ours, theirs(data, type_name))


# Root mean square errors of llama.cpp's quantizers on rows_of each kind, times 1000:
# ggml_quantize_chunk of llama-cpp-python 0.3.36, without an importance matrix.
KINDS = ("gaussian", "heavy", "columns")
LLAMA_CPP = {
    "q4_0": (1.7189, 4.4066, 6.4395),
    "q4_1": (1.5601, 3.3688, 5.3374),
    "q5_0": (0.8526, 2.2353, 3.4921),
    "q5_1": (0.7537, 1.6346, 2.5928),
    "q8_0": (0.1072, 0.2810, 0.4558),
    "q2_k": (5.9194, 11.9659, 18.3399),
    "q3_k": (3.0110, 6.5981, 8.9477),
    "q4_k": (1.4271, 3.1447, 4.9080),
    "q5_k": (0.7203, 1.5876, 2.5176),
    "q6_k": (0.3551, 0.8684, 1.3580),
}


@pytest.mark.parametrize("type_name", LLAMA_CPP)
def test_errors_are_smaller_than_llama_cpps(machine: engine.Engine, type_name: str) -> None:
    for kind, reference in zip(KINDS, LLAMA_CPP[type_name], strict=True):
        x = rows_of(kind)
        ours = theirs(converted(machine, "f32", type_name, x), type_name)
        most = 1 if type_name == "q4_0" else 0.99  # whose large values count for more
        assert 0.7 < 1000 * rmse(x, ours) / reference < most, kind


@pytest.mark.parametrize("type_name", REFERENCE_QUANTIZERS)
def test_no_block_is_worse_than_the_gguf_packages(machine: engine.Engine, type_name: str) -> None:
    """By what the engine minimizes: in Q4_0 errors count by the values' size (fitting.h)."""
    x = np.concatenate([rows_of(kind) for kind in KINDS])
    reference = gguf.quants.quantize(x, GGMLQuantizationType[type_name.upper()]).tobytes()
    blocks = x.reshape(-1, 32)
    sizes = np.abs(blocks)
    is_weighed = type_name == "q4_0"
    weights = sizes + sizes.mean(axis=1, keepdims=True) if is_weighed else np.ones_like(blocks)
    ours, others = (
        np.sum(weights * (theirs(data, type_name).reshape(-1, 32) - blocks) ** 2, axis=1)
        for data in (converted(machine, "f32", type_name, x), reference)
    )
    rounding = 1e-6 * np.sum(weights * blocks**2, axis=1)  # of sums in f32
    assert np.max(ours - others - rounding) <= 0
    assert ours.sum() < 0.98 * others.sum()


@pytest.mark.parametrize("type_name", ["f16", "bf16"])
def test_floats_round_to_nearest_even(machine: engine.Engine, type_name: str) -> None:
    random = np.random.default_rng(5)
    x = np.exp(random.uniform(-18, 11, 65536)).astype(np.float32)
    x *= random.choice(np.array([-1, 1], np.float32), len(x))
    kind = GGMLQuantizationType[type_name.upper()]
    expected = gguf.quants.quantize(x, kind).tobytes()
    assert converted(machine, "f32", type_name, x) == expected


@pytest.mark.parametrize("type_name", QUANTIZED)
def test_threads_change_nothing(machine: engine.Engine, type_name: str) -> None:
    x = rows_of("heavy")
    alone = converted(engine.Engine(1), "f32", type_name, x)
    assert converted(machine, "f32", type_name, x) == alone
    halves = [converted(machine, "f32", type_name, part) for part in (x[:11], x[11:])]
    assert b"".join(halves) == alone


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e5])
def test_the_first_value_that_cannot_be_written_is_told(machine: engine.Engine, bad: float) -> None:
    x = rows_of("gaussian")
    x[20, 7] = x[30, 3] = bad
    out = np.empty(x.size // 32 * 18, np.uint8)
    flaw = engine.convert(machine, "f32", "q4_0", x, out)
    assert flaw is not None
    assert flaw[0] == 20 * 1024 + 7
    assert np.array_equal(flaw[1], bad, equal_nan=True)


def test_wrong_calls_are_refused(machine: engine.Engine) -> None:
    x, out = np.zeros(48, np.float32), np.empty(18, np.uint8)
    with pytest.raises(UsageError, match="weight type q9_9: known are"):
        engine.convert(machine, "f32", "q9_9", x, out)
    with pytest.raises(UsageError, match="48 values are no whole blocks of q4_0"):
        engine.convert(machine, "f32", "q4_0", x, out)
    with pytest.raises(UsageError, match="data: 7 bytes are no whole blocks of f32"):
        engine.convert(machine, "f32", "f16", bytes(7), out)
    with pytest.raises(UsageError, match="out"):
        engine.convert(machine, "f32", "f16", x, out)
    with pytest.raises(UsageError, match="writable"):
        engine.convert(machine, "f32", "q4_0", x[:32], bytes(18))
