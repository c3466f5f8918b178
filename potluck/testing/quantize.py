"""Weights into the engine's types: simple, deterministic, and good enough for tests.

Not the quantizer that people use: no search for better scales, plain numpy. Scales are signed where
the layout lets them be, and all codes occur, so tests meet them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from potluck.blocks import BY_NAME

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


def quantize(values: NDArray[np.floating], type_name: str) -> bytes:
    """[rows, cols] in the file layout of `type_name`; KERNELS section 2 has the layouts.

    Raises ValueError: cols is no multiple of the block, or a type that is not known here.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    if type_name not in _QUANTIZERS:
        raise ValueError(f"no quantizer for {type_name} ({', '.join(_QUANTIZERS)})")
    block = BY_NAME[type_name].values
    if values.shape[-1] % block:
        raise ValueError(f"{values.shape[-1]} columns are no multiple of {block}")
    return _QUANTIZERS[type_name](values.reshape(-1, block)).tobytes()


def _f32(values: F32) -> U8:
    return values.view(np.uint8)


def _f16(values: F32) -> U8:
    return values.astype("<f2").view(np.uint8)


def _bf16(values: F32) -> U8:
    """The upper half of an f32, rounded to nearest even."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return rounded.astype("<u2").view(np.uint8)


def _q4_0(blocks: F32) -> U8:
    """d is the value of largest magnitude over -8: that one is met, and d may be negative."""
    scale = (_largest(blocks) / -8).astype("<f2")
    codes = np.clip(np.rint(_over(blocks, scale) + 8), 0, 15).astype(np.uint8)
    return _joined(scale, _nibbles(codes))


def _q4_1(blocks: F32) -> U8:
    least = blocks.min(axis=1, keepdims=True)
    scale = ((blocks.max(axis=1, keepdims=True) - least) / 15).astype("<f2")
    least = least.astype("<f2")
    codes = np.clip(np.rint(_over(blocks - least.astype(np.float32), scale)), 0, 15)
    return _joined(scale, least, _nibbles(codes.astype(np.uint8)))


def _q8_0(blocks: F32) -> U8:
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype("<f2")
    codes = np.clip(np.rint(_over(blocks, scale)), -127, 127).astype(np.int8)
    return _joined(scale, codes)


def _q6_k(blocks: F32) -> U8:
    """Sub-blocks of 16 with a signed 8-bit scale, in units of the block's f16 scale."""
    sub = blocks.reshape(-1, 16)
    wanted: F32 = (_largest(sub) / np.float32(-32)).reshape(-1, 16)
    scale = (_largest(wanted) / -128).astype("<f2")
    scales = np.clip(np.rint(_over(wanted, scale)), -128, 127).astype(np.int8)
    steps = (scale.astype(np.float32) * scales).reshape(-1, 1)
    codes = np.clip(np.rint(_over(sub, steps)) + 32, 0, 63).astype(np.uint8)
    # [block, half, run, l]: element 128 half + 32 run + l; see dequantize.py.
    q = codes.reshape(-1, 2, 4, 32)
    low = q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4
    high = q[:, :, 0] >> 4 | q[:, :, 1] >> 4 << 2 | q[:, :, 2] >> 4 << 4 | q[:, :, 3] >> 4 << 6
    n = len(blocks)
    return _joined(low.reshape(n, 128), high.reshape(n, 64), scales, scale)


_QUANTIZERS: dict[str, Callable[[F32], U8]] = {
    "f32": _f32,
    "f16": _f16,
    "bf16": _bf16,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q8_0": _q8_0,
    "q6_k": _q6_k,
}


def _largest(blocks: F32) -> F32:
    """The value of largest magnitude of each row, with its sign; [n, 1]."""
    at = np.abs(blocks).argmax(axis=1)[:, None]
    return np.take_along_axis(blocks, at, axis=1)


def _over(values: F32, scale: NDArray[np.floating]) -> F32:
    """values / scale, and 0 where the scale is 0."""
    wide = scale.astype(np.float32)
    return np.divide(values, wide, out=np.zeros_like(values), where=wide != 0)


def _nibbles(codes: U8) -> U8:
    """Element j in the low half of byte j, element j + 16 in the high half; [n, 32] to [n, 16]."""
    return codes[:, :16] | np.left_shift(codes[:, 16:], np.uint8(4))


def _joined(*fields: NDArray[np.generic]) -> U8:
    """Fields of each block side by side, [n, bytes of a block]."""
    return np.concatenate([np.ascontiguousarray(f).view(np.uint8) for f in fields], axis=1)
