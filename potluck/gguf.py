"""What a GGUF file holds: metadata, and where each tensor lies. Reads the header; of tensors, small
ones that are no weights.

Files are untrusted input: every length, count, type, offset and overlap is checked against the file
with exact integers before anything is allocated. A refusal is a ModelError that names the file, the
place, what was found and what was expected. Knows no architecture (that is potluck/model.py), and
is the only module that knows file offsets. Versions 2 and 3, little-endian; ggml/docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Never, TypeVar, cast

from potluck.blocks import BY_NUMBER
from potluck.cursor import CUT_SHORT, Cursor, opened, shown
from potluck.errors import DamagedTensor, ModelError, UnknownModel
from potluck.tensor_source import KINDS

Value = bool | int | float | str | Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str]
T = TypeVar("T", bound=bool | int | float | str)

# What a header may claim; far above any known file (the largest vocabularies have 262,144 tokens).
MAGIC = b"GGUF"
# Of GGML's files before GGUF; written as u32, so reversed in the file.
OLD_MAGICS = {
    magic: name
    for name in ("ggml", "ggmf", "ggjt", "ggla")
    for magic in (name.encode(), name.encode()[::-1])
}

KEYS_LIMIT = 65_536
TENSORS_LIMIT = 65_536
KEY_BYTES_LIMIT = 65_536
STRING_BYTES_LIMIT = 16 * 2**20
ARRAY_LIMIT = 2**24
HEADER_BYTES_LIMIT = 256 * 2**20
TENSOR_NAME_BYTES_LIMIT = 64
DIMENSIONS_LIMIT = 4

# Metadata types by number: scalars as letters of struct, then a string and an array.
_SCALARS = dict(KINDS.values())
_STRING, _ARRAY = 8, 9
# Their names, and a string's.
_KINDS = {number: kind for kind, (number, _) in KINDS.items()} | {_STRING: "str"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What one tensor is and where it lies. `shape`: slowest dimension first, (rows, cols)."""

    name: str
    type_name: str  # "q4_0"; potluck/blocks.py has them all
    shape: tuple[int, ...]
    offset_bytes: int  # from the start of the file
    size_bytes: int

    @property
    def cols(self) -> int:
        """Values of a row; rows are stored one after the other, in whole blocks."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """1 for a vector."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Which random weights a file would hold, were there one; the engine makes them."""

    seed: int
    n_layers: int  # of the whole model


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The checked header of one file. Arrays in `metadata` are read-only sequences."""

    path: Path
    version: int
    size_bytes: int
    metadata: Mapping[str, Value] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)  # in the file's order
    data_offset_bytes: int  # where the tensors' data starts
    header_sha256: str  # of bytes [0, data_offset_bytes), in hex; equal headers, equal model
    # Type in the file of each value, or of an array's elements: "u32", "str".
    kinds: Mapping[str, str] = field(default_factory=dict, repr=False)
    synthetic: Synthetic | None = None  # there is no file: potluck/synthetic.py made this header
    # There is no file but this header: tensors that are here, each in a file of its own whose name
    # is the sha256 of its bytes (potluck/tensor_store.py).
    stored: Mapping[str, Path] | None = field(default=None, repr=False)

    def text(self, key: str, default: str | None = None) -> str:
        """A string. Raises ModelError: another type, or missing without a default."""
        value = self._value(key, default)
        return value if isinstance(value, str) else self._refuse(key, value, "a string")

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number, neither float nor bool. Raises ModelError like `text`."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self._refuse(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite float; a whole number does. Raises ModelError like `text`."""
        value = self._value(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            self._refuse(key, value, "a finite number")
        return float(value)

    def flag(self, key: str, *, default: bool | None = None) -> bool:
        """A bool. Raises ModelError like `text`."""
        value = self._value(key, default)
        return value if isinstance(value, bool) else self._refuse(key, value, "true or false")

    def array(self, key: str, of: type[T]) -> Sequence[T]:
        """An array of str, int, float or bool. Raises ModelError: another type, or missing."""
        value = self._value(key, None)
        if not isinstance(value, tuple | memoryview) or _element_type(value) is not of:
            self._refuse(key, value, f"an array of {of.__name__}")
        return cast("Sequence[T]", value)

    def stored_path(self, name: str) -> Path:
        """The file that holds a tensor of a model that was delivered. Raises DamagedTensor."""
        path = None if self.stored is None else self.stored.get(name)
        if path is None:
            raise DamagedTensor(f"{shown(str(self.path))}: {shown(name)} is not here")
        return path

    def error(self, message: str, *, remedy: str = "") -> ModelError:
        """A ModelError about this file."""
        return ModelError(f"{shown(str(self.path))}: {message}", remedy=remedy)

    def _value(self, key: str, default: Value | None) -> Value:
        value = self.metadata.get(key, default)
        if value is None:
            raise self.error(f"missing metadata key {key}")
        return value

    def _refuse(self, key: str, value: Value, expected: str) -> Never:
        raise self.error(f"metadata key {key} is {_described(value)}, expected {expected}")


def read(path: str | Path) -> GgufFile:
    """The checked header of the file at `path`; SmolLM2's, with its 98,052 strings, in 50 ms.

    Raises UnknownModel (no such file) and ModelError (whatever else is wrong with it).
    """
    path = Path(path)
    with opened(path, limit_bytes=HEADER_BYTES_LIMIT) as cursor:
        return _read(path, cursor, cursor.size_bytes)


def read_header(path: str | Path, size_bytes: int, stored: Mapping[str, Path]) -> GgufFile:
    """A file of `size_bytes` of which only the header is here, at `path`, and some tensors.

    `stored`: as GgufFile.stored; of tensors that the header does not name nothing is made. Whose
    header it is says `header_sha256`: compare it. Raises as `read`, and ModelError if `path` holds
    anything but a whole header.
    """
    path = Path(path)
    with opened(path, limit_bytes=HEADER_BYTES_LIMIT) as cursor:
        file = _read(path, cursor, size_bytes)
        if file.data_offset_bytes != cursor.size_bytes:
            found = f"{cursor.size_bytes:,} bytes, but the header has {file.data_offset_bytes:,}"
            raise cursor.error(found)
    here = {name: stored[name] for name in file.tensors if name in stored}
    return replace(file, stored=MappingProxyType(here))


def _read(path: Path, cursor: Cursor, size_bytes: int) -> GgufFile:
    version = _read_version(cursor)
    n_tensors = cursor.count("tensors", TENSORS_LIMIT, least_bytes=33)
    n_keys = cursor.count("metadata keys", KEYS_LIMIT, least_bytes=14)
    metadata, kinds = _read_metadata(cursor, n_keys)
    alignment = _alignment(cursor, metadata)
    tensors = _read_tensors(cursor, n_tensors, alignment)
    # A file without tensors (a vocabulary only) may end without the padding.
    start = -(-cursor.offset // alignment) * alignment if tensors else cursor.offset
    tensors = [replace(t, offset_bytes=start + t.offset_bytes) for t in tensors]
    _check_places(cursor, tensors, size_bytes)
    return GgufFile(
        path=path,
        version=version,
        size_bytes=size_bytes,
        metadata=MappingProxyType(metadata),
        tensors=MappingProxyType({t.name: t for t in tensors}),
        data_offset_bytes=start,
        header_sha256=cursor.sha256(min(start, cursor.size_bytes)),
        kinds=MappingProxyType(kinds),
    )


def read_floats(file: GgufFile, tensor: TensorInfo) -> tuple[float, ...]:
    """The values of a small f32 tensor.

    Raises ModelError: unreadable, or shorter than it was; DamagedTensor: not here, or other bytes.
    """
    if file.stored is None:
        data = _tensor_bytes(file.path, tensor, tensor.offset_bytes)
    else:
        data = _stored_bytes(file.stored_path(tensor.name), tensor)
    return struct.unpack(f"<{tensor.size_bytes // 4}f", data)


def _stored_bytes(path: Path, tensor: TensorInfo) -> bytes:
    """The same as their name says, or DamagedTensor."""
    try:
        data = _tensor_bytes(path, tensor, 0)
    except UnknownModel as e:
        raise DamagedTensor(f"{shown(tensor.name)}: {e.message}") from e
    if hashlib.sha256(data).hexdigest() != path.name:
        raise DamagedTensor(f"{shown(tensor.name)}: {shown(str(path))} is damaged")
    return data


def _tensor_bytes(path: Path, tensor: TensorInfo, start: int) -> bytes:
    with opened(path, limit_bytes=start + tensor.size_bytes) as cursor:
        cursor.offset = start
        return cursor.take(tensor.size_bytes, f"tensor {shown(tensor.name)}")


def _read_version(cursor: Cursor) -> int:
    if cursor.size_bytes < 4:
        raise cursor.error(f"{cursor.size_bytes} bytes, not a GGUF file", remedy=CUT_SHORT)
    magic = cursor.take(4, "the magic")
    if old := OLD_MAGICS.get(magic):
        remedy = "fetch the original, or a GGUF file, and `potluck convert` that"
        raise cursor.error(f"magic '{old}': an old GGML file", remedy=remedy)
    if magic != MAGIC:
        cursor.refuse_pointer()
        raise cursor.error(f"starts with {magic!r} and not with b'GGUF': not a GGUF file")
    version = cursor.whole("I", "the version")
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (1, 2, 3):
        raise cursor.error(
            f"version {swapped} in big-endian byte order; only little-endian is read"
        )
    if version not in (2, 3):
        raise cursor.error(f"version {version}; 2 and 3 are supported")
    return version


def _read_metadata(cursor: Cursor, n_keys: int) -> tuple[dict[str, Value], dict[str, str]]:
    """Values and their kinds."""
    metadata: dict[str, Value] = {}
    kinds: dict[str, str] = {}
    for index in range(n_keys):
        start = cursor.offset
        key = cursor.string(f"the name of metadata key {index}", KEY_BYTES_LIMIT)
        what = f"metadata key {shown(key)}"
        if not key or key in metadata:
            found = f"{what} stands twice" if key else f"metadata key {index} has no name"
            raise cursor.error(found, at=start)
        metadata[key], kinds[key] = _read_value(cursor, what)
    return metadata, kinds


def _read_value(cursor: Cursor, what: str) -> tuple[Value, str]:
    """The value and its kind."""
    start = cursor.offset
    kind = cursor.whole("I", f"the type of {what}")
    if kind == _STRING:
        return cursor.string(what, STRING_BYTES_LIMIT), _KINDS[kind]
    if kind == _ARRAY:
        return _read_array(cursor, what)
    if kind not in _SCALARS:
        raise cursor.error(f"{what} has the unknown type {kind}", at=start)
    return _read_scalars(cursor, _SCALARS[kind], 1, what)[0], _KINDS[kind]


def _read_array(cursor: Cursor, what: str) -> tuple[Value, str]:
    start = cursor.offset
    kind = cursor.whole("I", f"the element type of {what}")
    if kind == _ARRAY:
        raise cursor.error(f"{what} is an array of arrays, which no model needs", at=start)
    if kind != _STRING and kind not in _SCALARS:
        raise cursor.error(f"{what} is an array of the unknown type {kind}", at=start)
    least_bytes = 8 if kind == _STRING else struct.calcsize("<" + _SCALARS[kind])
    n = cursor.count(f"elements in {what}", ARRAY_LIMIT, least_bytes=least_bytes)
    if kind == _STRING:
        return cursor.strings(n, what, STRING_BYTES_LIMIT), _KINDS[kind]
    return _read_scalars(cursor, _SCALARS[kind], n, what), _KINDS[kind]


def _read_scalars(cursor: Cursor, letter: str, n: int, what: str) -> memoryview[int]:
    """n values as a view: one copy of the file's bytes, elements come out as int, float or bool."""
    start = cursor.offset
    data = cursor.take(n * struct.calcsize("<" + letter), what)
    if letter == "?" and data.strip(b"\0\1"):
        raise cursor.error(f"{what} is a bool that is neither 0 nor 1", at=start)
    return cast("memoryview[int]", memoryview(data).cast(letter))  # type: ignore[call-overload]  # a table's letter


def _alignment(cursor: Cursor, metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if isinstance(alignment, bool) or not isinstance(alignment, int):
        raise cursor.error(f"general.alignment is {_described(alignment)}, expected a power of two")
    if alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment {alignment} is not a power of two")
    return alignment


def _read_tensors(cursor: Cursor, n_tensors: int, alignment: int) -> list[TensorInfo]:
    """Each tensor checked for itself; offsets are still from the start of the data."""
    tensors: dict[str, TensorInfo] = {}
    for index in range(n_tensors):
        start = cursor.offset
        name = cursor.string(f"the name of tensor {index}", TENSOR_NAME_BYTES_LIMIT)
        if not name or name in tensors:
            found = f"tensor {shown(name)} stands twice" if name else f"tensor {index} has no name"
            raise cursor.error(found, at=start)
        tensors[name] = _read_tensor(cursor, name, alignment)
    return list(tensors.values())


def _read_tensor(cursor: Cursor, name: str, alignment: int) -> TensorInfo:
    what = f"tensor {shown(name)}"
    n_dimensions = cursor.whole("I", what)
    if not 1 <= n_dimensions <= DIMENSIONS_LIMIT:
        raise cursor.error(f"{what}: {n_dimensions} dimensions, expected 1 to {DIMENSIONS_LIMIT}")
    shape = struct.unpack(f"<{n_dimensions}Q", cursor.take(8 * n_dimensions, what))[::-1]
    if 0 in shape:
        raise cursor.error(f"{what}: shape {list(shape)} has a dimension of 0, expected at least 1")
    number = cursor.whole("I", what)
    block = BY_NUMBER.get(number)
    if block is None:
        raise cursor.error(f"{what}: unknown type {number}, the last is {max(BY_NUMBER)}")
    if shape[-1] % block.values:
        expected = f"a multiple of {block.values}, the block of {block.name}"
        raise cursor.error(f"{what}: rows of {shape[-1]:,} values, expected {expected}")
    offset_bytes = cursor.whole("Q", what)
    if offset_bytes % alignment:
        raise cursor.error(f"{what}: data at {offset_bytes:,}, expected a multiple of {alignment}")
    size_bytes = math.prod(shape) // block.values * block.size_bytes
    return TensorInfo(name, block.name, shape, offset_bytes, size_bytes)


def _check_places(cursor: Cursor, tensors: Sequence[TensorInfo], size_bytes: int) -> None:
    """Inside a file of `size_bytes`, and none over another."""
    stop, before = 0, ""
    for t in sorted(tensors, key=lambda t: t.offset_bytes):
        if t.offset_bytes < stop:
            raise cursor.error(f"tensor {shown(t.name)}: its data overlaps that of {shown(before)}")
        stop, before = t.offset_bytes + t.size_bytes, t.name
        if stop > size_bytes:
            found = f"{t.size_bytes:,} bytes of data at offset {t.offset_bytes:,}"
            behind = f"end {stop - size_bytes:,} bytes behind the end of the file"
            raise cursor.error(f"tensor {shown(t.name)}: {found} {behind}", remedy=CUT_SHORT)


def _element_type(value: tuple[str, ...] | memoryview) -> type:
    if isinstance(value, tuple):
        return str
    return {"?": bool, "f": float, "d": float}.get(value.format, int)


def _described(value: Value) -> str:
    """A value's type and, if it is one value, the value."""
    if isinstance(value, tuple | memoryview):
        return f"an array of {len(value):,} {_element_type(value).__name__}"
    return f"{type(value).__name__} {shown(str(value))}"
