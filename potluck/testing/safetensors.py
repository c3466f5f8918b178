"""Writes safetensors files, right ones and wrong ones: the header is a dict that a test may change.

Needs no library. Values are numpy arrays; what numpy has no type for (BF16) comes as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potluck.testing.quantize import F32, quantize

_NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as it goes into the file."""

    dtype: str  # as the file says it: "BF16"
    shape: tuple[int, ...]
    data: bytes


def stored(values: F32, type_name: str = "f32") -> Stored:
    """`values` rounded to a type of potluck/blocks.py: "f32", "f16" or "bf16"."""
    return Stored(_NAMES[type_name], values.shape, quantize(values, type_name))


def indices(n: int) -> Stored:
    """0 to n - 1 in 64 bits: the buffer that old Hugging Face models carry."""
    return Stored("I64", (n,), np.arange(n, dtype=np.int64).tobytes())


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Stored],
    *,
    change: Callable[[dict[str, Any]], object] | None = None,
    length: int | None = None,
    rest: bytes = b"",
) -> Path:
    """Writes the file and returns `path`.

    `change` damages the header, `length` is claimed for it, `rest` follows the last tensor.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        places = [offset, offset + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": places}
        offset += len(tensor.data)
    if change is not None:
        change(header)
    text = json.dumps(header).encode()
    return write_raw(path, text, b"".join(t.data for t in tensors.values()) + rest, length=length)


def write_raw(path: Path, header: bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    """Writes a file with any header; returns `path`."""
    header += b" " * (-len(header) % 8)
    claimed = len(header) if length is None else length
    path.write_bytes(claimed.to_bytes(8, "little") + header + data)
    return path
