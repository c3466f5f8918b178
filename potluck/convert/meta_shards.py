"""The consolidated.NN.pth files of one Meta checkpoint: that all are there, and how they join.

Meta cut each matrix over as many files as GPUs, by rows or by columns; vectors are in every file.
`joined` puts the pieces of one tensor together as a TensorSource and reads only the rows asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from potluck.blocks import BY_NAME
from potluck.convert.pth_file import PthFile, open_pth
from potluck.cursor import shown
from potluck.errors import ModelError
from potluck.stored_tensor import StoredTensor

FLOAT_TYPES = ("f32", "f16", "bf16")
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_FETCH = "fetch the missing files; Meta lists them with their sums in checklist.chk"


class Cut(Enum):
    """How a tensor lies over the files."""

    ROWS = "rows"
    COLUMNS = "columns"
    COPIES = "copies"  # the same in each


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor under its GGUF name; `pieces` in the order of their files, whose shapes fit."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    pieces: Sequence[StoredTensor]
    cut: Cut

    def read(self, first_row: int, n_rows: int) -> bytes:
        """Rows [first_row, first_row + n_rows), read from the files that have them."""
        if self.cut is Cut.COPIES:
            return self.pieces[0].read(first_row, n_rows)
        if self.cut is Cut.COLUMNS:
            return self._read_columns(first_row, n_rows)
        parts, start = [], 0
        for piece in self.pieces:
            rows = piece.shape[0]
            first, stop = max(first_row - start, 0), min(first_row + n_rows - start, rows)
            if first < stop:
                parts.append(piece.read(first, stop - first))
            start += rows
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_columns(self, first_row: int, n_rows: int) -> bytes:
        """Each file has a run of every row: they are laid side by side."""
        row_bytes = self.shape[-1] * BY_NAME[self.type_name].size_bytes
        out = np.empty((n_rows, row_bytes), np.uint8)
        at = 0
        for piece in self.pieces:
            data = piece.read(first_row, n_rows)
            part = np.frombuffer(data, np.uint8).reshape(n_rows, -1)
            out[:, at : at + part.shape[1]] = part
            at += part.shape[1]
        return out.tobytes()


def shard_paths(folder: Path) -> list[Path]:
    """The files consolidated.NN.pth of `folder`, from 00 on. Raises ModelError: one is missing."""
    found = {int(m[1]): p for p in folder.iterdir() if (m := _SHARD.fullmatch(p.name))}
    if not found:
        raise ModelError(f"{shown(str(folder))}: no consolidated.00.pth", remedy=_FETCH)
    check_count(folder, sorted(found), max(found) + 1)
    return [found[i] for i in range(len(found))]


def check_count(folder: Path, found: Sequence[int], n_expected: int) -> None:
    """Raises ModelError unless files 0 to n_expected - 1 were `found`, and no other."""
    name = shown(str(folder))
    if missing := [i for i in range(n_expected) if i not in found]:
        names = ", ".join(f"consolidated.{i:02}.pth" for i in missing[:3])
        names += f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        there = f"{n_expected - len(missing)} of {n_expected} files"
        verb = "is" if len(missing) == 1 else "are"
        raise ModelError(f"{name}: {there}, {names} {verb} missing", remedy=_FETCH)
    if len(found) > n_expected:
        more = f"{len(found)} files, expected {n_expected} by their shapes"
        raise ModelError(f"{name}: {more}", remedy="keep the files of one model in the folder")


def open_shards(paths: Sequence[Path]) -> list[PthFile]:
    """All of them, with the same tensors in each. Raises ModelError."""
    files = [open_pth(path) for path in paths]
    first = files[0].tensors.keys()
    for file in files[1:]:
        if lacking := sorted(first - file.tensors.keys()):
            raise file.error(f"{shown(lacking[0])} is missing, {paths[0].name} has it")
        if extra := sorted(file.tensors.keys() - first):
            raise file.error(f"{shown(extra[0])} is there, {paths[0].name} does not have it")
    return files


def joined(
    files: Sequence[PthFile], name: str, gguf_name: str, cut: Cut, expected: tuple[int, ...]
) -> Joined:
    """The pieces of `name`. Raises ModelError: missing, no weights, or not of shape `expected`.

    A dimension of `expected` that is 0 follows from the files.
    """
    if name not in files[0].tensors:
        raise files[0].error(f"{shown(name)} is missing")
    pieces = [file.tensors[name] for file in files]
    first = pieces[0]
    for file in files:
        _check_piece(file, name, first, len(expected))
    shape = _whole_shape(cut, pieces)
    if any(want and want != has for want, has in zip(expected, shape, strict=True)):
        wanted = [want or has for want, has in zip(expected, shape, strict=True)]
        found = f"{_told(cut, pieces)} {list(shape)}"
        raise ModelError(f"{shown(name)}: {found}, params.json implies {wanted}")
    return Joined(gguf_name, shape, first.type_name, pieces, cut)


def copies_differ(tensor: Joined) -> bool:
    """Whether a vector that should be the same in each file is not. Reads all of them."""
    whole = {piece.read(0, 1) for piece in tensor.pieces}
    return len(whole) > 1


def _check_piece(file: PthFile, name: str, first: StoredTensor, n_dimensions: int) -> None:
    """Of weights, and of the first file's shape: Meta cut into equal parts."""
    piece = file.tensors[name]
    if piece.type_name not in FLOAT_TYPES or piece.type_name != first.type_name:
        kinds = "f16, bf16 or f32, and the same in each file"
        raise file.error(f"{shown(name)} is {piece.type_name}, expected {kinds}")
    if piece.shape != first.shape:
        theirs = f"{list(first.shape)} in {first.stamp.path.name}"
        ours = f"{list(piece.shape)} in {piece.stamp.path.name}"
        raise ModelError(f"{shown(name)}: shapes {theirs} and {ours} do not concatenate")
    if len(piece.shape) != n_dimensions:
        found = f"shape {list(piece.shape)}, expected {n_dimensions} dimensions"
        raise file.error(f"{shown(name)}: {found}")


def _whole_shape(cut: Cut, pieces: Sequence[StoredTensor]) -> tuple[int, ...]:
    shape, n = pieces[0].shape, len(pieces)
    if cut is Cut.COPIES:
        return shape
    return (shape[0] * n, shape[1]) if cut is Cut.ROWS else (shape[0], shape[1] * n)


def _told(cut: Cut, pieces: Sequence[StoredTensor]) -> str:
    """ "8 pieces of [1024, 8192] make"; of one file "its shape is"."""
    if cut is Cut.COPIES or len(pieces) == 1:
        return "its shape is"
    return f"{len(pieces)} pieces of {list(pieces[0].shape)}, joined by {cut.value}, make"
