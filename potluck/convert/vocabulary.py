"""The vocabulary of a model's folder as the pairs of metadata that a GGUF has for it.

Finds the files and puts together what they say; sentence_piece_file.py and tokenizer_json.py read
the two kinds, special_tokens.py the files beside them. Keys and conventions are llama.cpp's, so
that its programs cut text as ours do. Reads files and writes none.
"""

from __future__ import annotations

from pathlib import Path

from potluck.convert.sentence_piece_file import read_sentence_pieces
from potluck.convert.special_tokens import (
    added_tokens,
    read_beside,
    special_pairs,
    template_pairs,
)
from potluck.convert.token_table import TokenTable, padded, with_added
from potluck.cursor import shown
from potluck.errors import ModelError
from potluck.tensor_source import Metadata


def vocabulary_pairs(folder: Path, n_rows: int) -> list[tuple[str, Metadata]]:
    """The pairs tokenizer.* of the model in `folder`, whose embedding has `n_rows` rows.

    Fewer tokens than rows are filled up with unused ones if the difference looks like padding
    (token_table.padded has the rule); LLaMA's files match exactly. Raises ModelError: no
    vocabulary, a damaged one, one that is not supported, or another number of tokens than rows.
    """
    beside = read_beside(folder)
    table = _read_table(folder)
    for where, added in added_tokens(beside):
        table = with_added(table, added, where)
    table = padded(table, n_rows)
    pairs: list[tuple[str, Metadata]] = [
        ("tokenizer.ggml.model", table.model),
        ("tokenizer.ggml.pre", table.pre),
        ("tokenizer.ggml.tokens", list(table.tokens)),
        ("tokenizer.ggml.token_type", [int(kind) for kind in table.kinds]),
    ]
    if table.scores:
        pairs.insert(3, ("tokenizer.ggml.scores", list(table.scores)))
    if table.merges:
        pairs.append(("tokenizer.ggml.merges", list(table.merges)))
    return [*pairs, *special_pairs(table, beside), *template_pairs(beside)]


def _read_table(folder: Path) -> TokenTable:
    """SentencePiece's own file before what was made of it; Meta keeps it one folder above."""
    for path in (folder / "tokenizer.model", folder.resolve().parent / "tokenizer.model"):
        if path.exists():
            return read_sentence_pieces(path)
    raise ModelError(
        f"{shown(str(folder))}: no vocabulary, neither tokenizer.model nor tokenizer.json",
        remedy="LLaMA's tokenizer.model may also stand one folder above",
    )
