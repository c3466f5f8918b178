"""The vocabulary of a model's folder as the pairs of metadata that a GGUF has for it.

Finds the files and puts together what they say; sentence_piece_file.py and tokenizer_json.py read
the two kinds, special_tokens.py the files beside them. Keys and conventions are llama.cpp's, so
that its programs cut text as ours do. Reads files and writes none.
"""

from __future__ import annotations

from pathlib import Path

from potluck.convert.sentence_piece_file import is_tiktoken, read_sentence_pieces
from potluck.convert.special_tokens import (
    added_tokens,
    read_beside,
    special_pairs,
    template_pairs,
)
from potluck.convert.token_table import padded, with_added
from potluck.convert.tokenizer_json import read_tokenizer_json
from potluck.cursor import shown
from potluck.errors import ModelError
from potluck.tensor_source import Metadata


def vocabulary_pairs(folder: Path, n_rows: int) -> list[tuple[str, Metadata]]:
    """The pairs tokenizer.* of the model in `folder`, whose embedding has `n_rows` rows.

    Fewer tokens than rows are filled up with unused ones if the difference looks like padding
    (token_table.padded has the rule); LLaMA's files match exactly. Raises ModelError: no
    vocabulary, a damaged one, one that is not supported, or another number of tokens than rows.
    """
    path = _find(folder)
    beside = read_beside(path.parent)
    is_json = path.suffix == ".json"
    table = read_tokenizer_json(path) if is_json else read_sentence_pieces(path)
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


def _find(folder: Path) -> Path:
    """The file with the vocabulary: SentencePiece's own before what was made of it.

    Meta keeps it one folder above. Llama 3's tokenizer.model is of another kind: tokenizer.json
    counts where there is one.
    """
    names = ("tokenizer.model", "tokenizer.json")
    places = (folder, folder.resolve().parent)
    found = [path for place in places for name in names if (path := place / name).exists()]
    if not found:
        raise ModelError(
            f"{shown(str(folder))}: no vocabulary, neither tokenizer.model nor tokenizer.json",
            remedy="LLaMA's tokenizer.model may also stand one folder above",
        )
    usable = [path for path in found if path.suffix == ".json" or not is_tiktoken(path)]
    return (usable or found)[0]
