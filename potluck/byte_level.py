"""Cuts text into tokens of a byte-level BPE vocabulary ("gpt2" in a GGUF), through `tokenizers`.

The merges come from the file. The way text is cut into words before merging is not in the file,
only its name is (tokenizer.ggml.pre): the patterns below are those of the models' own tokenizers. A
vocabulary may lack single bytes (SmolLM2's lacks 21 that no ordinary text has): such bytes are left
out of what is encoded, as the model's own tokenizer does. No normalization: text comes back as it
went in (Qwen2's own tokenizer composes letters first, which a GGUF can't say; llama.cpp does not
either). Of 20,000 random texts in each way, and 212,000 letters, llama.cpp cut differently only
letters younger than its Unicode tables, and words that hold a byte that the vocabulary lacks: there
the models' own tokenizers are followed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from potluck.cursor import shown
from potluck.errors import UsageError
from potluck.gguf import GgufFile
from potluck.vocabulary import Kind, Vocabulary

if TYPE_CHECKING:
    import tokenizers

_DIGIT = r"\p{N}"
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"

# Name -> patterns, each of which cuts what the ones before it have left in one piece.
_PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (_PUNCTUATION, _GPT_2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT_2,),
    "smollm": (_DIGIT, _GPT_2),
    "llama-bpe": (LLAMA_3,),
    "qwen2": (QWEN_2,),
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
# A whole word that is a token stays one, whatever the merges say: so their own tokenizers.
_WORDS_FIRST = {"llama-bpe"}


def starts_by_default(pre: str) -> bool:
    """Whether the start token comes first where the file does not say."""
    return _ALIASES.get(pre, pre) == "llama-bpe"


class ByteLevelCodec:
    """Text -> ids and id -> bytes of plain text: special tokens are the tokenizer's business."""

    adds_space = False

    def __init__(self, file: GgufFile, vocabulary: Vocabulary) -> None:
        """Raises ModelError (unknown name, bad merges), UsageError if `tokenizers` is missing."""
        self._vocabulary = vocabulary
        self._tokenizer = _build(file, vocabulary)
        # Tokens that a person's text may hold and that are not made by merging (runs of spaces,
        # ...).
        self._added = {
            vocabulary.tokens[i]: i
            for i, kind in enumerate(vocabulary.kinds)
            if kind == Kind.USER_DEFINED and i not in vocabulary.special_ids
        }
        longest_first = sorted(self._added, key=len, reverse=True)
        self._added_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, none of them special."""
        ids: list[int] = []
        for words, added in self._cut(text):
            # The library keeps the GIL in `encode` and gives it away for a batch: a text of 4 MB
            # takes 1.7 s, and whoever serves others meanwhile must not stand still.
            batch = self._tokenizer.encode_batch_fast([words], add_special_tokens=False)
            ids += batch[0].ids
            ids += added
        return ids

    def piece(self, token_id: int) -> bytes:
        """The bytes of a token."""
        token = self._vocabulary.tokens[token_id]
        if self._vocabulary.kinds[token_id] == Kind.USER_DEFINED:
            return token.encode()
        try:
            return bytes(_BYTE_OF[letter] for letter in token)
        except KeyError:  # a token that was not written in the byte alphabet stands for itself
            return token.encode()

    def _cut(self, text: str) -> Iterator[tuple[str, list[int]]]:
        """Words, and the added token behind them."""
        at = 0
        for match in self._added_pattern.finditer(text):
            yield text[at : match.start()], [self._added[match[0]]]
            at = match.end()
        yield text[at:], []


def _build(file: GgufFile, vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    pre = file.text("tokenizer.ggml.pre", "default")
    name = _ALIASES.get(pre, pre)
    if name not in _PATTERNS:
        known = ", ".join(_PATTERNS)
        raise file.error(f"tokenizer.ggml.pre {shown(repr(pre))} is not supported ({known})")
    # A special token is not in what merges may make: so no text whatever becomes one.
    usable = {t: i for i, t in enumerate(vocabulary.tokens) if i not in vocabulary.special_ids}
    merges = [_merge(file, merge, usable) for merge in file.array("tokenizer.ggml.merges", str)]
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(
            "this model's vocabulary needs the package tokenizers, which is not installed",
            remedy="pip install 'potluck[server]'",
        ) from error
    cuts = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in _PATTERNS[name]
    ]
    try:
        model = tokenizers.models.BPE(usable, merges, ignore_merges=name in _WORDS_FIRST)
    except Exception as error:
        raise file.error(f"the merges do not fit the tokens: {shown(str(error))}") from error
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [*cuts, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return built


def _merge(file: GgufFile, merge: str, usable: Mapping[str, int]) -> tuple[str, str]:
    """The two tokens, checked: tokenizers 0.23.3 panics if what they make is no token."""
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise file.error(f"the merge {shown(repr(merge))} does not name two tokens")
    if missing := next((t for t in (left, right, left + right) if t not in usable), None):
        raise file.error(
            f"the merge {shown(repr(merge))} needs {shown(repr(missing))}, which is no plain token"
        )
    return left, right


def _byte_alphabet() -> dict[str, int]:
    """Letter -> byte: printable Latin-1 stands for itself, the 68 others for U+0100 and on.

    Source: `bytes_to_unicode` of GPT-2's encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()
