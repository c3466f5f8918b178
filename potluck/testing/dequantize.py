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

F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]


def tensor_values(file: GgufFile, name: str) -> F64:
    """One tensor in its shape. Raises KeyError: not in `file`; ValueError: type not known."""
    tensor = file.tensors[name]
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


def _q8_0(blocks: U8) -> F64:
    codes: F64 = blocks[:, 2:].view(np.int8).astype(np.float64)
    return codes * _half(blocks, 0)


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
    "q8_0": _q8_0,
    "q6_k": _q6_k,
}


def _half(blocks: U8, at: int) -> F64:
    """The f16 at byte `at` of each block; [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float64)


def _nibbles(codes: U8) -> F64:
    """Byte j holds element j (low) and element j + 16 (high); [n, 16] to [n, 32]."""
    return np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float64)
