"""Cuts text into the tokens of LLaMA's vocabulary ("llama" in a GGUF), through `sentencepiece`.

A GGUF holds the tokens with their scores and kinds, not the file that sentencepiece reads; so its
model message is written again here (sentencepiece_model.proto, field numbers beside each line).
U+2581 is how a vocabulary writes a space: text that holds that letter itself comes back with a
space in its place.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from potluck.cursor import shown
from potluck.errors import UsageError
from potluck.gguf import GgufFile
from potluck.vocabulary import Kind, Vocabulary

if TYPE_CHECKING:
    import sentencepiece

_SPACE = "\u2581"
_UNKNOWN = " \u2047 ".encode()  # what sentencepiece shows for a token that stands for anything
_BPE = 2  # TrainerSpec.ModelType; LLaMA's vocabularies are all of this type


class SentencePieceCodec:
    """Text -> ids and id -> bytes of plain text: special tokens are the tokenizer's business."""

    def __init__(self, file: GgufFile, vocabulary: Vocabulary) -> None:
        """Raises ModelError (no fitting tokens), UsageError if `sentencepiece` is not installed."""
        self._vocabulary = vocabulary
        # Words start with a space in the vocabulary, so a text's first word gets one too.
        self.adds_space = file.flag("tokenizer.ggml.add_space_prefix", default=True)
        self._processor = _build(file, vocabulary)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, none of them special."""
        if not text:
            return []
        ids: list[int] = self._processor.EncodeAsIds(f" {text}" if self.adds_space else text)
        return ids

    def piece(self, token_id: int) -> bytes:
        """The bytes of a token; a leading space is still there."""
        token, kind = self._vocabulary.tokens[token_id], self._vocabulary.kinds[token_id]
        if kind == Kind.BYTE:
            return bytes((int(token[3:5], 16),))
        if kind == Kind.UNKNOWN:
            return _UNKNOWN
        return token.replace(_SPACE, " ").encode()


def _build(file: GgufFile, vocabulary: Vocabulary) -> sentencepiece.SentencePieceProcessor:
    scores = file.array("tokenizer.ggml.scores", float)
    _check(file, vocabulary, len(scores))
    unknown_id = _unknown_id(file, vocabulary)
    try:
        import sentencepiece
    except ImportError as error:
        raise UsageError(
            "this model's vocabulary needs the package sentencepiece, which is not installed",
            remedy="pip install 'potluck[server]'",
        ) from error
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(_model_message(vocabulary, scores, unknown_id))
    except (RuntimeError, TypeError) as error:
        raise file.error(
            f"the tokens are no SentencePiece vocabulary: {shown(str(error))}"
        ) from error
    return processor


def _check(file: GgufFile, vocabulary: Vocabulary, n_scores: int) -> None:
    if n_scores != len(vocabulary.tokens):
        raise file.error(
            f"tokenizer.ggml.scores has {n_scores:,} elements for {len(vocabulary.tokens):,} tokens"
        )
    expected = {f"<0x{byte:02X}>" for byte in range(256)}
    found = [t for t, k in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if k == Kind.BYTE]
    if wrong := next((t for t in found if t not in expected), None):
        raise file.error(f"the byte token {shown(repr(wrong))} is not one of <0x00> to <0xFF>")
    if found and len(found) != 256:
        raise file.error(f"{len(found)} byte tokens, expected 256 or none")


def _unknown_id(file: GgufFile, vocabulary: Vocabulary) -> int:
    """The token that stands for anything, which sentencepiece must have.

    llama.cpp's converter makes a control token of it where a folder's JSON calls it special, as
    most do. Raises ModelError unless there is one.
    """
    found = [i for i, kind in enumerate(vocabulary.kinds) if kind == Kind.UNKNOWN]
    named = file.integer("tokenizer.ggml.unknown_token_id", 0)
    if not found and 0 <= named < len(vocabulary.kinds):
        found = [named] if vocabulary.kinds[named] == Kind.CONTROL else []
    if len(found) != 1:
        raise file.error(f"{len(found)} tokens of the type unknown, expected 1")
    return found[0]


def _model_message(vocabulary: Vocabulary, scores: Sequence[float], unknown_id: int) -> bytes:
    """A ModelProto: pieces = 1, trainer_spec = 2, normalizer_spec = 3."""
    kinds = [_kind(vocabulary, i) for i in range(len(vocabulary.tokens))]
    kinds[unknown_id] = Kind.UNKNOWN
    parts = [
        _field(1, _piece_message(token, score, kind))
        for token, score, kind in zip(vocabulary.tokens, scores, kinds, strict=True)
    ]
    trainer = (
        _number(3, _BPE)  # model_type
        + _number(4, len(vocabulary.tokens))  # vocab_size
        + _number(35, int(Kind.BYTE in vocabulary.kinds))  # byte_fallback
        + _number(40, unknown_id)  # unk_id
        + _field(45, vocabulary.tokens[unknown_id].encode())  # unk_piece
    )
    # No rule: text is taken as it is. The prefix is ours: see SentencePieceCodec.encode.
    normalizer = (
        _field(1, b"identity")  # name
        + _number(3, 0)  # add_dummy_prefix
        + _number(4, 0)  # remove_extra_whitespaces
        + _number(5, 1)  # escape_whitespaces
    )
    return b"".join(parts) + _field(2, trainer) + _field(3, normalizer)


def _kind(vocabulary: Vocabulary, token_id: int) -> int:
    """The kind as sentencepiece shall see it: what is special is found in no text."""
    return Kind.CONTROL if token_id in vocabulary.special_ids else vocabulary.kinds[token_id]


def _piece_message(token: str, score: float, kind: int) -> bytes:
    """A SentencePiece: piece = 1, score = 2 (a 32-bit float), type = 3."""
    # Only what people added is spelled with spaces as such (llama.cpp looks for it in plain text).
    token = token.replace(" ", _SPACE)
    return _field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
