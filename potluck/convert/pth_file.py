"""A `.pth` or `pytorch_model.bin` of torch: which tensors it holds, and their rows as bytes.

The zip that torch.save has written since version 1.6. Every storage's place and size is checked
against the file and the tensors that use it before anything is read. Rows are read by their offset
and not mapped: a file cut short under a mapping kills the process, and mapped pages count as ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from potluck.convert.pickle_reader import TensorView, read_tensors
from potluck.convert.stored_zip import Entry, entries_of
from potluck.cursor import Cursor, opened, shown
from potluck.errors import ModelError
from potluck.stored_tensor import FileStamp, StoredTensor, stamp_of

PICKLE_BYTES_LIMIT = 64 * 2**20

_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
_RESAVE = "load it with torch >= 1.6 and weights_only=True, and torch.save it again"
_CONTIGUOUS = "save it again after tensor.contiguous()"
_NO_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class PthFile:
    """The tensors of a file by name. Some may be no weights, by their type ("i64", "bool")."""

    stamp: FileStamp
    tensors: Mapping[str, StoredTensor] = field(repr=False)

    def error(self, message: str, *, remedy: str = "") -> ModelError:
        """A ModelError about this file."""
        return ModelError(f"{shown(self.stamp.path.name)}: {message}", remedy=remedy)


def open_pth(path: Path) -> PthFile:
    """Reads what `path` holds, no weights. Raises ModelError; nothing in it is ever run."""
    with opened(path, limit_bytes=_NO_LIMIT) as file:
        _check_kind(file)
        entries = entries_of(file)
        folder = _folder(file, entries)
        _check_byte_order(file, entries.get(f"{folder}/byteorder"))
        pickled = entries[f"{folder}/data.pkl"]
        if pickled.size_bytes > PICKLE_BYTES_LIMIT:
            found = f"{pickled.name} has {pickled.size_bytes:,} bytes"
            raise file.error(f"{found}, at most {PICKLE_BYTES_LIMIT:,} are supported")
        data = file.read_at(pickled.offset_bytes, pickled.size_bytes)
        stamp, views = stamp_of(path, file), read_tensors(data, shown(path.name))
        tensors = {}
        for name, view in views.items():
            start, size_bytes = _place(file, name, view, entries, folder)
            type_name = view.storage.type_name
            tensors[name] = StoredTensor(name, type_name, view.shape, stamp, start, size_bytes)
        return PthFile(stamp, tensors)


def _check_kind(file: Cursor) -> None:
    """A zip, or a refusal that says what it is instead."""
    start = file.read_at(0, min(512, file.size_bytes))
    if start.startswith(b"PK\x03\x04"):
        return
    file.refuse_pointer()
    if start.startswith(_LEGACY_MAGIC):
        raise file.error("written by torch before 1.6, not a zip", remedy=_RESAVE)
    if start[257:262] == b"ustar":
        raise file.error("a tar, as torch wrote before 0.1.10", remedy=_RESAVE)
    raise file.error(f"{file.size_bytes:,} bytes, not a file of torch.save (no zip)")


def _folder(file: Cursor, entries: Mapping[str, Entry]) -> str:
    """The one folder in the zip, named after the file as it was when it was saved."""
    folders = {name.partition("/")[0] for name in entries}
    if len(folders) != 1:
        found = ", ".join(sorted(folders)[:4]) or "nothing"
        raise file.error(f"not a file of torch.save: the zip holds {shown(found)}")
    folder = folders.pop()
    if f"{folder}/data.pkl" not in entries:
        remedy = (
            "a TorchScript program, not weights" if f"{folder}/constants.pkl" in entries else ""
        )
        raise file.error(
            f"not a file of torch.save: {shown(folder)}/data.pkl is missing", remedy=remedy
        )
    return folder


def _check_byte_order(file: Cursor, entry: Entry | None) -> None:
    """Newer versions of torch say it; before that all were little."""
    if entry is None:
        return
    order = file.read_at(entry.offset_bytes, min(entry.size_bytes, 16))
    if order != b"little":
        raise file.error(f"byte order {shown(repr(order))}; only little is supported")


def _place(
    file: Cursor, name: str, tensor: TensorView, entries: Mapping[str, Entry], folder: str
) -> tuple[int, int]:
    """Offset and bytes of the values of `tensor` in the file, checked."""
    what, storage = f"tensor {shown(name)}", tensor.storage
    entry = entries.get(f"{folder}/data/{storage.key}")
    if entry is None:
        raise file.error(f"{what}: storage {shown(storage.key)} is missing")
    if entry.size_bytes != storage.n_values * storage.value_bytes:
        expected = f"expected {storage.n_values:,} {storage.type_name}"
        raise file.error(f"{what}: its storage has {entry.size_bytes:,} bytes, {expected}")
    if not tensor.shape or 0 in tensor.shape:
        raise file.error(f"{what}: shape {list(tensor.shape)}, expected at least one value a row")
    if not _is_contiguous(tensor):
        found = f"strides {list(tensor.strides)} for shape {list(tensor.shape)}"
        raise file.error(f"{what}: a transposed or cut view ({found})", remedy=_CONTIGUOUS)
    n_values = math.prod(tensor.shape)
    if tensor.first_value + n_values > storage.n_values:
        behind = tensor.first_value + n_values - storage.n_values
        raise file.error(f"{what}: {behind:,} values behind the end of its storage")
    start = entry.offset_bytes + tensor.first_value * storage.value_bytes
    return start, n_values * storage.value_bytes


def _is_contiguous(tensor: TensorView) -> bool:
    """Rows follow each other without gaps; the stride of a dimension of 1 says nothing."""
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
