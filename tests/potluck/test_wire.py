"""Activations on the wire: exact where promised, bounded where not, refused when they lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck import wire
from potluck.engine import crc32c
from potluck.errors import FrameError
from potluck.rpc.v1 import types_pb2
from potluck.wire import F16, F32, Q8, Hidden, from_message, to_message


def hidden(rows: int, dim: int, seed: int = 0, scale: float = 1.0) -> Hidden:
    values = np.random.default_rng(seed).normal(size=(rows, dim)) * scale
    return values.astype(np.float32)


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (1, 64), (7, 96), (64, 576), (512, 33)])
def test_f32_comes_back_bit_for_bit(rows: int, dim: int) -> None:
    array = hidden(rows, dim)
    array[0, 0] = np.float32(1e-45)  # a denormal
    sent = types_pb2.Activation.FromString(to_message(array, F32).SerializeToString())
    back = from_message(sent, rows, dim)
    assert back.view(np.uint32).tolist() == array.view(np.uint32).tolist()


def test_f32_is_read_without_a_copy() -> None:
    back = from_message(to_message(hidden(2, 8), F32), 2, 8)
    assert not back.flags.writeable
    assert isinstance(back.base, np.ndarray)


def test_nan_and_infinity_pass_f32_and_f16_as_they_are() -> None:
    array = np.array([[np.nan, np.inf, -np.inf, 1.0]], dtype=np.float32)
    for kind in (F32, F16):
        np.testing.assert_array_equal(from_message(to_message(array, kind), 1, 4), array)


def test_f16_rounds_to_nearest() -> None:
    array = hidden(3, 50)
    back = from_message(to_message(array, F16), 3, 50)
    np.testing.assert_array_equal(back, array.astype(np.float16).astype(np.float32))


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.floats(-6, 4), st.integers(0, 1000))
def test_q8_errs_by_half_a_scale_at_most(
    rows: int, blocks: int, exponent: float, seed: int
) -> None:
    dim = 32 * blocks
    array = hidden(rows, dim, seed, 10.0**exponent)
    back = from_message(to_message(array, Q8), rows, dim)
    scale = np.abs(array.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
    # The f16 scale lies above the exact one by at most one f16 step, 2^-24 among denormals.
    step = np.maximum(scale * 2.0**-10, 2.0**-24)
    error = np.abs(back - array).reshape(-1, 32)
    assert (error <= (scale + step) * 0.5001).all()


def test_q8_keeps_zero_blocks_and_the_largest_value_of_each() -> None:
    array = np.zeros((2, 32), dtype=np.float32)
    array[1, 5] = -3.5
    back = from_message(to_message(array, Q8), 2, 32)
    assert not back[0].any()
    assert back[1, 5] == pytest.approx(-3.5, rel=1e-3)
    assert len(to_message(array, Q8).values) == 2 * 34


@pytest.mark.parametrize("kind", [F16, Q8])
def test_a_value_beyond_f16_is_an_error_and_no_clamp(
    kind: types_pb2.ActivationType.ValueType,
) -> None:
    array = hidden(2, 32)
    array[1, 3] = 1e7
    with pytest.raises(FrameError, match="1e\\+07 does not fit"):
        to_message(array, kind)
    array[1, 3] = 65504
    to_message(array, kind)


def test_q8_refuses_what_it_can_not_write() -> None:
    with pytest.raises(FrameError, match="33 a row"):
        to_message(hidden(1, 33), Q8)
    with pytest.raises(FrameError, match="NaN"):
        to_message(np.full((1, 32), np.nan, dtype=np.float32), Q8)


def test_a_flipped_bit_is_noticed() -> None:
    for kind in (F32, F16, Q8):
        message = to_message(hidden(2, 32), kind)
        damaged = bytearray(message.values)
        damaged[17] ^= 4
        message.values = bytes(damaged)
        with pytest.raises(FrameError, match="crc32c"):
            from_message(message, 2, 32)


def test_claims_that_do_not_fit_are_refused() -> None:
    message = to_message(hidden(2, 32), F32)
    with pytest.raises(FrameError, match=r"\[2, 32\], expected \[3, 32\]"):
        from_message(message, 3, 32)
    with pytest.raises(FrameError, match=r"expected \[2, 64\]"):
        from_message(message, 2, 64)
    message.values = message.values[:-1]
    with pytest.raises(FrameError, match="255 bytes"):
        from_message(message, 2, 32)
    with pytest.raises(FrameError, match="type 0 is not known"):
        from_message(types_pb2.Activation(rows=1, dim=1), 1, 1)
    unknown = types_pb2.Activation.FromString(b"\x08\x63\x10\x01\x18\x01")  # type 99
    with pytest.raises(FrameError, match="type 99 is not known"):
        from_message(unknown, 1, 1)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 4), st.integers(0, 9), st.integers(0, 4))
def test_random_bytes_are_refused_or_read(values: bytes, rows: int, dim: int, kind: int) -> None:
    message = types_pb2.Activation(rows=rows, dim=dim, values=values, crc32c=crc32c(values))
    message.MergeFromString(bytes([8, kind]))
    try:
        back = from_message(message, rows, dim)
    except FrameError:
        return
    assert back.shape == (rows, dim)


def test_rows_have_the_documented_sizes() -> None:
    assert [wire.row_bytes(kind, 8192) for kind in (F32, F16, Q8)] == [32768, 16384, 8704]
