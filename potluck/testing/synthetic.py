"""The weights of synthetic models by numpy: a second implementation of cpp/engine/synthetic.h.

Written from the definition there, so that a test can compare the bytes; the oracle computes with
these. A tensor whole, with some copies: for small models.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from potluck.blocks import BY_NAME
from potluck.gguf import GgufFile, Synthetic, TensorInfo

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
# Where a block has d, what its codes (times scales) have for a mean square, and the middle of codes
# with a minimum.
_CODES: dict[str, tuple[int, float, float]] = {
    "q4_0": (0, 21.5, 0),
    "q4_1": (0, 21.25, -7.5),
    "q5_0": (0, 85.5, 0),
    "q5_1": (0, 85.25, -15.5),
    "q8_0": (0, 5461.5, 0),
    "q2_k": (80, 77.5 * 1.25, 1.5),
    "q3_k": (108, 341.5 * 5.5, 0),
    "q4_k": (0, 1333.5 * 21.25, 7.5),
    "q5_k": (0, 1333.5 * 85.25, 15.5),
    "q6_k": (208, 5461.5 * 341.5, 0),
}
_GAINS = {"attn_q": 1.5, "attn_k": 1.5, "output": 3.0}
_ADDED = ("attn_output", "ffn_down")  # to the hidden state


def tensor_bytes(file: GgufFile, name: str) -> bytes:
    """All rows of a tensor of a synthetic model, in the layout of its type."""
    assert file.synthetic is not None
    tensor = file.tensors[name]
    block = BY_NAME[tensor.type_name]
    rows = _random_rows(
        file.synthetic, name, tensor.rows, tensor.cols // block.values * block.size_bytes
    )
    blocks = rows.reshape(-1, block.size_bytes)
    if "norm" in name:
        k = blocks.view("<u4")[:, 0] % 4096
        return (np.float32(1) + _centred(k) / np.float32(32768)).astype("<f4").tobytes()
    deviation = _deviation(file.synthetic, tensor)
    if tensor.type_name not in _CODES:
        return _floats(blocks, tensor.type_name, deviation)
    if tensor.type_name == "q2_k":
        scales = blocks[:, :16] & 15
        blocks[:, :16] = scales | (scales ^ (blocks[:, :16] >> 4 & 1)) << 4
    if tensor.type_name in ("q4_k", "q5_k"):
        _finish_six_bits(blocks)
    _finish_scales(blocks, tensor.type_name, deviation)
    return blocks.tobytes()


def _mix(z: U64) -> U64:
    """SplitMix64's."""
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: U64 = z ^ z >> np.uint64(31)
    return mixed


def _random_rows(model: Synthetic, name: str, n_rows: int, row_bytes: int) -> U8:
    """[n_rows, row_bytes]."""
    hashed = 0xCBF29CE484222325
    for letter in name.encode():
        hashed = (hashed ^ letter) * 0x100000001B3 % 2**64
    seeded = _mix(np.array([model.seed], np.uint64))
    key = _mix(np.array([hashed], np.uint64) ^ seeded)
    row_keys = _mix(key + np.arange(1, n_rows + 1, dtype=np.uint64) * _GAMMA)
    n_words = -(-row_bytes // 8)
    counters = np.arange(1, n_words + 1, dtype=np.uint64) * _GAMMA
    words = _mix(row_keys[:, None] + counters[None, :]).astype("<u8")
    return words.view(np.uint8).reshape(n_rows, -1)[:, :row_bytes].copy()


def _deviation(model: Synthetic, tensor: TensorInfo) -> float:
    if tensor.name == "token_embd.weight":
        return 0.5
    part = tensor.name.removesuffix(".weight").rpartition(".")[2]
    parts = 2 * model.n_layers if part in _ADDED else 1
    return _GAINS.get(part, 1.0) / math.sqrt(tensor.cols * parts)


def _centred(k: U32) -> NDArray[np.float32]:
    return 2 * k.astype(np.float32) - np.float32(4095)


def _floats(blocks: U8, type_name: str, deviation: float) -> bytes:
    k = blocks.view(f"<u{blocks.shape[1]}")[:, 0] % 4096
    values = np.float32(deviation * math.sqrt(3) / 4096) * _centred(k)
    if type_name == "bf16":
        bits = values.view(np.uint32)
        return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if type_name == "f16" else "<f4").tobytes()


def _finish_six_bits(blocks: U8) -> None:
    """Minimums beside the scales of q4_k and q5_k, in bytes 4 to 15."""
    first, second, last = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    blocks[:, 8:12] = first ^ second & 3
    blocks[:, 12:16] = last & 15 | ((last & 15) ^ (last >> 4 & 1)) << 4


def _finish_scales(blocks: U8, type_name: str, deviation: float) -> None:
    at, variance, middle = _CODES[type_name]
    unit = np.float32(deviation / math.sqrt(variance * (13 / 12)) / 1024)
    bits = blocks[:, at : at + 2].copy().view("<u2")[:, 0]
    d = (unit * (512 + bits % 1024).astype(np.float32)).astype("<f2")
    if not middle:
        d = np.where(bits >> 15, -d, d).astype("<f2")
    else:
        jitter = 2 * (blocks[:, at + 2] & 15).astype(np.float32) - np.float32(15)
        least = d.astype(np.float32) * (np.float32(middle) + jitter / np.float32(32))
        blocks[:, at + 2 : at + 4] = least.astype("<f2")[:, None].view(np.uint8)
    blocks[:, at : at + 2] = d[:, None].view(np.uint8)
