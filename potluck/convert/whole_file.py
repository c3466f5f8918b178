"""Small files beside a model, read whole: checked for size, for text, and for being themselves."""

from __future__ import annotations

from pathlib import Path

from potluck.cursor import opened, shown
from potluck.errors import ModelError


def read_bytes(path: Path, *, limit_bytes: int) -> bytes:
    """What the file at `path` holds.

    Raises UnknownModel (no such file) and ModelError: a folder, not readable, empty, more than
    `limit_bytes`, or a pointer of Git LFS.
    """
    name = shown(str(path))
    with opened(path, limit_bytes=limit_bytes) as cursor:
        if cursor.size_bytes > limit_bytes:
            size = f"{cursor.size_bytes:,} bytes, at most {limit_bytes:,} are supported"
            raise ModelError(f"{name}: {size}")
        cursor.refuse_pointer()
        data = cursor.take(cursor.size_bytes, "the file")
    if not data:
        raise ModelError(f"{name}: is empty", remedy="fetch the file again")
    return data


def read_text(path: Path, *, limit_bytes: int) -> str:
    """The same as text. Raises ModelError, besides, if it is not UTF-8."""
    try:
        return read_bytes(path, limit_bytes=limit_bytes).decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{shown(str(path))}: is not UTF-8 (byte {error.start:,})") from error
