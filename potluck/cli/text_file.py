"""A text from a file or stdin, as other tools read it: without its last line's end."""

from __future__ import annotations

import sys
from pathlib import Path

from potluck.cursor import shown
from potluck.errors import UsageError


def read(given: str) -> str:
    """The text of file `given`, of stdin for "-". Raises UsageError.

    One newline at the end is left out: llama.cpp's tools do that, and figures shall compare.
    """
    name = "stdin" if given == "-" else shown(given)
    try:
        data = sys.stdin.buffer.read() if given == "-" else Path(given).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{name}: can't be read ({reason})") from error
    try:
        return data.removesuffix(b"\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: byte {error.start} is no text") from error
