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


def _q5_0(blocks: F32) -> U8:
    scale = (_largest(blocks) / -16).astype("<f2")
    codes = np.clip(np.rint(_over(blocks, scale) + 16), 0, 31).astype(np.uint8)
    return _joined(scale, _fifth_bits(codes), _nibbles(codes & np.uint8(15)))


def _q5_1(blocks: F32) -> U8:
    least = blocks.min(axis=1, keepdims=True)
    scale = ((blocks.max(axis=1, keepdims=True) - least) / 31).astype("<f2")
    least = least.astype("<f2")
    wide = np.clip(np.rint(_over(blocks - least.astype(np.float32), scale)), 0, 31)
    codes = wide.astype(np.uint8)
    return _joined(scale, least, _fifth_bits(codes), _nibbles(codes & np.uint8(15)))


def _q8_0(blocks: F32) -> U8:
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype("<f2")
    codes = np.clip(np.rint(_over(blocks, scale)), -127, 127).astype(np.int8)
    return _joined(scale, codes)


def _q2_k(blocks: F32) -> U8:
    """Sub-blocks of 16, scale and min of 4 bits each."""
    d, dmin, scales, mins, codes = _with_mins(blocks, 16, 15, 3)
    return _joined(scales | mins << 4, _two_bits(codes), d, dmin)


def _q3_k(blocks: F32) -> U8:
    """Sub-blocks of 16 with a signed scale of 6 bits, stored with 32 added."""
    sub = blocks.reshape(-1, 16)
    wanted: F32 = (_largest(sub) / np.float32(-4)).reshape(-1, 16)
    d = (_largest(wanted) / -32).astype("<f2")
    scales = np.clip(np.rint(_over(wanted, d)), -32, 31)
    steps = (d.astype(np.float32) * scales).reshape(-1, 1)
    codes = np.clip(np.rint(_over(sub, steps)) + 4, 0, 7).astype(np.uint8).reshape(-1, 256)
    s = (scales + 32).astype(np.uint8)
    low = s[:, :8] & 15 | (s[:, 8:] & 15) << 4
    top = s[:, :4] >> 4 | s[:, 4:8] >> 4 << 2 | s[:, 8:12] >> 4 << 4 | s[:, 12:] >> 4 << 6
    high = np.packbits(codes.reshape(-1, 8, 32) >> 2, axis=1, bitorder="little").reshape(-1, 32)
    return _joined(high, _two_bits(codes & 3), low, top, d)


def _q4_k(blocks: F32) -> U8:
    """Sub-blocks of 32, scale and min of 6 bits each."""
    d, dmin, scales, mins, codes = _with_mins(blocks, 32, 63, 15)
    return _joined(d, dmin, _six_bits(scales, mins), _four_bits(codes))


def _q5_k(blocks: F32) -> U8:
    d, dmin, scales, mins, codes = _with_mins(blocks, 32, 63, 31)
    high = np.packbits(codes.reshape(-1, 8, 32) >> 4, axis=1, bitorder="little").reshape(-1, 32)
    return _joined(d, dmin, _six_bits(scales, mins), high, _four_bits(codes & np.uint8(15)))


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
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}


def _with_mins(
    blocks: F32, sub_values: int, most_scale: int, most_code: int
) -> tuple[NDArray[np.float16], NDArray[np.float16], U8, U8, U8]:
    """d, dmin [n, 1], scales, mins [n, sub-blocks] and codes [n, 256]; a value is
    d * scale * code - dmin * min. The least value of a sub-block is at most 0 here.
    """
    sub = blocks.reshape(-1, sub_values)
    least = np.minimum(sub.min(axis=1), 0)
    wanted: F32 = ((sub.max(axis=1) - least) / most_code).reshape(len(blocks), -1)
    wanted_mins: F32 = -least.reshape(len(blocks), -1)
    d = (wanted.max(axis=1, keepdims=True) / most_scale).astype("<f2")
    dmin = (wanted_mins.max(axis=1, keepdims=True) / most_scale).astype("<f2")
    scales = np.clip(np.rint(_over(wanted, d)), 0, most_scale)
    mins = np.clip(np.rint(_over(wanted_mins, dmin)), 0, most_scale)
    steps = (d.astype(np.float32) * scales).reshape(-1, 1).astype(np.float32)
    raised: F32 = sub + (dmin.astype(np.float32) * mins).reshape(-1, 1).astype(np.float32)
    codes = np.clip(np.rint(_over(raised, steps)), 0, most_code).astype(np.uint8)
    return d, dmin, scales.astype(np.uint8), mins.astype(np.uint8), codes.reshape(-1, 256)


def _fifth_bits(codes: U8) -> U8:
    """Bit 4 of 32 codes as the 32 bits of 4 bytes; [n, 4]."""
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _two_bits(codes: U8) -> U8:
    """Codes of 2 bits: each half of 128 in 32 bytes, four runs of 32 at rising bits; [n, 64]."""
    q = codes.reshape(-1, 2, 4, 32)
    packed = q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6
    return packed.astype(np.uint8).reshape(-1, 64)


def _four_bits(codes: U8) -> U8:
    """Codes of 4 bits: each 64 in 32 bytes, the first 32 in the low nibbles; [n, 128]."""
    q = codes.reshape(-1, 4, 2, 32)
    packed = q[:, :, 0] | q[:, :, 1] << 4
    return packed.astype(np.uint8).reshape(-1, 128)


def _six_bits(scales: U8, mins: U8) -> U8:
    """Eight scales and mins of 6 bits in 12 bytes; [n, 12]."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = mins[:, :4] | mins[:, 4:] >> 4 << 6
    third = scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1)


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
