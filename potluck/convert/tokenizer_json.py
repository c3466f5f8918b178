"""Reads `tokenizer.json`, Hugging Face's file: byte-level BPE, or what SentencePiece's becomes.

The second kind is what LLaMA's tokenizer.model becomes in that format, with merges in place of
scores; merge_ranks.py finds the scores again. Every part of the file that changes tokens is either
understood or refused by name; padding, truncation and offsets change none. What is said of white
space around added tokens (lstrip, rstrip) has no place in a GGUF and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from potluck.convert.json_file import JsonObject, is_unicode, read_json
from potluck.convert.merge_ranks import merges_of, scores_of
from potluck.convert.pre_tokenizers import as_it_is, flat_steps, pre_tokenizer_name
from potluck.convert.sentence_piece_file import check_bytes
from potluck.convert.token_table import AddedToken, TokenTable, looks_special, with_added
from potluck.cursor import shown
from potluck.vocabulary import TOKENS_LIMIT, Kind

_FILE_BYTES_LIMIT = 64 * 2**20  # Llama 3's has 17 MB, one of 262,144 tokens 33 MB
_SPACE = "\u2581"  # how a vocabulary writes one
_BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}
# What may stand under "model" besides vocabulary and merges, and the only values that are known.
_PLAIN_MODEL = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
}
_ENDS = ((1, "<s>"), (2, "</s>"))
# What SentencePiece's treatment of spaces becomes: steps -> is a space put before the text?
_SPACE_VALUES: dict[str, dict[str, object]] = {
    "Prepend": {"prepend": _SPACE},
    "Replace": {"pattern": {"String": " "}, "content": _SPACE},
    "Metaspace": {"replacement": _SPACE, "split": False},
}
_SPACE_STEPS = {
    ("Prepend", "Replace"): True,
    ("Replace",): False,
    ("Metaspace first",): True,
    ("Metaspace always",): True,
    ("Metaspace never",): False,
}


def read_tokenizer_json(path: Path) -> TokenTable:
    """The vocabulary in the file at `path`.

    Raises UnknownModel (no such file) and ModelError: damaged, or of a kind that is not supported.
    """
    file = read_json(path, limit_bytes=_FILE_BYTES_LIMIT)
    model = file.inner("model")
    if model is None:
        raise file.error("has no model: is it a tokenizer.json?")
    kind = model.text("type")
    if kind != "BPE":
        raise file.error(f"a tokenizer of the type {shown(repr(kind))} is not supported (BPE)")
    for key, known in _PLAIN_MODEL.items():
        if model.values.get(key) not in known:
            raise file.error(f"model.{key} {shown(repr(model.values[key]))} is not supported")
    added = [_added(entry) for entry in file.objects("added_tokens")]
    tokens = _tokens(model, added)
    if model.flag("byte_fallback"):
        return _sentence_piece_table(file, model, tokens, added)
    return _byte_level_table(file, model, tokens, added)


def _byte_level_table(
    file: JsonObject, model: JsonObject, tokens: Sequence[str], added: Sequence[AddedToken]
) -> TokenTable:
    pre = pre_tokenizer_name(file)
    # Llama 3's first folders lack the flag that its tokenizer was meant to have.
    if model.flag("ignore_merges") and pre != "llama-bpe":
        raise file.error(f"model.ignore_merges is not supported with the pre_tokenizer {pre}")
    merges = merges_of(model, frozenset(tokens))
    kinds = [Kind.NORMAL] * len(tokens)
    start, end = _template(file)
    table = TokenTable(
        file.file,
        "gpt2",
        pre,
        tokens,
        kinds,
        merges=[f"{left} {right}" for left, right in merges],
        ids=_ids(file, model, tokens, start, end),
        adds_start=start is not None,
        adds_end=end is not None,
        adds_space=False,
    )
    table = with_added(table, added, file.file)
    special = {t for t, k in zip(table.tokens, table.kinds, strict=True) if k == Kind.CONTROL}
    for left, right in merges:
        if not special.isdisjoint((left, right, left + right)):
            merge = shown(repr(f"{left} {right}"))
            raise file.error(f"the merge {merge} would make a special token out of text")
    return table


def _sentence_piece_table(
    file: JsonObject, model: JsonObject, tokens: Sequence[str], added: Sequence[AddedToken]
) -> TokenTable:
    adds_space = _adds_space(file)
    if model.flag("ignore_merges"):
        raise file.error("model.ignore_merges is not supported with byte_fallback")
    start, end = _template(file)
    # LLaMA's names, which only tokenizer_config.json would tell otherwise.
    usual = [text if AddedToken(i, text, is_special=True) in added else None for i, text in _ENDS]
    ids = _ids(file, model, tokens, start or usual[0], end or usual[1])
    kinds = [Kind.BYTE if token in _BYTE_TOKENS else Kind.NORMAL for token in tokens]
    if "unknown" in ids:
        kinds[ids["unknown"]] = Kind.UNKNOWN
    table = TokenTable(
        file.file,
        "llama",
        "default",
        tokens,
        kinds,
        ids=ids,
        adds_start=start is not None or file.inner("post_processor") is None,
        adds_end=end is not None,
        adds_space=adds_space,
    )
    table = with_added(table, added, file.file)
    check_bytes(table)
    merges = merges_of(model, frozenset(tokens))
    return replace(table, scores=scores_of(model, table.tokens, table.kinds, merges))


def _tokens(model: JsonObject, added: Sequence[AddedToken]) -> list[str]:
    """All tokens by id. Raises ModelError: an id is missing, stands twice or is none."""
    vocabulary = model.inner("vocab")
    if vocabulary is None:
        raise model.error("model.vocab is missing")
    by_id: dict[int, str] = {}
    for text, i in vocabulary.values.items():
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < TOKENS_LIMIT:
            raise model.error(f"the token {shown(repr(text))} has the id {shown(repr(i))}")
        if (other := by_id.setdefault(i, text)) is not text:
            raise model.error(f"{shown(repr(text))} and {shown(repr(other))} both have the id {i}")
    for token in added:
        by_id.setdefault(token.token_id, token.text)
    for i in range(len(by_id)):
        if i not in by_id:
            raise model.error(f"no token has the id {i:,}, and others have higher ones")
    tokens = [by_id[i] for i in range(len(by_id))]
    if not is_unicode("".join(tokens)):
        odd = next(i for i, text in enumerate(tokens) if not is_unicode(text))
        raise model.error(f"token {odd} is not Unicode: it has half a surrogate pair")
    return tokens


def _added(entry: JsonObject) -> AddedToken:
    i, text = entry.integer("id"), entry.text("content")
    if i is None or text is None or not 0 <= i < TOKENS_LIMIT:
        raise entry.error(f"{entry.place[:-1]} has no id, or no content")
    return AddedToken(i, text, is_special=bool(entry.flag("special")) or looks_special(text))


def _template(file: JsonObject) -> tuple[str | None, str | None]:
    """The tokens that are put before and behind every text. Raises ModelError: it does more."""
    post = file.inner("post_processor")
    if post is None:
        return None, None
    steps = post.objects("processors") if post.text("type") == "Sequence" else [post]
    around: list[str | None] = [None, None]
    for step in steps:
        kind = step.text("type")
        if kind == "ByteLevel":  # about offsets only
            continue
        if kind != "TemplateProcessing":
            raise file.error(f"the post_processor {shown(repr(kind))} is not supported")
        around = [None, None]
        is_behind = False
        for item in step.objects("single"):
            special = item.inner("SpecialToken")
            if special is None:
                is_behind = True
            elif around[is_behind] is None:
                around[is_behind] = special.text("id")
            else:
                raise file.error(
                    "a post_processor that adds two tokens at one end is not supported"
                )
    return around[0], around[1]


def _ids(
    file: JsonObject, model: JsonObject, tokens: Sequence[str], start: str | None, end: str | None
) -> dict[str, int]:
    """Ids of the tokens that the file itself names. Raises ModelError: it has no such token."""
    unknown = model.text("unk_token")
    if unknown is None and model.flag("byte_fallback"):
        unknown = "<unk>"
    ids = {}
    for name, text in (("bos", start), ("eos", end), ("unknown", unknown)):
        if text is None:
            continue
        if text not in tokens:
            raise file.error(f"it names the token {shown(repr(text))}, which it does not have")
        ids[name] = tokens.index(text)
    return ids


def _adds_space(file: JsonObject) -> bool:
    """Whether a space is put before a text. Raises ModelError: more is done to it."""
    steps = []
    for step in (*flat_steps(file, "normalizer"), *flat_steps(file, "pre_tokenizer")):
        values = dict(step.values)
        kind = values.pop("type", None)
        scheme = values.pop(
            "prepend_scheme", "first" if values.pop("add_prefix_space", 1) else "never"
        )
        if values == _SPACE_VALUES.get(str(kind)):
            steps.append(f"{kind} {scheme}" if kind == "Metaspace" else str(kind))
        else:
            steps.append(as_it_is(step.values))
    found = _SPACE_STEPS.get(tuple(steps))
    if found is None:
        what = shown(", ".join(steps)) if steps else "nothing"
        raise file.error(f"a tokenizer of SentencePiece's kind that does {what} is not supported")
    return found
