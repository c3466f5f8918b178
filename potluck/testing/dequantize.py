"""The weights of a file as float64, by numpy: the oracle's own reading of the layouts.

Written from the layouts alone, independent of the engine and of quantize.py; a test compares it
with the `gguf` package's dequantizers.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from potluck.blocks import BY_NAME
from potluck.gguf import GgufFile
from potluck.testing.synthetic import tensor_bytes

F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]


def tensor_values(file: GgufFile, name: str) -> F64:
    """One tensor in its shape. Raises KeyError: not in `file`; ValueError: type not known."""
    tensor = file.tensors[name]
    if file.synthetic is not None:
        data = tensor_bytes(file, name)
    else:
        with file.path.open("rb") as f:
            data = os.pread(f.fileno(), tensor.size_bytes, tensor.offset_bytes)
    return dequantize(data, tensor.type_name).reshape(tensor.shape)


def dequantize(data: bytes, type_name: str) -> F64:
    """All values of `data`, whole blocks of `type_name`, in order; [n]."""
    if type_name not in _DEQUANTIZERS:
        raise ValueError(f"no dequantizer for {type_name} ({', '.join(_DEQUANTIZERS)})")
    blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, BY_NAME[type_name].size_bytes)
    return _DEQUANTIZERS[type_name](blocks).reshape(-1)


def _f32(blocks: U8) -> F64:
    return blocks.view("<f4").astype(np.float64)


def _f16(blocks: U8) -> F64:
    return blocks.view("<f2").astype(np.float64)


def _bf16(blocks: U8) -> F64:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _q4_0(blocks: U8) -> F64:
    return (_nibbles(blocks[:, 2:]) - 8) * _half(blocks, 0)


def _q4_1(blocks: U8) -> F64:
    return _nibbles(blocks[:, 4:]) * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: U8) -> F64:
    return (_five_bits(blocks[:, 2:6], blocks[:, 6:]) - 16) * _half(blocks, 0)


def _q5_1(blocks: U8) -> F64:
    return _five_bits(blocks[:, 4:8], blocks[:, 8:]) * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: U8) -> F64:
    codes: F64 = blocks[:, 2:].view(np.int8).astype(np.float64)
    return codes * _half(blocks, 0)


def _q2_k(blocks: U8) -> F64:
    scales, codes = blocks[:, :16], _two_bits(blocks[:, 16:80]).reshape(-1, 16, 16)
    steps = (scales & 15) * _half(blocks, 80)
    mins = (scales >> 4) * _half(blocks, 82)
    values: F64 = codes * steps[:, :, None] - mins[:, :, None]
    return values.reshape(-1, 256)


def _q3_k(blocks: U8) -> F64:
    """A third bit for each value: bit 4 half + run of byte l, l the column in a run of 32."""
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    high = (blocks[:, None, :32] >> shifts & 1).reshape(-1, 256)  # [block, half and run, l]
    codes: F64 = (_two_bits(blocks[:, 32:96]) + 4 * high - 4).reshape(-1, 16, 16)
    s = blocks[:, 96:108]
    low = np.concatenate([s[:, :8] & 15, s[:, :8] >> 4], axis=1)
    top = np.concatenate([s[:, 8:] >> 2 * i & 3 for i in range(4)], axis=1)
    steps = ((low | top << 4).astype(np.float64) - 32) * _half(blocks, 108)
    values: F64 = codes * steps[:, :, None]
    return values.reshape(-1, 256)


def _q4_k(blocks: U8) -> F64:
    return _of_six_bit_scales(blocks, _four_bits(blocks[:, 16:]))


def _q5_k(blocks: U8) -> F64:
    """The fifth bit of a value: bit j of byte l, j the run of 32 that it stands in."""
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    high = (blocks[:, None, 16:48] >> shifts & 1).reshape(-1, 256)
    return _of_six_bit_scales(blocks, _four_bits(blocks[:, 48:]) + 16 * high)


def _q6_k(blocks: U8) -> F64:
    """Each half of 128 values: 64 bytes of low bits, 32 of high bits; a scale for 16 values."""
    n = len(blocks)
    low = blocks[:, :128].reshape(n, 2, 2, 32)  # [block, half, l < 32 or not, l]
    high = blocks[:, 128:192].reshape(n, 2, 1, 32)
    # Runs of 32 values: low nibbles of both byte groups, then their high nibbles.
    q = np.concatenate([low & 15, low >> 4], axis=2)  # [block, half, run, l]
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    codes: F64 = (q | (high >> shifts & 3) << 4).reshape(n, 16, 16).astype(np.float64) - 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.float64)[:, :, None]
    return (codes * scales).reshape(n, 256) * _half(blocks, 208)


_DEQUANTIZERS: dict[str, Callable[[U8], F64]] = {
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


def _half(blocks: U8, at: int) -> F64:
    """The f16 at byte `at` of each block; [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float64)


def _nibbles(codes: U8) -> F64:
    """Byte j holds element j (low) and element j + 16 (high); [n, 16] to [n, 32]."""
    return np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float64)


def _five_bits(high: U8, codes: U8) -> F64:
    """Nibbles as above and a fifth bit each: bit j of the 32 in `high`; [n, 32]."""
    bits = np.unpackbits(np.ascontiguousarray(high), axis=1, bitorder="little")
    return _nibbles(codes) + 16.0 * bits


def _two_bits(codes: U8) -> F64:
    """Each half of 128 values has 32 bytes, four runs of 32 at rising bits; [n, 256]."""
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    runs = codes.reshape(-1, 2, 1, 32) >> shifts & 3  # [block, half, run, l]
    return runs.reshape(-1, 256).astype(np.float64)


def _four_bits(codes: U8) -> F64:
    """Each 64 values share 32 bytes, the low nibbles first; [n, 256]."""
    pairs = codes.reshape(-1, 4, 32)
    both = np.stack([pairs & 15, pairs >> 4], axis=2)  # [block, 64 values, low or high, l]
    return both.reshape(-1, 256).astype(np.float64)


def _of_six_bit_scales(blocks: U8, codes: F64) -> F64:
    """Eight sub-blocks with scale and min of 6 bits, in bytes 4 to 15; d and dmin before them."""
    s = blocks[:, 4:16]
    scales = np.concatenate([s[:, :4] & 63, s[:, 8:] & 15 | s[:, :4] >> 6 << 4], axis=1)
    mins = np.concatenate([s[:, 4:8] & 63, s[:, 8:] >> 4 | s[:, 4:8] >> 6 << 4], axis=1)
    steps, least = scales * _half(blocks, 0), mins * _half(blocks, 2)
    values = codes.reshape(-1, 8, 32) * steps[:, :, None] - least[:, :, None]
    return values.reshape(-1, 256)
