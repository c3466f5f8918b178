"""The tokens of a vocabulary while it is gathered from a folder's files: by id, checked. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from potluck.cursor import shown
from potluck.errors import ModelError
from potluck.vocabulary import TOKENS_LIMIT, Kind

TOKEN_BYTES_LIMIT = 4096  # tokens are words; even runs of spaces stay far below
# As llama.cpp's converter scores them; neither is ever made by merging.
ADDED_SCORE, PADDING_SCORE = -1000.0, -10000.0
# How many rows may be behind the last token, if their number is a multiple of 8: training pads
# vocabularies to multiples of 64 to 512 (Qwen2: 151,646 tokens, 151,936 or 152,064 rows).
_PADDING_LIMIT, _PADDING_MULTIPLE = 1024, 8


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Tokens by id, as the vocabulary's own file gives them. Raises ModelError.

    The texts are in the way of writing of `model`: spaces are U+2581 ("llama") or bytes are letters
    ("gpt2"). `file` names where they come from.
    """

    file: str
    model: str  # tokenizer.ggml.model
    pre: str  # tokenizer.ggml.pre
    tokens: Sequence[str] = field(repr=False)
    kinds: Sequence[Kind] = field(repr=False)  # one a token
    scores: Sequence[float] = field(repr=False, default=())  # one a token; "gpt2" has none
    merges: Sequence[str] = field(repr=False, default=())  # "llama" has none
    ids: Mapping[str, int] = field(default_factory=dict)  # bos, eos, unknown, padding
    adds_start: bool = True
    adds_end: bool = False
    adds_space: bool = True

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if not 0 < n <= TOKENS_LIMIT:
            raise self.error(f"{n:,} tokens, expected 1 to {TOKENS_LIMIT:,}")
        if len(set(self.tokens)) != n:
            seen: dict[str, int] = {}
            for i, token in enumerate(self.tokens):
                if (first := seen.setdefault(token, i)) != i:
                    raise self.error(f"the token {shown(repr(token))} has the ids {first} and {i}")
        for i, token in enumerate(self.tokens):
            if not 0 < len(token.encode()) <= TOKEN_BYTES_LIMIT:
                size = f"{len(token.encode()):,} bytes, expected 1 to {TOKEN_BYTES_LIMIT:,}"
                raise self.error(f"token {i} has {size}")

    def error(self, message: str, *, remedy: str = "") -> ModelError:
        """A ModelError about the file of the vocabulary."""
        return ModelError(f"{self.file}: {message}", remedy=remedy)


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that a folder's JSON adds to the vocabulary, or speaks about. Text is as spelled."""

    token_id: int
    text: str
    is_special: bool


def with_added(table: TokenTable, added: Sequence[AddedToken], where: str) -> TokenTable:
    """`table` with the tokens that the file `where` adds to it, or says more of.

    What is special becomes a control token (the unknown one stays what it is), other tokens that
    are new are user defined. Raises ModelError: an id with a hole before it, or another text under
    an id that is there.
    """
    tokens, kinds, scores = list(table.tokens), list(table.kinds), list(table.scores)
    ids = {text: i for i, text in enumerate(tokens)}
    for token in sorted(added, key=lambda token: token.token_id):
        i, kind = token.token_id, Kind.CONTROL if token.is_special else Kind.USER_DEFINED
        text = user_defined_text(token.text) if kind == Kind.USER_DEFINED else token.text
        if i == len(tokens) < TOKENS_LIMIT and token.text not in ids:
            tokens.append(text)
            kinds.append(kind)
            scores += [ADDED_SCORE] if table.model == "llama" else []
        elif not 0 <= i < len(tokens) or tokens[i] not in (token.text, text):
            raise _misfit(token, tokens, ids, where)
        elif kinds[i] == Kind.NORMAL or (kinds[i] == Kind.USER_DEFINED and token.is_special):
            tokens[i], kinds[i] = text, kind
    return replace(table, tokens=tokens, kinds=kinds, scores=scores)


def user_defined_text(text: str) -> str:
    """What a GGUF has for a user defined token, which is looked for in text as people write it."""
    return text.replace("\u2581", " ")


def looks_special(text: str) -> bool:
    """Whether an added token is a control token by its looks, whatever its file says of it.

    Some models mark only a few of theirs as special (Qwen2: <|fim_prefix|> is not).
    """
    return text.startswith("<|") and text.endswith("|>")


def padded(table: TokenTable, n_rows: int) -> TokenTable:
    """`table` with as many tokens as the model's embedding has rows.

    Rows behind the last token get unused tokens, called [PADn] by their id as llama.cpp does, but
    only if they look like padding: their number is under 1,024, that of all rows a multiple of 8.
    Raises ModelError for every other difference.
    """
    n = len(table.tokens)
    if n == n_rows:
        return table
    missing = n_rows - n
    if not (0 < missing < _PADDING_LIMIT and n_rows % _PADDING_MULTIPLE == 0):
        raise table.error(
            f"the tokenizer has {n:,} tokens, the model {n_rows:,}", remedy=_remedy(table, n_rows)
        )
    return replace(
        table,
        tokens=[*table.tokens, *(f"[PAD{i}]" for i in range(n, n_rows))],
        kinds=[*table.kinds, *[Kind.UNUSED] * missing],
        scores=[*table.scores, *[PADDING_SCORE] * missing] if table.scores else (),
    )


def _remedy(table: TokenTable, n_rows: int) -> str:
    if n_rows > len(table.tokens):
        return "is added_tokens.json or tokenizer_config.json missing in the folder?"
    extra = ", ".join(map(repr, table.tokens[n_rows : n_rows + 3]))
    return f"the model has no row for {shown(extra)}: another model's, or added in a JSON file?"


def _misfit(
    token: AddedToken, tokens: Sequence[str], ids: Mapping[str, int], where: str
) -> ModelError:
    i, name = token.token_id, shown(repr(token.text))
    if token.text in ids:
        return ModelError(f"{where}: {name} is token {i:,}, in the vocabulary {ids[token.text]:,}")
    if not 0 <= i < len(tokens):
        return ModelError(f"{where}: {name} is added as token {i:,}, expected {len(tokens):,}")
    return ModelError(f"{where}: token {i:,} is {name}, in the vocabulary {shown(repr(tokens[i]))}")
