"""Breaks lines of a streamed answer between words. Pure: the width is an argument.

A word is held back until its end is known, so nothing on the screen ever moves. Line breaks and
blanks of the answer stay; one is only added where a word would cross the edge of the terminal.
"""

from __future__ import annotations

import re
import unicodedata

_PIECES = re.compile(r"\n|[^\S\n]+|\S+")


class Wrapper:
    """Text in, the same text with line breaks out. For one answer."""

    def __init__(self, width: int) -> None:
        self._width = width  # in columns; 0: no breaks
        self._column = 0
        self._blank = ""  # written when a word follows on the same line
        self._word = ""

    def push(self, text: str) -> str:
        """What may be written now that `text` has come."""
        out: list[str] = []
        for piece in _PIECES.findall(text):
            if piece == "\n":
                out.append(self._end_word() + "\n")
                self._column, self._blank = 0, ""
            elif piece.isspace():
                out.append(self._end_word())
                self._blank += piece
            else:
                self._word += piece
        return "".join(out)

    def finish(self) -> str:
        """What was held back; the answer is over."""
        return self._end_word()

    def _end_word(self) -> str:
        word, self._word = self._word, ""
        if not word:
            return ""
        blank, self._blank = self._blank, ""
        columns = _columns(word)
        if self._width and self._column and self._column + len(blank) + columns > self._width:
            blank, self._column = "\n", 0
        else:
            self._column += len(blank)
        self._column += columns
        if self._width and self._column > self._width:  # a word longer than a line
            self._column = (self._column - 1) % self._width + 1
        return blank + word


def _columns(text: str) -> int:
    """Columns on a terminal: two for wide characters, none for those that combine."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )
