"""Reads `tokenizer.model`, SentencePiece's file: tokens, scores, kinds, what it does to text.

A reader of our own for the few fields that count (sentencepiece_model.proto has their numbers), so
that a damaged file is one clear line. Refuses by name what the engine's tokenizers do not do:
other algorithms than BPE, and every change of the text but LLaMA's, a space before the first word.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from potluck.convert.token_table import TokenTable, user_defined_text
from potluck.convert.whole_file import read_bytes
from potluck.cursor import opened, shown
from potluck.errors import ModelError
from potluck.vocabulary import TOKENS_LIMIT, Kind

_FILE_BYTES_LIMIT = 64 * 2**20  # LLaMA's has 0.5 MB, one of 262,144 tokens 4.7 MB
_ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_BPE = 2
# Fields of the messages, by number; a proto2 default holds where a field is missing.
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_SPECIAL = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, -1)}
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
# Llama 3's files of this name: a token in base64 and its rank, line by line.
_LINE_BYTES = 1024
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")
Field = int | bytes  # a varint, or the bytes of any other kind


@dataclass
class _Message:
    """The parts of a ModelProto; later fields replace earlier ones, as in every proto."""

    pieces: list[bytes] = field(default_factory=list)
    trainer: dict[int, Field] = field(default_factory=dict)
    normalizer: dict[int, Field] = field(default_factory=dict)
    denormalizer: dict[int, Field] = field(default_factory=dict)


def read_sentence_pieces(path: Path) -> TokenTable:
    """The vocabulary in the file at `path`.

    Raises UnknownModel (no such file) and ModelError: no SentencePiece model, damaged, or of a kind
    that is not supported.
    """
    name = shown(str(path))
    data = read_bytes(path, limit_bytes=_FILE_BYTES_LIMIT)
    if _TIKTOKEN.match(data[:_LINE_BYTES]):
        raise ModelError(
            f"{name}: a vocabulary of the tiktoken kind (Llama 3's), not of SentencePiece",
            remedy="convert the model's Hugging Face folder instead: it has a tokenizer.json",
        )
    try:
        message = _parsed(data)
        pieces = [_piece(i, piece) for i, piece in enumerate(message.pieces)]
        _check_supported(message)
        ids = _special_ids(message, len(pieces))
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from error
    table = TokenTable(
        name,
        "llama",
        "default",
        tokens=[text for text, _, _ in pieces],
        scores=[score for _, score, _ in pieces],
        kinds=[kind for _, _, kind in pieces],
        ids=ids,
        adds_space=bool(message.normalizer.get(3, 1)),
    )
    check_bytes(table)
    return table


def is_tiktoken(path: Path) -> bool:
    """Whether the file at `path` is of Llama 3's kind. Raises as `read_sentence_pieces` does."""
    with opened(path, limit_bytes=_LINE_BYTES) as cursor:
        start = cursor.take(min(_LINE_BYTES, cursor.size_bytes), "the file")
    return _TIKTOKEN.match(start) is not None


def check_bytes(table: TokenTable) -> None:
    """Raises ModelError unless `table` has one unknown token and a token for each byte."""
    expected = {f"<0x{byte:02X}>" for byte in range(256)}
    found = {t for t, k in zip(table.tokens, table.kinds, strict=True) if k == Kind.BYTE}
    if not found:
        raise table.error("a vocabulary without byte fallback is not supported")
    if found != expected:
        odd = shown(repr(min(found ^ expected)))
        raise table.error(f"the byte tokens are not <0x00> to <0xFF>: {odd} is missing or too much")
    if (n := list(table.kinds).count(Kind.UNKNOWN)) != 1:
        raise table.error(f"{n} tokens of the type unknown, expected 1")


def _parsed(data: bytes) -> _Message:
    message = _Message()
    parts = {_TRAINER: message.trainer, _NORMALIZER: message.normalizer}
    parts[_DENORMALIZER] = message.denormalizer
    try:
        for number, value in _fields(data):
            if number == _PIECES:
                message.pieces.append(_bytes(value))
            elif number in parts:
                parts[number].update(_fields(_bytes(value)))
    except ValueError as error:
        raise ValueError(f"is no SentencePiece model, or damaged ({error})") from error
    if not 0 < len(message.pieces) <= TOKENS_LIMIT:
        n = f"{len(message.pieces):,} tokens, expected 1 to {TOKENS_LIMIT:,}"
        raise ValueError(f"is no SentencePiece model, or damaged ({n})")
    return message


def _piece(i: int, data: bytes) -> tuple[str, float, Kind]:
    """A SentencePiece: piece = 1, score = 2 (a 32-bit float), type = 3."""
    fields = dict(_fields(data))
    try:
        text = _bytes(fields.get(1, b"")).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"token {i} is not UTF-8 ({error.reason})") from error
    score = fields.get(2, b"\0\0\0\0")
    if not isinstance(score, bytes) or len(score) != 4:
        raise ValueError(f"the score of token {i} is not a 32-bit float")
    number: float = struct.unpack("<f", score)[0]
    if not math.isfinite(number):
        raise ValueError(f"the score of token {i} is not finite")
    kind = fields.get(3, int(Kind.NORMAL))
    if kind not in set(Kind):
        raise ValueError(
            f"token {i} ({shown(repr(text))}) is of the type {kind!r}, expected 1 to 6"
        )
    return user_defined_text(text) if kind == Kind.USER_DEFINED else text, number, Kind(kind)


def _check_supported(message: _Message) -> None:
    algorithm = message.trainer.get(3, 1)
    if algorithm != _BPE:
        names = [name for number, name in _ALGORITHMS.items() if number == algorithm]
        kind = names[0] if names else shown(repr(algorithm))
        raise ValueError(f"a SentencePiece model of the type {kind} is not supported (bpe)")
    rule = message.normalizer.get(1, b"")
    name = shown(_bytes(rule).decode("utf-8", "replace"))
    if message.normalizer.get(2) or message.denormalizer.get(2):
        raise ValueError(
            f"the normalization {name or 'without a name'} is not supported (identity)"
        )
    for flag, is_set, expected in (
        ("remove_extra_whitespaces", message.normalizer.get(4, 1), 0),
        ("escape_whitespaces", message.normalizer.get(5, 1), 1),
        ("treat_whitespace_as_suffix", message.trainer.get(24, 0), 0),
    ):
        if is_set != expected:
            found, wanted = ("true", "false") if is_set else ("false", "true")
            raise ValueError(f"{flag} is {found}, which is not supported ({wanted})")


def _special_ids(message: _Message, n_tokens: int) -> dict[str, int]:
    ids = {}
    for name, (number, default) in _SPECIAL.items():
        value = message.trainer.get(number, default)
        if not isinstance(value, int):
            raise ValueError(f"is damaged (trainer_spec, field {number})")
        value = value - (1 << 64) if value >> 63 else value
        if value >= n_tokens:
            raise ValueError(f"its {name} token is {value:,}, expected 0 to {n_tokens - 1:,}")
        if value >= 0:
            ids[name] = value
    return ids


def _fields(data: bytes) -> Iterator[tuple[int, Field]]:
    """Field numbers and values of a message. Raises ValueError: not a message, or cut short."""
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        number, wire_type = key >> 3, key & 7
        if number == 0 or wire_type not in (_VARINT, _FIXED_64, _BYTES, _FIXED_32):
            raise ValueError(f"no field at offset {start:,}")
        if wire_type == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {_FIXED_64: 8, _FIXED_32: 4}.get(wire_type)
        if size is None:
            size, at = _varint(data, at)
        if size > len(data) - at:
            raise ValueError(f"field {number} at offset {start:,} ends behind the end")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of at most 64 bits, and where it ends."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value & (1 << 64) - 1, at + i + 1
    raise ValueError(f"a number at offset {at:,} does not end")


def _bytes(value: Field) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text is expected")
    return value
