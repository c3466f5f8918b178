"""Reads the JSON files beside a model, strictly: bounded, no key twice, types as expected.

A refusal is a ModelError that names the file and the key. JSON has many ways to say nothing, so a
key that is missing and one that is null are the same here: None.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Never

from potluck.convert.whole_file import read_text
from potluck.cursor import shown
from potluck.errors import ModelError

CONFIG_BYTES_LIMIT = 4 * 2**20


@dataclass(frozen=True, slots=True)
class JsonObject:
    """One object of a file, and where it stands in it."""

    file: str
    values: Mapping[str, object] = field(repr=False)
    place: str = ""  # "model.": before the names of its keys; the file's own object has none

    def text(self, key: str) -> str | None:
        """A string. Raises ModelError for any other type and for half a surrogate pair."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            self.refuse(key, "a string")
        if value is not None and not is_unicode(value):
            self.refuse(key, "Unicode text")
        return value

    def flag(self, key: str) -> bool | None:
        """true or false. Raises ModelError for any other type."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def integer(self, key: str) -> int | None:
        """A whole number, neither fraction nor bool. Raises ModelError for any other type."""
        value = self.values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            self.refuse(key, "a whole number")
        return value

    def whole(self, key: str, least: int, most: int, default: int | None = None) -> int:
        """An integer from `least` to `most`. No value: `default`, or refused if there is none."""
        found = self.integer(key)
        found = default if found is None else found
        if found is None or not least <= found <= most:
            self.refuse(key, f"a whole number from {least:,} to {most:,}")
        return found

    def number(self, key: str, least: float, most: float, default: float | None = None) -> float:
        """A number from `least` to `most`. No value: as in `whole`."""
        found = self.values.get(key)
        found = default if found is None else found
        if isinstance(found, bool) or not isinstance(found, int | float):
            self.refuse(key, f"a number from {least:g} to {most:g}")
        if not least <= found <= most:  # so is what JSON makes of 1e999
            self.refuse(key, f"a number from {least:g} to {most:g}")
        return float(found)

    def strings(self, key: str) -> list[str]:
        """An array of strings; [] if there is none. Raises ModelError for any other type."""
        found = self.array(key)
        strings = [value for value in found if isinstance(value, str)]
        if len(strings) < len(found):
            self.refuse(key, "an array of strings")
        return strings

    def inner(self, key: str) -> JsonObject | None:
        """An object in this one. Raises ModelError for any other type."""
        value = self.values.get(key)
        if value is None:
            return None
        return self._object(value, key)

    def objects(self, key: str) -> list[JsonObject]:
        """An array of objects; [] if there is none. Raises ModelError for any other type."""
        return [self._object(value, f"{key}[{i}]") for i, value in enumerate(self.array(key))]

    def array(self, key: str) -> Sequence[object]:
        """An array of anything; () if there is none. Raises ModelError for any other type."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            self.refuse(key, "an array")
        return value

    def error(self, message: str, *, remedy: str = "") -> ModelError:
        """A ModelError about this file."""
        return ModelError(f"{self.file}: {message}", remedy=remedy)

    def refuse(self, key: str, expected: str) -> Never:
        """Raises ModelError: the value of `key` is not what was `expected`."""
        found = shown(_described(self.values.get(key)))
        raise self.error(f"{shown(self.place + key)} is {found}, expected {expected}")

    def _object(self, value: object, key: str) -> JsonObject:
        if not isinstance(value, dict):
            name = shown(self.place + key)
            raise self.error(f"{name} is {shown(_described(value))}, expected an object")
        return JsonObject(self.file, value, f"{self.place}{key}.")


def read_json(path: Path, *, limit_bytes: int = CONFIG_BYTES_LIMIT) -> JsonObject:
    """The object that the file at `path` holds.

    Raises UnknownModel (no such file) and ModelError: unreadable, too large, no JSON, a key twice,
    nested without end, or something else than an object.
    """
    return parse_json(read_text(path, limit_bytes=limit_bytes), shown(str(path)))


def parse_json(text: str, file: str) -> JsonObject:
    """The object that `text` of `file` holds. Raises ModelError as `read_json`."""
    try:
        value = json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else shown(str(error))
        raise ModelError(f"{file}: is not JSON as expected ({why})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds {shown(_described(value))}, expected an object")
    return JsonObject(file, value)


def is_unicode(text: str) -> bool:
    """Whether `text` has a UTF-8 form: JSON can spell half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice[:100]!r} stands twice")
    return values


def _no_number(name: str) -> Never:
    raise ValueError(f"{name} is no number of JSON")


def _described(value: object) -> str:
    names = {dict: "an object", list: "an array", type(None): "nothing"}
    return names.get(type(value)) or repr(value)[:80]
