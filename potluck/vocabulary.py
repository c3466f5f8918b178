"""What a model's tokens are: their texts and kinds, and which of them start and end an answer.

Read from a GGUF's metadata and checked against each other and the model. Which token is special is
decided here, once; how text is cut into tokens is in byte_level.py and sentence_pieces.py. Pure.
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from potluck.cursor import shown
from potluck.gguf import GgufFile

TOKENS_LIMIT = 1 << 20  # the largest known vocabulary has 262,144
# Tokens that end a turn even where the file names only one of them; llama.cpp has these too.
END_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>"),
        *("<|end_of_text|>", "<end_of_turn>", "<EOT>"),
    )
)
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# A token that is added to a vocabulary by hand and looks like this means something to the model. A
# run of spaces or a word that was added does not: it may come out of anyone's text.
_CONTROL_LIKE = re.compile(r"<\|?[^\s<>|]+\|?>|\[/?[A-Z_]+\]|</?s>")


class Kind(enum.IntEnum):
    """What a token is for, numbered as in tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of one model.

    Texts are as the file has them: each way of cutting marks spaces its own.
    """

    tokens: Sequence[str] = field(repr=False)
    kinds: Sequence[int] = field(repr=False)  # Kind, one a token
    special_ids: frozenset[int] = field(repr=False)  # never come out of a person's text
    start_id: int | None
    end_id: int | None  # the one that templates spell; `end_ids` holds it and all others
    end_ids: frozenset[int]
    adds_start: bool


def read_vocabulary(file: GgufFile, *, adds_start: bool) -> Vocabulary:
    """The vocabulary of `file`; `adds_start` holds if the file does not say.

    Raises ModelError: a key missing or of another type, a token twice, an id or a kind out of
    range, or another number of tokens than the model has.
    """
    tokens = file.array("tokenizer.ggml.tokens", str)
    kinds = list(file.array("tokenizer.ggml.token_type", int))
    _check(file, tokens, kinds)
    start_id = _optional_id(file, "bos_token_id", len(tokens))
    found = [_optional_id(file, key, len(tokens)) for key in _END_KEYS]
    named = [i for i in found if i is not None]
    special = {i for i, kind in enumerate(kinds) if _is_special(tokens[i], kind)}
    ends = set(named) | {i for i in special if tokens[i] in END_TEXTS}
    adds_start = file.flag("tokenizer.ggml.add_bos_token", default=adds_start)
    if adds_start and start_id is None:
        raise file.error("tokenizer.ggml.add_bos_token is true and bos_token_id is missing")
    special |= ends if start_id is None else ends | {start_id}
    return Vocabulary(
        tokens,
        kinds,
        special_ids=frozenset(special),
        start_id=start_id,
        end_id=named[0] if named else None,
        end_ids=frozenset(ends),
        adds_start=adds_start,
    )


def _is_special(token: str, kind: int) -> bool:
    if kind == Kind.USER_DEFINED:
        return _CONTROL_LIKE.fullmatch(token) is not None
    return kind in (Kind.CONTROL, Kind.UNKNOWN)


def _check(file: GgufFile, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    n = len(tokens)
    if not 0 < n <= TOKENS_LIMIT:
        raise file.error(f"the tokenizer has {n:,} tokens, expected 1 to {TOKENS_LIMIT:,}")
    if len(kinds) != n:
        raise file.error(f"tokenizer.ggml.token_type has {len(kinds):,} elements for {n:,} tokens")
    if not set(kinds) <= set(Kind):
        i = next(i for i, kind in enumerate(kinds) if kind not in set(Kind))
        raise file.error(
            f"token {i} ({shown(repr(tokens[i]))}) is of the type {kinds[i]}, expected 1 to 6"
        )
    if len(set(tokens)) != n:
        token, times = Counter(tokens).most_common(1)[0]
        raise file.error(f"the tokenizer has the token {shown(repr(token))} {times} times")
    expected = _rows_of_the_model(file)
    if expected not in (None, n):
        raise file.error(f"the tokenizer has {n:,} tokens, the model {expected:,}")


def _rows_of_the_model(file: GgufFile) -> int | None:
    """How many tokens the weights know; else what the metadata claims, which may be nothing."""
    if embedding := file.tensors.get("token_embd.weight"):
        return embedding.rows
    key = f"{file.text('general.architecture', '')}.vocab_size"
    return file.integer(key) if key in file.metadata else None


def _optional_id(file: GgufFile, key: str, n_tokens: int) -> int | None:
    """A token id of the metadata, None if it names none.

    Raises ModelError if there is no such token.
    """
    key = f"tokenizer.ggml.{key}"
    if key not in file.metadata:
        return None
    found = file.integer(key)
    if not 0 <= found < n_tokens:
        raise file.error(f"{key} is {found}, expected 0 to {n_tokens - 1:,}")
    return found
