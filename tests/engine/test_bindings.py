"""The boundary itself: what the compiled module takes, refuses and gives away."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from potluck import blocks, engine, model
from potluck.errors import EngineError, FrameError, ModelError, UsageError
from potluck.testing.dequantize import dequantize

ROOT = Path(__file__).resolve().parents[2]
F32 = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def machine() -> engine.Engine:
    return engine.Engine(2)


def q8_rows(rows: int, cols: int) -> bytes:
    """Seeded Q8_0 rows: scale 1/16, random codes."""
    codes = np.random.default_rng(1).integers(-127, 128, (rows, cols // 32, 32), dtype=np.int8)
    blocks_of_rows = np.zeros((rows, cols // 32, 34), dtype=np.uint8)
    blocks_of_rows[:, :, :2] = np.frombuffer(np.float16(1 / 16).tobytes(), dtype=np.uint8)
    blocks_of_rows[:, :, 2:] = codes.view(np.uint8)
    return blocks_of_rows.tobytes()


@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_crc32c_is_that_of_the_rfc(data: bytes, checksum: int) -> None:
    assert engine.crc32c(data) == checksum
    assert engine.crc32c(bytearray(data)) == checksum
    assert engine.crc32c(memoryview(data)) == checksum


def test_crc32c_takes_the_bytes_of_any_contiguous_buffer() -> None:
    values = np.arange(5000, dtype=np.float32)
    assert engine.crc32c(values) == engine.crc32c(values.tobytes())
    with pytest.raises(UsageError, match=r"data: must be C-contiguous"):
        engine.crc32c(values[::2])


def test_block_sizes_known_to_python_are_those_of_the_engine() -> None:
    for name in model.WEIGHT_TYPES:
        known = blocks.BY_NAME[name]
        assert engine.block_layout(name) == (known.values, known.size_bytes)
    with pytest.raises(UsageError, match="weight type q9_0"):
        engine.block_layout("q9_0")


def test_exp_fills_the_buffer_in_place() -> None:
    values = np.linspace(-90, 90, 1001, dtype=np.float32)
    out = np.zeros(1001, dtype=np.float32)
    address = out.ctypes.data
    engine.exp(values, out)
    assert out.ctypes.data == address
    with np.errstate(over="ignore"):
        expected = np.exp(values.astype(np.float64))
    inside = (values > -87) & (values < 88.7)
    np.testing.assert_allclose(out[inside], expected[inside], rtol=1.2e-7)
    assert out[0] == 0
    assert math.isinf(out[-1])
    engine.exp(values, values)
    assert values.tobytes() == out.tobytes()


def test_log_sum_exp_agrees_with_float64() -> None:
    logits = np.random.default_rng(3).normal(0, 10, 32000).astype(np.float32)
    exact = logits.max() + np.log(np.exp(logits.astype(np.float64) - logits.max()).sum())
    assert engine.log_sum_exp(logits) == pytest.approx(exact, abs=1e-6)
    assert engine.log_sum_exp(np.array([-np.inf], np.float32)) == -math.inf


@pytest.mark.parametrize(
    ("values", "out", "message"),
    [
        (np.zeros(3), np.zeros(3, np.float32), r"values: must be f32 \[3\], not f64 \[3\]"),
        (np.zeros(3, np.float32), np.zeros(3), r"out: must be f32 \[3\], not f64 \[3\]"),
        (np.zeros(3, np.float32), np.zeros(4, np.float32), r"out: must be f32 \[3\]"),
        (np.zeros(3, np.int32), np.zeros(3, np.float32), r"not int32 \[3\]"),
        (np.zeros((1, 3), np.float32), np.zeros(3, np.float32), "values: must have one dimension"),
        (np.zeros(6, np.float32)[::2], np.zeros(3, np.float32), "values: must be C-contiguous"),
        (np.zeros(3, np.float32), np.zeros(6, np.float32)[::2], "out: must be C-contiguous"),
        (np.zeros(3, np.dtype(">f4")), np.zeros(3, np.float32), "values: must be f32"),
        (bytes(12), np.zeros(3, np.float32), "values: must be f32"),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(values: F32, out: F32, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine.exp(values, out)


def test_an_output_that_is_read_only_is_refused() -> None:
    out = np.zeros(3, np.float32)
    out.flags.writeable = False
    with pytest.raises(UsageError, match="out: must be writable"):
        engine.exp(np.zeros(3, np.float32), out)


def test_a_memoryview_over_received_bytes_is_taken_without_a_copy() -> None:
    received = np.linspace(-1, 1, 64, dtype=np.float32).tobytes()
    out = bytearray(256)
    engine.exp(memoryview(received).cast("f"), memoryview(out).cast("f"))
    np.testing.assert_allclose(
        np.frombuffer(out, np.float32), np.exp(np.frombuffer(received, np.float32)), rtol=2e-7
    )


def test_what_is_no_buffer_is_a_type_error(machine: engine.Engine) -> None:
    with pytest.raises(TypeError):
        machine.read_bandwidth("much")  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(TypeError):
        engine.Engine(-1)
    assert machine.threads == 2


def test_an_isa_that_does_not_exist_is_an_error_that_lists_those_that_do() -> None:
    with pytest.raises(EngineError, match="compiled in are scalar") as refused:
        engine.Engine(1, "nonsense")
    assert refused.value.remedy.startswith("use one of: auto, scalar")


@pytest.mark.parametrize(
    ("forced", "answer"), [("nonsense", "EngineError"), ("scalar", "scalar"), ("", "avx")]
)
def test_the_environment_forces_an_isa_or_is_an_error(forced: str, answer: str) -> None:
    if answer not in "".join(engine.available_isas()) and answer == "avx":
        answer = engine.available_isas()[-1]
    script = (
        "from potluck import engine\n"
        "try: print(engine.Engine(1).isa)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={"POTLUCK_ISA": forced, "PATH": "/usr/bin:/bin"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer in ran.stdout
    if forced == "nonsense":
        assert "POTLUCK_ISA=nonsense" in ran.stdout


def test_scalar_comes_first_and_every_available_isa_makes_an_engine() -> None:
    assert engine.ISAS[0] == "scalar"
    assert set(engine.available_isas()) <= set(engine.ISAS)
    for isa in engine.available_isas():
        assert engine.Engine(1, isa).isa == isa


def test_no_thread_count_means_the_cpus_we_may_use() -> None:
    assert 1 <= engine.Engine().threads <= len(os.sched_getaffinity(0))


def test_a_tuned_engine_uses_what_it_has() -> None:
    several = engine.Engine(3)
    assert (several.decode_threads, several.prefill_threads) == (3, 3)
    several.tune_threads(2**22)
    assert 1 <= several.decode_threads <= 3
    assert 1 <= several.prefill_threads <= 3
    with pytest.raises(UsageError, match="weight_bytes: at least 1 MiB, not 5"):
        several.tune_threads(5)


def test_more_threads_than_cpus_are_not_pinned() -> None:
    many = len(os.sched_getaffinity(0)) + 1
    with pytest.raises(UsageError, match=f"threads: {many} can't be pinned"):
        engine.Engine(many, pinned=True)


def test_matmul_checks_sizes_and_values(machine: engine.Engine) -> None:
    weights = q8_rows(8, 64)
    x = np.ones((2, 64), np.float32)
    out = np.zeros((2, 8), np.float32)
    with pytest.raises(UsageError, match="weights: 544 bytes, expected 9 rows of 68"):
        engine.matmul(machine, "q8_0", 9, 64, weights, x, np.zeros((2, 9), np.float32))
    with pytest.raises(UsageError, match=r"x: must be f32 \[2, 32\], not f32 \[2, 64\]"):
        engine.matmul(machine, "q8_0", 8, 32, weights, x, out)
    with pytest.raises(UsageError, match=r"out: must be f32 \[2, 8\]"):
        engine.matmul(machine, "q8_0", 8, 64, weights, x, np.zeros((8, 2), np.float32))
    x[1, 63] = np.nan
    with pytest.raises(FrameError, match="NaN or infinite"):
        engine.matmul(machine, "q8_0", 8, 64, weights, x, out)
    damaged = bytearray(weights)
    damaged[0:2] = np.float16(np.inf).tobytes()
    with pytest.raises(ModelError, match="NaN or infinite"):
        engine.matmul(machine, "q8_0", 8, 64, damaged, np.ones((2, 64), np.float32), out)


def test_convert_fills_whole_blocks_and_names_the_first_flaw(machine: engine.Engine) -> None:
    x = np.linspace(-1, 1, 512, dtype=np.float32)
    out = np.zeros(512 // 32 * 34, np.uint8)
    assert engine.convert(machine, "f32", "q8_0", x, out) is None
    assert np.abs(dequantize(out.tobytes(), "q8_0") - x).max() < 1 / 127
    x[300], x[301] = np.inf, np.nan
    assert engine.convert(machine, "f32", "q8_0", x, out) == (300, math.inf)
    nothing = np.zeros(0, np.uint8)
    assert engine.convert(machine, "q4_k", "f16", nothing, nothing) is None


def test_convert_checks_buffers(machine: engine.Engine) -> None:
    x, out = np.zeros(512, np.float32), np.zeros(1088, np.uint8)
    with pytest.raises(UsageError, match=r"out: must be uint8 \[544\], not uint8 \[1088\]"):
        engine.convert(machine, "f32", "q8_0", x, out)
    with pytest.raises(UsageError, match="48 values are no whole blocks of q8_0"):
        engine.convert(machine, "f32", "q8_0", x[:48], out[:34])
    with pytest.raises(UsageError, match="1088 bytes are no whole blocks of q4_k"):
        engine.convert(machine, "q4_k", "f32", out, out)
    bytes_of_x = x.view(np.uint8)
    for first in (0, 1504):
        with pytest.raises(UsageError, match="out: overlaps data"):
            engine.convert(machine, "f32", "q8_0", x, bytes_of_x[first : first + 544])
    with pytest.raises(UsageError, match="weight type q9"):
        engine.convert(machine, "f32", "q9", x, out)


def test_a_config_that_makes_no_model_is_refused() -> None:
    with pytest.raises(ModelError, match="n_heads"):
        config(n_heads=7, n_kv_heads=2)
    with pytest.raises(ModelError, match="dim"):
        config(dim=0)


def config(dim: int = 64, n_heads: int = 4, n_kv_heads: int = 2) -> engine.Config:
    return engine.Config(
        dim=dim,
        n_layers=2,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=16,
        ffn_dim=128,
        vocab=100,
        context_tokens=64,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_dim=16,
        rope_interleaved=True,
    )
