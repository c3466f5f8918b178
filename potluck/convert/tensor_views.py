"""Tensors seen differently: under another name, with rows in another order, or made up.

Each is a TensorSource (potluck/tensor_source.py) over another and reads only the rows asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potluck.blocks import BY_NAME
from potluck.tensor_source import TensorSource, rows_and_cols

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Renamed:
    """`source` under GGUF's name."""

    name: str
    source: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the source."""
        return self.source.shape

    @property
    def type_name(self) -> str:
        """That of the source."""
        return self.source.type_name

    def read(self, first_row: int, n_rows: int) -> bytes | memoryview:
        """As the source reads."""
        return self.source.read(first_row, n_rows)


@dataclass(frozen=True, slots=True)
class View:
    """What a tensor seen differently has from `source`."""

    source: TensorSource

    @property
    def name(self) -> str:
        """That of the source."""
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the source."""
        return self.source.shape

    @property
    def type_name(self) -> str:
        """That of the source."""
        return self.source.type_name


@dataclass(frozen=True, slots=True)
class Interleaved(View):
    """q or k of Hugging Face's LLaMA, [heads * head_dim, cols], with rotary pairs side by side.

    Or their bias, [heads * head_dim]. Hugging Face turns values i and i + head_dim/2 of a head
    together, GGUF's `llama` values 2i and 2i + 1: row 2i + j of a head here is row
    j * head_dim/2 + i there.
    """

    head_dim: int

    def read(self, first_row: int, n_rows: int) -> bytes:
        """Reads the heads that the rows are of, whole."""
        if not n_rows:
            return b""
        if len(self.shape) == 1:
            values = np.frombuffer(self.source.read(0, 1), np.uint8).reshape(self.shape[0], -1)
            return values[halved_rows(0, self.shape[0], self.head_dim)].tobytes()
        start = first_row // self.head_dim * self.head_dim
        stop = -(-(first_row + n_rows) // self.head_dim) * self.head_dim
        data = np.frombuffer(self.source.read(start, stop - start), np.uint8)
        rows = halved_rows(first_row, n_rows, self.head_dim)
        return data.reshape(stop - start, -1)[rows - start].tobytes()


@dataclass(frozen=True, slots=True)
class InMemory:
    """A small tensor that no file has."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    data: bytes

    def read(self, first_row: int, n_rows: int) -> bytes:
        """Rows of it."""
        row_bytes = len(self.data) // rows_and_cols(self.shape)[0]
        return self.data[first_row * row_bytes : (first_row + n_rows) * row_bytes]


def f32_vector(name: str, values: tuple[float, ...]) -> InMemory:
    """`values` under `name`."""
    return InMemory(name, "f32", (len(values),), np.array(values, "<f4").tobytes())


def halved_rows(first_row: int, n_rows: int, head_dim: int) -> I64:
    """Which of Hugging Face's rows of q or k are GGUF's [first_row, first_row + n_rows)."""
    rows = np.arange(first_row, first_row + n_rows)
    at = rows % head_dim
    return rows - at + at % 2 * (head_dim // 2) + at // 2


def f32_rows(source: TensorSource, first_row: int, n_rows: int) -> F32:
    """Rows as values, [n_rows, cols], a copy. `source` is f32, f16 or bf16."""
    data = source.read(first_row, n_rows)
    if source.type_name == "bf16":
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        size_bytes = BY_NAME[source.type_name].size_bytes
        values = np.frombuffer(data, f"<f{size_bytes}").astype("<f4")
    return values.reshape(n_rows, source.shape[-1])
