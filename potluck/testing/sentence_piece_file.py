"""Writes a small `tokenizer.model`: SentencePiece's protobuf, field by field.

Its pieces are those of potluck/testing/vocabulary.py, so a converted model has that vocabulary. The
`sentencepiece` library loads it. Field numbers: sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from potluck.testing.vocabulary import vocabulary

_BPE = 2  # TrainerSpec.ModelType


def write_sentence_pieces(path: Path, n_tokens: int, *, keep: int | None = None) -> Path:
    """LLaMA's kind of vocabulary of n_tokens tokens, of which the first `keep` are written."""
    pairs = dict(vocabulary("spm", n_tokens))
    tokens = cast("Sequence[str]", pairs["tokenizer.ggml.tokens"])[:keep]
    kinds = cast("Sequence[int]", pairs["tokenizer.ggml.token_type"])
    scores = cast("Sequence[float]", pairs["tokenizer.ggml.scores"])
    data = b"".join(
        _message(1, _piece(token, score, kind))
        for token, score, kind in zip(tokens, scores, kinds, strict=False)
    )
    data += _message(2, _trainer(len(tokens)))
    data += _message(3, _normalizer())
    path.write_bytes(data)
    return path


def _piece(token: str, score: float, kind: int) -> bytes:
    """SentencePiece: text, score and kind, whose numbers are also GGUF's."""
    return _message(1, token.encode()) + _float(2, score) + _whole(3, kind)


def _trainer(n_tokens: int) -> bytes:
    """TrainerSpec: kind of model, size, byte fallback, ids of unknown, start, end, padding."""
    return (
        _whole(3, _BPE)
        + _whole(4, n_tokens)
        + _whole(35, 1)
        + _whole(40, 0)
        + _whole(41, 1)
        + _whole(42, 2)
        + _whole(43, 2**64 - 1)  # -1: none
    )


def _normalizer() -> bytes:
    """NormalizerSpec as LLaMA's: nothing is normalized, a space is put in front."""
    return _message(1, b"identity") + _whole(3, 1) + _whole(4, 0) + _whole(5, 1)


def _message(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _whole(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    data.append(value)
    return bytes(data)
