"""Where the tensors of a model that is about to be written come from: a seam, and nothing else.

A converter or a GGUF gives a ModelSource; potluck/model_writer.py takes one. Nobody holds a tensor
whole: rows are read as they are needed, so a model may be many times larger than memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

# Kinds of metadata values: number in a GGUF, letter of struct.
KINDS: Mapping[str, tuple[int, str]] = MappingProxyType(
    {
        "u8": (0, "B"),
        "i8": (1, "b"),
        "u16": (2, "H"),
        "i16": (3, "h"),
        "u32": (4, "I"),
        "i32": (5, "i"),
        "f32": (6, "f"),
        "bool": (7, "?"),
        "u64": (10, "Q"),
        "i64": (11, "q"),
        "f64": (12, "d"),
    }
)


@dataclass(frozen=True, slots=True)
class Typed:
    """A metadata value of a type that its Python type does not tell: Typed("u64", 7).

    `kind`: one of KINDS, of each element.
    """

    kind: str
    value: bool | int | float | Sequence[bool] | Sequence[int] | Sequence[float]


# Without Typed: whole numbers are u32, arrays of them i32, fractions f32.
Metadata = Typed | bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]


class TensorSource(Protocol):
    """One tensor under its GGUF name, in GGUF's order of rows."""

    @property
    def name(self) -> str:
        """As the file will have it: "blk.0.attn_q.weight"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Slowest dimension first: (rows, cols), or (values,) of a vector."""

    @property
    def type_name(self) -> str:
        """Of the bytes that `read` gives: a type of potluck/blocks.py the engine knows."""

    def read(self, first_row: int, n_rows: int) -> bytes | memoryview:
        """Rows [first_row, first_row + n_rows), whole, in the layout of `type_name`.

        A vector is one row. Raises ModelError: the file is cut short or unreadable. Any thread, one
        at a time.
        """


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model as pairs of metadata and tensors, in the order in which they are written.

    `identity` names what it was made of (files, sizes, times): equal identities, equal bytes. So
    an interrupted writing goes on only with what it began with. `paths`: what must not be written
    over. `notes`: what a person should know of how the model was read, a line each.
    """

    metadata: Sequence[tuple[str, Metadata]] = field(repr=False)
    tensors: Sequence[TensorSource] = field(repr=False)
    identity: str
    paths: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def rows_and_cols(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of a matrix as it is; a vector is one row."""
    return math.prod(shape[:-1]), shape[-1]
