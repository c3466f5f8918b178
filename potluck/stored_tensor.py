"""A tensor as a place in a file, of whatever format, and whether that file is still the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from potluck.cursor import Cursor, opened
from potluck.tensor_source import rows_and_cols


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Which bytes a path led to: they are still the same while this is."""

    path: Path
    inode: int
    size_bytes: int
    changed_ns: int

    @property
    def identity(self) -> str:
        """Equal as long as the file is."""
        return f"{self.path} {self.size_bytes} {self.changed_ns}"

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Bytes of the file, which is opened for this. Raises ModelError: gone, changed, broken.

        Opened each time (10 us; a slab of 16 MB takes 5 ms): a model of 191 files holds no
        descriptors. Not mapped: mapped pages count as this process's memory, and a file that is
        cut short while it is mapped kills the process.
        """
        with opened(self.path, limit_bytes=0) as cursor:
            if stamp_of(self.path, cursor) != self:
                raise cursor.error("changed while it was read; start again")
            return cursor.read_at(offset_bytes, size_bytes)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file: a TensorSource (potluck/tensor_source.py) under the file's name."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    stamp: FileStamp
    offset_bytes: int  # from the start of the file
    size_bytes: int

    def read(self, first_row: int, n_rows: int) -> bytes:
        """Rows [first_row, first_row + n_rows). Raises ModelError."""
        rows, _ = rows_and_cols(self.shape)
        assert 0 <= first_row <= first_row + n_rows <= rows
        row_bytes = self.size_bytes // rows
        return self.stamp.read(self.offset_bytes + first_row * row_bytes, n_rows * row_bytes)


def stamp(path: Path) -> FileStamp:
    """Of the file at `path` as it is now. Raises UnknownModel, ModelError: no regular file."""
    with opened(path, limit_bytes=0) as cursor:
        return stamp_of(path, cursor)


def stamp_of(path: Path, cursor: Cursor) -> FileStamp:
    """Of the file that `cursor` reads, opened by `path`."""
    status = cursor.status
    return FileStamp(path, status.st_ino, status.st_size, status.st_mtime_ns)
