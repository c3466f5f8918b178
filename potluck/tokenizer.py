"""Text <-> tokens of one model, rebuilt from its GGUF.

The promise that the whole program leans on: no text of a person ever becomes a special token, only
a template's text does (`encode_template`); and a stream of tokens becomes text in whole characters.
How plain text is cut is in byte_level.py and sentence_pieces.py. Immutable: any thread may call it;
encoding a long text takes a moment (a megabyte about 0.5 s), so an event loop calls it in a thread.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from potluck.byte_level import ByteLevelCodec, starts_by_default
from potluck.cursor import shown
from potluck.errors import UsageError
from potluck.gguf import GgufFile
from potluck.sentence_pieces import SentencePieceCodec
from potluck.vocabulary import Kind, Vocabulary, read_vocabulary


class Codec(Protocol):
    """A way of cutting plain text into tokens."""

    @property
    def adds_space(self) -> bool:
        """Whether `encode` puts a space before the text, which decoding takes away again."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, none of them special."""

    def piece(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""


class Tokenizer:
    """The vocabulary of one model at work."""

    def __init__(self, vocabulary: Vocabulary, codec: Codec, chat_template: str | None) -> None:
        """`chat_template` is the model's own, in Jinja, unchecked; None if it has none."""
        self.n_tokens = len(vocabulary.tokens)
        self.start_id = vocabulary.start_id
        self.end_id = vocabulary.end_id  # the one that templates spell
        self.end_ids = vocabulary.end_ids  # all that end an answer
        self.adds_start = vocabulary.adds_start
        self.chat_template = chat_template
        self._vocabulary = vocabulary
        self._codec = codec
        self._special = {vocabulary.tokens[i]: i for i in vocabulary.special_ids}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, text: str, *, add_start: bool) -> list[int]:
        """The ids of `text`, which is plain: what spells a special token is cut like other text.

        `add_start`: put the start token first, if the model wants one. Raises UsageError if `text`
        holds half a surrogate pair, which no UTF-8 has.
        """
        ids = self._codec.encode(_checked(text))
        if add_start and self.adds_start and self.start_id is not None:
            return [self.start_id, *ids]
        return ids

    def encode_template(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
        """The ids of a conversation: (text, is_template) in order.

        Special tokens that a template's text spells count, those of the other texts are plain. What
        lies between two special tokens is cut as one text, so the borders of the parts leave no
        trace. The start token stands first if the model wants one, once. Raises UsageError as
        `encode` does.
        """
        ids: list[int] = []
        plain: list[str] = []
        for text, is_template in parts:
            at = 0
            for match in self._special_pattern.finditer(text) if is_template else ():
                plain.append(text[at : match.start()])
                ids += self._codec.encode(_checked("".join(plain)))
                ids.append(self._special[match[0]])
                plain.clear()
                at = match.end()
            plain.append(text[at:])
        ids += self._codec.encode(_checked("".join(plain)))
        if self.adds_start and self.start_id is not None and ids[:1] != [self.start_id]:
            ids.insert(0, self.start_id)
        return ids

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """The text of `ids`. Special tokens have none; bytes that are not UTF-8 become U+FFFD.

        `continues`: the text goes on behind another, so its first space is one (see `decoder`).
        """
        decoder = self.decoder(continues=continues)
        return "".join([*(decoder.push(token_id) for token_id in ids), decoder.finish()])

    def decoder(self, *, continues: bool = False) -> StreamDecoder:
        """For one text that comes token by token.

        LLaMA's vocabulary puts a space before the first word of a text, which is taken away again,
        unless the text `continues` another (an answer to a bare prompt).
        """
        return StreamDecoder(self, drops_space=self._codec.adds_space and not continues)

    def piece(self, token_id: int) -> bytes:
        """The bytes of a token; none for a special one.

        Raises UsageError if there is no such token.
        """
        if not 0 <= token_id < self.n_tokens:
            raise UsageError(f"token {token_id}: 0 to {self.n_tokens - 1:,}")
        if self._vocabulary.kinds[token_id] == Kind.CONTROL or token_id in self.end_ids:
            return b""
        return self._codec.piece(token_id)

    def name(self, token_id: int) -> str:
        """A token as its vocabulary writes it, special ones too. Raises UsageError like `piece`."""
        if not 0 <= token_id < self.n_tokens:
            raise UsageError(f"token {token_id}: 0 to {self.n_tokens - 1:,}")
        return self._vocabulary.tokens[token_id]


class StreamDecoder:
    """One text that comes token by token: a character is given out when all its bytes have come.

    The texts of any stream, joined, are what `Tokenizer.decode` gives for all its tokens. One task.
    """

    def __init__(self, tokenizer: Tokenizer, *, drops_space: bool) -> None:
        """`drops_space`: a space before everything else is not part of the text."""
        self._tokenizer = tokenizer
        self._drops_space = drops_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is complete with this token; may be empty."""
        data = self._tokenizer.piece(token_id)
        if self._drops_space and data:
            data = data.removeprefix(b" ")
            self._drops_space = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left when no more tokens come: U+FFFD if a character was cut, else nothing."""
        return self._utf8.decode(b"", final=True)


def load(file: GgufFile) -> Tokenizer:
    """The tokenizer of `file`; SmolLM2's 49,152 tokens take 0.2 s.

    Works on files that hold a vocabulary only, whatever their architecture. Raises ModelError for a
    vocabulary that contradicts itself or is of another kind, UsageError if the library for it is
    missing.
    """
    kind = file.text("tokenizer.ggml.model")
    codec: Codec
    if kind == "gpt2":
        pre = file.text("tokenizer.ggml.pre", "default")
        vocabulary = read_vocabulary(file, adds_start=starts_by_default(pre))
        codec = ByteLevelCodec(file, vocabulary)
    elif kind == "llama":
        vocabulary = read_vocabulary(file, adds_start=True)
        codec = SentencePieceCodec(file, vocabulary)
    else:
        raise file.error(f"tokenizer.ggml.model {shown(repr(kind))} is not supported (gpt2, llama)")
    key = "tokenizer.chat_template"
    return Tokenizer(vocabulary, codec, file.text(key) if key in file.metadata else None)


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the text is not Unicode: half a pair at letter {error.start}") from error
    return text
