"""The header of a GGUF that is about to be written: metadata and tensors to bytes.

The counterpart of potluck/gguf.py, which reads what this writes: version 3, little-endian;
ggml/docs/gguf.md. Pure: values in, bytes out. A value that the format can't hold is a ModelError
with its key, never a wrong byte.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from potluck.blocks import BY_NAME
from potluck.cursor import shown
from potluck.errors import ModelError
from potluck.gguf import DIMENSIONS_LIMIT, MAGIC, TensorInfo
from potluck.tensor_source import KINDS, Metadata, Typed

VERSION = 3
ALIGNMENT = 32  # of each tensor's data, unless the metadata says otherwise
NAME_BYTES_LIMIT = 63  # of a tensor: ggml's 64 hold a NUL, too

_STRING, _ARRAY = 8, 9
_FRACTIONS = ("f32", "f64")


@dataclass(frozen=True, slots=True)
class TensorHeading:
    """What the header says of one tensor. `shape`: slowest dimension first."""

    name: str
    type_name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A file's header, and where each tensor lies behind it; in between are zeros."""

    header: bytes = field(repr=False)  # padded: the data starts where it ends
    tensors: tuple[TensorInfo, ...] = field(repr=False)
    size_bytes: int  # of the whole file


def laid_out(metadata: Sequence[tuple[str, Metadata]], tensors: Sequence[TensorHeading]) -> Layout:
    """The file of these pairs and tensors, in this order, tensors at multiples of the alignment.

    Raises ModelError: a key or a tensor twice, a value that its type can't hold, rows that are no
    whole blocks.
    """
    alignment = _alignment(metadata)
    _check_unique("metadata key", [key for key, _ in metadata])
    _check_unique("tensor", [t.name for t in tensors])
    places, offset_bytes = [], 0
    for heading in tensors:
        places.append(_placed(heading, offset_bytes))
        offset_bytes = _padded(offset_bytes + places[-1].size_bytes, alignment)
    head = struct.pack("<4sIQQ", MAGIC, VERSION, len(tensors), len(metadata))
    pieces = [head, *(_pair(key, value) for key, value in metadata), *map(_tensor, places)]
    header = b"".join(pieces)
    start = _padded(len(header), alignment)
    return Layout(
        header.ljust(start, b"\0"),
        tuple(
            TensorInfo(t.name, t.type_name, t.shape, start + t.offset_bytes, t.size_bytes)
            for t in places
        ),
        start + offset_bytes,
    )


def _alignment(metadata: Sequence[tuple[str, Metadata]]) -> int:
    value = next((value for key, value in metadata if key == "general.alignment"), ALIGNMENT)
    number = value.value if isinstance(value, Typed) else value
    if not isinstance(number, int) or number < 8 or number & (number - 1):
        raise ModelError(f"general.alignment is {number}, expected a power of two, 8 or more")
    return number


def _check_unique(what: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen or not name:
            problem = "stands twice" if name else "without a name"
            raise ModelError(f"{what} {shown(name)} {problem}".replace("  ", " "))
        seen.add(name)


def _placed(heading: TensorHeading, offset_bytes: int) -> TensorInfo:
    """Checked, with its size; the offset is from the start of the data."""
    what = f"tensor {shown(heading.name)}"
    name_bytes = len(_encoded(heading.name, what))
    if name_bytes > NAME_BYTES_LIMIT:
        raise ModelError(f"{what}: a name of {name_bytes} bytes, at most {NAME_BYTES_LIMIT} fit")
    shape = heading.shape
    if not 1 <= len(shape) <= DIMENSIONS_LIMIT or min(shape) < 1:
        expected = f"expected 1 to {DIMENSIONS_LIMIT} dimensions, none of them 0"
        raise ModelError(f"{what}: shape {list(shape)}, {expected}")
    block = BY_NAME[heading.type_name]
    if shape[-1] % block.values:
        expected = f"a multiple of {block.values}, the block of {block.name}"
        raise ModelError(f"{what}: rows of {shape[-1]:,} values, expected {expected}")
    size_bytes = math.prod(shape) // block.values * block.size_bytes
    return TensorInfo(heading.name, heading.type_name, shape, offset_bytes, size_bytes)


def _tensor(tensor: TensorInfo) -> bytes:
    n = len(tensor.shape)
    numbers = (n, *reversed(tensor.shape), BY_NAME[tensor.type_name].number, tensor.offset_bytes)
    return _string(tensor.name, tensor.name) + struct.pack(f"<I{n}QIQ", *numbers)


def _pair(key: str, value: Metadata) -> bytes:
    name = _string(key, "a metadata key")
    if isinstance(value, str):
        return name + struct.pack("<I", _STRING) + _string(value, key)
    typed = value if isinstance(value, Typed) else _usual(key, value)
    if not isinstance(typed, Typed):
        strings = b"".join(_string(text, key) for text in typed)
        return name + struct.pack("<IIQ", _ARRAY, _STRING, len(typed)) + strings
    if typed.kind not in KINDS:
        raise ModelError(f"metadata key {shown(key)}: unknown type {typed.kind}")
    number, letter = KINDS[typed.kind]
    if isinstance(typed.value, bool | int | float):
        return name + struct.pack("<I", number) + _packed(key, typed.kind, letter, [typed.value])
    head = struct.pack("<IIQ", _ARRAY, number, len(typed.value))
    return name + head + _packed(key, typed.kind, letter, typed.value)


def _usual(key: str, value: bool | int | float | Sequence[object]) -> Typed | Sequence[str]:  # noqa: FBT001  a value, no switch
    """The type that a value without one gets; an empty array is one of strings."""
    if isinstance(value, bool | int | float):
        return Typed(_usual_kind(value, whole="u32"), value)
    strings = [v for v in value if isinstance(v, str)]
    if len(strings) == len(value):
        return strings
    numbers = [v for v in value if isinstance(v, bool | int | float)]
    kinds = {_usual_kind(v, whole="i32") for v in numbers}
    if len(numbers) != len(value) or (len(kinds) > 1 and "bool" in kinds):
        raise ModelError(f"metadata key {shown(key)}: an array of values of different types")
    return Typed("f32" if "f32" in kinds else kinds.pop(), numbers)


def _usual_kind(value: bool | int | float, *, whole: str) -> str:  # noqa: FBT001  a value, no switch
    if isinstance(value, bool):
        return "bool"
    return whole if isinstance(value, int) else "f32"


def _packed(
    key: str, kind: str, letter: str, values: Sequence[bool] | Sequence[int] | Sequence[float]
) -> bytes:
    if kind not in _FRACTIONS and any(isinstance(v, float) for v in values):
        raise ModelError(f"metadata key {shown(key)}: a fraction does not fit its type {kind}")
    try:
        return struct.pack(f"<{len(values)}{letter}", *values)
    except (struct.error, OverflowError) as e:
        raise ModelError(f"metadata key {shown(key)}: a value does not fit its type {kind}") from e


def _string(text: str, what: str) -> bytes:
    data = _encoded(text, what)
    return struct.pack("<Q", len(data)) + data


def _encoded(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise ModelError(f"{shown(what)}: text that is not UTF-8 ({e.reason})") from e


def _padded(size_bytes: int, alignment: int) -> int:
    return -(-size_bytes // alignment) * alignment
