"""Products of every weight type: equal bits on every ISA, and near what other people's code says.

The oracle is the `gguf` package, which dequantizes by its own code, and a float64 product.
"""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from potluck import engine
from potluck.blocks import BY_NAME
from potluck.model import WEIGHT_TYPES

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
FLOATS = ("f32", "f16", "bf16")
QUANTIZED = tuple(t for t in WEIGHT_TYPES if t not in FLOATS)
K_TYPES = tuple(t for t in QUANTIZED if BY_NAME[t].values == 256)
K_OF = dict.fromkeys(K_TYPES, (256, 512, 1024))  # others: short, two blocks a record, four, long
SCALE_AT = {"q2_k": 80, "q3_k": 108, "q6_k": 208}  # others: 0
MINS_OF = {"q4_1": -7.5, "q5_1": -15.5, "q2_k": 1.5, "q4_k": 7.5, "q5_k": 15.5}  # of d
BATCHES = (1, 2, 3, 4, 5, 8, 9, 13, 33, 70)

# Normalized mean squared error that 8-bit activations cost; ggml's own limit is 5e-4. A range, so
# that an improvement is noticed too.
NMSE_RANGE = (1e-5, 1e-4)


@pytest.fixture(scope="module")
def engines() -> list[engine.Engine]:
    """One of each ISA here, the scalar one first; two threads, so that shares are stolen."""
    return [engine.Engine(2, isa) for isa in engine.available_isas()]


def random_rows(type_name: str, rows: int, cols: int, seed: int) -> U8:
    """File bytes [rows, bytes of a row] of normal weights, by our seeded bytes or float cast."""
    rng = np.random.default_rng(seed)
    if type_name == "f32":
        return rng.normal(0, 1, (rows, cols)).astype(np.float32).view(np.uint8)
    if type_name == "f16":
        return rng.normal(0, 1, (rows, cols)).astype(np.float16).view(np.uint8)
    if type_name == "bf16":
        wide = rng.normal(0, 1, (rows, cols)).astype(np.float32).view(np.uint32)
        return (wide >> 16).astype(np.uint16).view(np.uint8)
    layout = BY_NAME[type_name]
    data = rng.integers(0, 256, (rows, cols // layout.values, layout.size_bytes), dtype=np.uint8)
    return with_scales(type_name, data, rng.uniform(0.001, 0.1, data.shape[:2]))


def with_scales(type_name: str, blocks: U8, scales: npt.NDArray[np.float64]) -> U8:
    """Rows [rows, bytes] of blocks [rows, n_blocks, bytes], their f16 scale fields replaced."""
    halves = scales.astype(np.float16)[..., None].view(np.uint8)
    at = SCALE_AT.get(type_name, 0)
    blocks[..., at : at + 2] = halves
    if type_name in MINS_OF:
        mins = (MINS_OF[type_name] * scales).astype(np.float16)
        blocks[..., at + 2 : at + 4] = mins[..., None].view(np.uint8)
    return blocks.reshape(blocks.shape[0], -1)


def product(machine: engine.Engine, type_name: str, weights: U8, x: F32) -> F32:
    out = np.full((x.shape[0], weights.shape[0]), np.nan, np.float32)
    engine.matmul(machine, type_name, weights.shape[0], x.shape[1], weights, x, out)
    return out


def exact(type_name: str, weights: U8, x: F32) -> npt.NDArray[np.float64]:
    kind = gguf.GGMLQuantizationType[type_name.upper()]
    dense = gguf.quants.dequantize(weights, kind).astype(np.float64)
    return x.astype(np.float64) @ dense.T


def assert_equal_on_every_isa(
    engines: list[engine.Engine], type_name: str, weights: U8, x: F32
) -> F32:
    scalar = product(engines[0], type_name, weights, x)
    for other in engines[1:]:
        got = product(other, type_name, weights, x)
        assert got.tobytes() == scalar.tobytes(), f"{other.isa} differs from scalar"
    return scalar


@pytest.mark.parametrize("type_name", WEIGHT_TYPES)
def test_random_weights_vary(type_name: str) -> None:
    one, two = (random_rows(type_name, 8, 256, seed) for seed in (1, 2))
    assert (one != two).mean() > 0.5
    assert len(np.unique(one)) > 50


@pytest.mark.parametrize("type_name", WEIGHT_TYPES)
def test_every_isa_equals_scalar_whatever_the_shape(
    engines: list[engine.Engine], type_name: str
) -> None:
    for cols, rows in itertools.product(K_OF.get(type_name, (32, 96, 576, 1024)), (1, 8, 13, 40)):
        weights = random_rows(type_name, rows, cols, seed=rows + cols)
        for batch in BATCHES:
            x = np.random.default_rng(batch).normal(0, 1, (batch, cols)).astype(np.float32)
            got = assert_equal_on_every_isa(engines, type_name, weights, x)
            true = exact(type_name, weights, x)
            # Far beyond what rounding to 8 bits costs, far below a weight in a wrong place.
            assert np.abs(got - true).max() < 0.1 * np.sqrt((true**2).mean()) + 0.05


@pytest.mark.parametrize("type_name", WEIGHT_TYPES)
def test_the_error_against_the_exact_product_is_that_of_8_bit_activations(
    engines: list[engine.Engine], type_name: str
) -> None:
    weights = random_rows(type_name, 200, 1024, seed=3)
    x = np.random.default_rng(4).normal(0, 1, (50, 1024)).astype(np.float32)
    true = exact(type_name, weights, x)
    error = product(engines[-1], type_name, weights, x) - true
    nmse = (error**2).sum() / (true**2).sum()
    low, high = NMSE_RANGE if type_name in QUANTIZED else (0, 1e-12)
    assert low <= nmse <= high
    # A wrong min or centre moves all errors one way, which the square hides.
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(error.size) + 1e-6


@pytest.mark.parametrize("type_name", WEIGHT_TYPES)
def test_a_row_does_not_depend_on_the_rows_beside_it(
    engines: list[engine.Engine], type_name: str
) -> None:
    weights = random_rows(type_name, 24, 512, seed=5)
    x = np.random.default_rng(6).normal(0, 1, (21, 512)).astype(np.float32)
    for machine in engines:
        together = product(machine, type_name, weights, x)
        alone = [product(machine, type_name, weights, x[i : i + 1]) for i in range(len(x))]
        assert together.tobytes() == np.concatenate(alone).tobytes()


# Codes and activations that reach the ends of what sums of int16 hold.
CODES = (0x00, 0xFF, 0xF0, 0x0F, 0x80, 0x7F, 0x81)


def patterns(cols: int) -> F32:
    """Activations [patterns, cols]: +-127 after scaling, alternating by 1, 2, 4, 16 and 32."""
    at = np.arange(cols)
    rows = [np.ones(cols), -np.ones(cols)]
    rows += [np.where(at // width % 2, -1.0, 1.0) for width in (1, 2, 4, 16, 32)]
    outlier = np.full(cols, 1e-3)
    outlier[cols // 2] = 1e30
    rows += [outlier, np.zeros(cols), np.full(cols, 1e-38), np.full(cols, -1e30)]
    return np.array(rows * 7, np.float32)  # more than 64: tiles of many rows, too


@pytest.mark.parametrize("type_name", QUANTIZED)
def test_extreme_codes_and_activations_do_not_overflow(
    engines: list[engine.Engine], type_name: str
) -> None:
    layout = BY_NAME[type_name]
    cols = 512
    shape = (len(CODES), cols // layout.values, layout.size_bytes)
    blocks = np.repeat(np.array(CODES, np.uint8), shape[1] * shape[2]).reshape(shape)
    weights = with_scales(type_name, blocks, np.full(shape[:2], 0.01))
    x = patterns(cols)
    got = assert_equal_on_every_isa(engines, type_name, weights, x)
    true = exact(type_name, weights, x)
    # Each of these activations but the outlier's small ones is exact in 8 bits.
    size = np.abs(x.astype(np.float64)).sum(axis=1, keepdims=True) + 1e-30
    assert (np.abs(got - true) / size).max() < 1e-5 * 127


@pytest.mark.parametrize("type_name", QUANTIZED)
def test_strange_scales_are_the_same_everywhere(
    engines: list[engine.Engine], type_name: str
) -> None:
    layout = BY_NAME[type_name]
    rng = np.random.default_rng(9)
    blocks = rng.integers(0, 256, (16, 512 // layout.values, layout.size_bytes), dtype=np.uint8)
    scales = rng.choice([0.0, -0.0, 6e-8, -6e-8, 6e-5, 65504.0, -65504.0], blocks.shape[:2])
    if type_name in MINS_OF:
        scales = np.clip(scales, -4e3, 4e3)  # up to sixteen times that is the min
    weights = with_scales(type_name, blocks, scales)
    x = rng.normal(0, 1, (5, 512)).astype(np.float32)
    assert_equal_on_every_isa(engines, type_name, weights, x)
