"""Writes GGUF files, right ones and wrong ones: every field has a name and can be overwritten.

A file is laid out as named fields first, then overwritten, then joined; so a test damages exactly
one thing, and a name that does not exist is an error and never a test of nothing. The names:

    magic version n_tensors n_keys padding
    key.K.name.length  key.K.name  key.K.type  key.K.value
        a string's:    key.K.length               an array's:  key.K.element_type  key.K.n_elements
    tensor.T.name.length  tensor.T.name  tensor.T.n_dimensions  tensor.T.dimension.0 (fastest first)
        tensor.T.type  tensor.T.offset  tensor.T.data  tensor.T.padding
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from potluck.blocks import BY_NAME

# Metadata types by name: number in the file, letter of struct.
KINDS = {
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
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Typed:
    """A metadata value of an unusual type: Typed("u16", 7), Typed("f64", [1.5])."""

    kind: str
    value: bool | int | float | Sequence[bool] | Sequence[int] | Sequence[float]


Metadata = Typed | bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor's data as it goes into the file; `shape` has the slowest dimension first."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Field:
    """A named piece of a file."""

    name: str
    data: bytes


def gguf_fields(
    metadata: Sequence[tuple[str, Metadata]], tensors: Sequence[Tensor], *, alignment: int = 32
) -> list[Field]:
    """The pieces of a version 3 file, in order. Pairs and not a dict: keys may stand twice."""
    fields = [
        Field("magic", b"GGUF"),
        Field("version", _u32(3)),
        Field("n_tensors", _u64(len(tensors))),
        Field("n_keys", _u64(len(metadata))),
    ]
    for key, value in metadata:
        fields += _string(f"key.{key}.name", key)
        fields += _value_fields(f"key.{key}", value)
    offset = 0
    for tensor in tensors:
        fields += _tensor_fields(tensor, offset)
        offset += _padded(len(tensor.data), alignment)
    header_bytes = sum(len(f.data) for f in fields)
    fields.append(Field("padding", bytes(_padded(header_bytes, alignment) - header_bytes)))
    for tensor in tensors:
        rest = _padded(len(tensor.data), alignment) - len(tensor.data)
        fields.append(Field(f"tensor.{tensor.name}.data", tensor.data))
        fields.append(Field(f"tensor.{tensor.name}.padding", bytes(rest)))
    return fields


def overwritten(fields: Sequence[Field], changes: Mapping[str, int | bytes]) -> bytes:
    """The file with `changes`: an int keeps the field's size (and wraps), bytes replace the field.

    Raises KeyError for a name that is not there. Nothing else moves: offsets and counts keep the
    values of the right file, which is what makes it wrong.
    """
    left = dict(changes)
    pieces = []
    for f in fields:
        new = left.pop(f.name, f.data)
        if isinstance(new, int):
            new = (new % (1 << 8 * len(f.data))).to_bytes(len(f.data), "little")
        pieces.append(new)
    if left:
        raise KeyError(f"no field {', '.join(left)}")
    return b"".join(pieces)


def write_gguf(
    path: Path,
    metadata: Sequence[tuple[str, Metadata]],
    tensors: Sequence[Tensor],
    *,
    alignment: int = 32,
    changes: Mapping[str, int | bytes] | None = None,
) -> Path:
    """Writes the file, with `changes` as in `overwritten`, and returns `path`."""
    fields = gguf_fields(metadata, tensors, alignment=alignment)
    path.write_bytes(overwritten(fields, changes or {}))
    return path


def _value_fields(name: str, value: Metadata) -> list[Field]:
    if isinstance(value, str):
        data = value.encode()
        return [
            Field(f"{name}.type", _u32(_STRING)),
            Field(f"{name}.length", _u64(len(data))),
            Field(f"{name}.value", data),
        ]
    typed = value if isinstance(value, Typed) else _usual(value)
    if isinstance(typed, Typed) and not isinstance(typed.value, Sequence):
        number, letter = KINDS[typed.kind]
        data = struct.pack("<" + letter, typed.value)
        return [Field(f"{name}.type", _u32(number)), Field(f"{name}.value", data)]
    if isinstance(typed, Typed):
        assert isinstance(typed.value, Sequence)
        number, letter = KINDS[typed.kind]
        n, data = len(typed.value), struct.pack(f"<{len(typed.value)}{letter}", *typed.value)
    else:
        number, n = _STRING, len(typed)
        data = b"".join(_u64(len(s.encode())) + s.encode() for s in typed)
    return [
        Field(f"{name}.type", _u32(_ARRAY)),
        Field(f"{name}.element_type", _u32(number)),
        Field(f"{name}.n_elements", _u64(n)),
        Field(f"{name}.value", data),
    ]


def _usual(value: bool | int | float | Sequence[object]) -> Typed | Sequence[str]:  # noqa: FBT001  a value, no switch
    """The type that converters give such a value: bool, u32, f32; arrays i32, f32, strings."""
    if isinstance(value, bool):
        return Typed("bool", value)
    if isinstance(value, int):
        return Typed("u32", value)
    if isinstance(value, float):
        return Typed("f32", value)
    strings = [v for v in value if isinstance(v, str)]
    if len(strings) == len(value):
        return strings
    numbers = [v for v in value if isinstance(v, int | float)]
    is_whole = all(isinstance(v, int) for v in numbers)
    return Typed("i32" if is_whole else "f32", numbers)


def _tensor_fields(tensor: Tensor, offset: int) -> list[Field]:
    name = f"tensor.{tensor.name}"
    fields = _string(f"{name}.name", tensor.name)
    fields.append(Field(f"{name}.n_dimensions", _u32(len(tensor.shape))))
    for i, size in enumerate(reversed(tensor.shape)):
        fields.append(Field(f"{name}.dimension.{i}", _u64(size)))
    fields.append(Field(f"{name}.type", _u32(BY_NAME[tensor.type_name].number)))
    fields.append(Field(f"{name}.offset", _u64(offset)))
    return fields


def _string(name: str, text: str) -> list[Field]:
    return [Field(f"{name}.length", _u64(len(text.encode()))), Field(name, text.encode())]


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _padded(size_bytes: int, alignment: int) -> int:
    return -(-size_bytes // alignment) * alignment
