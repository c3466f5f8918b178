"""What a safetensors file holds, and rows of it: 8 bytes of length, a JSON header, the tensors.

The file is untrusted: length, JSON, names, types, shapes and places are checked against the file's
size, with exact integers, before anything else is read. Tensors lie one after the other without
overlap, hole or rest. A refusal is a ModelError with the file's name. Why not the library
`safetensors`: docs/decisions/0020-own-safetensors-reader.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from potluck.convert.json_file import JsonObject, is_unicode, parse_json
from potluck.cursor import CUT_SHORT, Cursor, opened, shown
from potluck.stored_tensor import FileStamp, StoredTensor, stamp_of

# The library stops at 100 MB; a shard of 65B has 12 KB, all of a 405B model 140 KB.
HEADER_BYTES_LIMIT = 8 * 2**20
_DIMENSIONS_LIMIT = 8

# Type in the file -> its name in potluck/blocks.py (of others, which no model that we convert
# may use, the name in the file), and the bytes of a value.
_TYPES = {
    "F32": ("f32", 4),
    "F16": ("f16", 2),
    "BF16": ("bf16", 2),
    "F64": ("f64", 8),
    "I64": ("i64", 8),
    "I32": ("i32", 4),
    "I16": ("i16", 2),
    "I8": ("i8", 1),
    "U64": ("U64", 8),
    "U32": ("U32", 4),
    "U16": ("U16", 2),
    "U8": ("U8", 1),
    "BOOL": ("BOOL", 1),
    "F8_E4M3": ("F8_E4M3", 1),
    "F8_E5M2": ("F8_E5M2", 1),
    "F8_E8M0": ("F8_E8M0", 1),
    "C64": ("C64", 8),
}


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """The tensors of a file, by name, in the order of their places."""

    stamp: FileStamp
    tensors: Mapping[str, StoredTensor]


def open_safetensors(path: Path) -> SafetensorsFile:
    """The file at `path`, its header checked. Raises ModelError, UnknownModel if there is none."""
    with opened(path, limit_bytes=8 + HEADER_BYTES_LIMIT) as cursor:
        stamp = stamp_of(path, cursor)
        cursor.refuse_pointer()
        header_bytes = cursor.whole("Q", "the length of the header")
        if header_bytes > cursor.size_bytes - cursor.offset:
            found = f"a header of {header_bytes:,} bytes, the file has {cursor.size_bytes:,}"
            raise cursor.error(found, remedy=CUT_SHORT)
        header = _header(cursor, header_bytes, shown(str(path)))
        places = [
            _stored(header, name, stamp, cursor.offset)
            for name in header.values
            if name != "__metadata__"
        ]
        places.sort(key=lambda t: (t.offset_bytes, t.size_bytes))
        _check_places(cursor, places)
    return SafetensorsFile(stamp, {t.name: t for t in places})


def _header(cursor: Cursor, size_bytes: int, file: str) -> JsonObject:
    try:
        text = str(cursor.take(size_bytes, "the header"), "utf-8")
    except UnicodeDecodeError as e:
        raise cursor.error(f"the header is not UTF-8 (byte {e.start:,})") from e
    header = parse_json(text, file)
    notes = header.inner("__metadata__")
    if notes and not all(isinstance(v, str) for v in notes.values.values()):
        header.refuse("__metadata__", "an object of strings")
    return header


def _stored(header: JsonObject, name: str, stamp: FileStamp, data_start: int) -> StoredTensor:
    """One tensor, checked for itself."""
    if not is_unicode(name) or (entry := header.inner(name)) is None:
        raise header.error(f"{shown(name)} is no tensor")
    what = f"tensor {shown(name)}"
    if unknown := entry.values.keys() - {"dtype", "shape", "data_offsets"}:
        raise header.error(f"{what}: unknown key {shown(min(unknown))}")
    if (type_ := entry.text("dtype") or "") not in _TYPES:
        raise header.error(f"{what}: unknown type {shown(type_)}")
    type_name, value_bytes = _TYPES[type_]
    shape, offsets = _wholes(entry, "shape"), _wholes(entry, "data_offsets")
    if len(shape) > _DIMENSIONS_LIMIT:
        found = f"{len(shape)} dimensions, at most {_DIMENSIONS_LIMIT} are supported"
        raise header.error(f"{what}: {found}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise header.error(f"{what}: data_offsets are not a start and an end")
    start, stop = offsets
    if (size_bytes := math.prod(shape) * value_bytes) != stop - start:
        found = f"{stop - start:,} bytes, shape {list(shape)} of {type_} takes {size_bytes:,}"
        raise header.error(f"{what}: {found}")
    return StoredTensor(name, type_name, shape, stamp, data_start + start, size_bytes)


def _wholes(entry: JsonObject, key: str) -> tuple[int, ...]:
    found = [v for v in entry.array(key) if type(v) is int and 0 <= v < 2**63]
    if key not in entry.values or len(found) < len(entry.array(key)):
        entry.refuse(key, "an array of whole numbers")
    return tuple(found)


def _check_places(cursor: Cursor, places: list[StoredTensor]) -> None:
    """Each tensor, in the order of places, begins where the one before ends; so does the end."""
    stop = cursor.offset
    for t in places:
        if t.offset_bytes + t.size_bytes > cursor.size_bytes:
            behind = t.offset_bytes + t.size_bytes - cursor.size_bytes
            found = f"{shown(t.name)} ends {behind:,} bytes behind the end of the file"
            raise cursor.error(found, remedy=CUT_SHORT)
        if t.offset_bytes < stop:
            raise cursor.error(f"{shown(t.name)} overlaps another tensor")
        if t.offset_bytes > stop:
            raise cursor.error(f"a hole of {t.offset_bytes - stop:,} bytes before {shown(t.name)}")
        stop = t.offset_bytes + t.size_bytes
    if stop < cursor.size_bytes:
        rest = cursor.size_bytes - stop
        raise cursor.error(f"{rest:,} bytes behind the last tensor that belong to none")
