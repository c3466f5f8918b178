"""Where the entries of a zip lie that nobody compressed, as torch.save and numpy write them.

Nothing is ever unpacked: an entry that is compressed, or claims more bytes than it has, is refused
by its name, so no zip can be a bomb. All names, sizes and places are checked against each other and
against the file before an entry is given out. Source: APPNOTE.TXT 6.3.10, with zip64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from potluck.cursor import CUT_SHORT, Cursor, shown

ENTRIES_LIMIT = 65_536
DIRECTORY_BYTES_LIMIT = 64 * 2**20

_END = struct.Struct("<4sHHHHIIH")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR_64 = struct.Struct("<4sIQI")
_LISTED = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_STORED, _ENCRYPTED, _WIDE = 0, 1, 0xFFFFFFFF
_COMMENT_BYTES = 0xFFFF
_RESAVE = "save it again with torch.save, which does not compress"


@dataclass(frozen=True, slots=True)
class Entry:
    """The contents of one entry: bytes [offset_bytes, offset_bytes + size_bytes) of the file."""

    name: str
    offset_bytes: int
    size_bytes: int


class _Listed(NamedTuple):
    """An entry as the directory has it; `at` is where its own header starts."""

    name: str
    at: int
    size_bytes: int


def entries_of(file: Cursor) -> dict[str, Entry]:
    """Every entry of the zip `file` by its name. Raises ModelError: no zip, damaged, compressed."""
    directory_start, directory, n_entries = _directory(file)
    listed = _listed(file, directory, n_entries)
    entries: dict[str, Entry] = {}
    stop, before = 0, ""
    for item in sorted(listed, key=lambda item: item.at):
        if item.at < stop:
            raise file.error(f"entry {shown(item.name)} overlaps {shown(before)}", at=item.at)
        entry = _located(file, item)
        stop, before = entry.offset_bytes + entry.size_bytes, item.name
        if stop > directory_start:
            raise file.error(
                f"entry {shown(item.name)} ends {stop - directory_start:,} bytes behind the"
                " contents of the zip",
                at=item.at,
                remedy=CUT_SHORT,
            )
        if item.name in entries:
            raise file.error(f"entry {shown(item.name)} stands twice")
        entries[item.name] = entry
    return entries


def _read(file: Cursor, start: int, size_bytes: int, what: str) -> bytes:
    """Bytes [start, start + size_bytes) of the file, if it has so many."""
    if (behind := start + size_bytes - file.size_bytes) > 0:
        message = f"{what} ends {behind:,} bytes behind the end of the file"
        raise file.error(message, at=start, remedy=CUT_SHORT)
    return file.read_at(start, size_bytes)


def _directory(file: Cursor) -> tuple[int, bytes, int]:
    """Where the directory starts, its bytes, and how many entries it lists."""
    tail_bytes = min(file.size_bytes, _END.size + _COMMENT_BYTES)
    tail = _read(file, file.size_bytes - tail_bytes, tail_bytes, "the end of the zip")
    found = tail.rfind(b"PK\x05\x06")
    if found < 0 or found + _END.size > len(tail):
        raise file.error("the end of the zip is missing", remedy=CUT_SHORT)
    _, disk, _, _, n_entries, size_bytes, start, comment_bytes = _END.unpack_from(tail, found)
    end = file.size_bytes - tail_bytes + found
    if end + _END.size + comment_bytes != file.size_bytes:
        raise file.error("bytes behind the end of the zip", at=end)
    before = _read(file, end - _LOCATOR_64.size, _LOCATOR_64.size, "zip64") if end >= 20 else b""
    if before.startswith(b"PK\x06\x07"):
        end = _LOCATOR_64.unpack(before)[2]
        fields = _END_64.unpack(_read(file, end, _END_64.size, "the end of the zip64"))
        signature, disk, n_entries, size_bytes, start = fields[0], fields[4], *fields[7:]
        if signature != b"PK\x06\x06":
            raise file.error("the end of the zip64 is missing", at=end)
    if disk:
        raise file.error("a zip in several parts is not supported")
    if n_entries > ENTRIES_LIMIT or size_bytes > DIRECTORY_BYTES_LIMIT:
        limits = f"at most {ENTRIES_LIMIT:,} in {DIRECTORY_BYTES_LIMIT:,} are supported"
        raise file.error(f"{n_entries:,} entries listed in {size_bytes:,} bytes, {limits}")
    if start + size_bytes > end:
        raise file.error("the zip's directory ends behind its place", at=start, remedy=CUT_SHORT)
    return start, _read(file, start, size_bytes, "the zip's directory"), n_entries


def _listed(file: Cursor, directory: bytes, n_entries: int) -> list[_Listed]:
    listed, at = [], 0
    for index in range(n_entries):
        what = f"entry {index} of the zip's directory"
        if at + _LISTED.size > len(directory):
            raise file.error(f"{what} is missing", remedy=CUT_SHORT)
        fields = _LISTED.unpack_from(directory, at)
        name_bytes, extra_bytes, comment_bytes = fields[10:13]
        name_stop = at + _LISTED.size + name_bytes
        extra = directory[name_stop : name_stop + extra_bytes]
        if fields[0] != b"PK\x01\x02" or name_stop + extra_bytes + comment_bytes > len(directory):
            raise file.error(f"{what} is damaged", remedy=CUT_SHORT)
        name = _decoded(file, directory[at + _LISTED.size : name_stop], what)
        packed, size, start = _sizes(file, name, extra, (fields[8], fields[9], fields[16]))
        if fields[4] != _STORED or packed != size:
            claim = f"{packed:,} bytes in the file claim to be {size:,}"
            raise file.error(f"entry {shown(name)} is compressed: {claim}", remedy=_RESAVE)
        if fields[3] & _ENCRYPTED:
            raise file.error(f"entry {shown(name)} is encrypted", remedy=_RESAVE)
        listed.append(_Listed(name, start, size))
        at = name_stop + extra_bytes + comment_bytes
    return listed


def _decoded(file: Cursor, name: bytes, what: str) -> str:
    """A name that stays inside the archive. Nothing is written by it, but an honest zip has none
    that leads elsewhere.
    """
    try:
        text = str(name, "utf-8")
    except UnicodeDecodeError as e:
        raise file.error(f"the name of {what} is not UTF-8") from e
    parts = text.split("/")
    if not parts[0] or ".." in parts or "\\" in text or "\0" in text or ":" in parts[0]:
        raise file.error(f"entry {shown(text)!r} leads out of the zip", remedy="don't trust it")
    return text


def _sizes(
    file: Cursor, name: str, extra: bytes, short: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Bytes in the file, bytes claimed, offset; from the zip64 field where 32 bits are too few."""
    packed, size, start = short
    if _WIDE not in short:
        return packed, size, start
    wide = _zip64_field(extra)
    numbers = [n for (n,) in struct.iter_unpack("<Q", wide[: len(wide) // 8 * 8])]
    if len(numbers) < short.count(_WIDE):
        raise file.error(f"entry {shown(name)} has no 64-bit sizes")
    size = numbers.pop(0) if size == _WIDE else size  # in this order, each only if it is needed
    packed = numbers.pop(0) if packed == _WIDE else packed
    start = numbers.pop(0) if start == _WIDE else start
    return packed, size, start


def _zip64_field(extra: bytes) -> bytes:
    at = 0
    while at + 4 <= len(extra):
        kind, size_bytes = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            return extra[at + 4 : at + 4 + size_bytes]
        at += 4 + size_bytes
    return b""


def _located(file: Cursor, item: _Listed) -> Entry:
    """Contents start behind the entry's own header, whose padding the directory does not know."""
    what = f"the header of entry {shown(item.name)}"
    fields = _LOCAL.unpack(_read(file, item.at, _LOCAL.size, what))
    name_bytes, extra_bytes = fields[9:]
    name = _read(file, item.at + _LOCAL.size, name_bytes, what)
    if fields[0] != b"PK\x03\x04" or name != item.name.encode() or fields[3] != _STORED:
        raise file.error(f"{what} is not what the zip's directory says", at=item.at)
    start = item.at + _LOCAL.size + name_bytes + extra_bytes
    return Entry(item.name, start, item.size_bytes)
