"""Vocabularies that are damaged or made to harm: one clear line each, whatever is in them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from potluck.convert.vocabulary import vocabulary_pairs
from potluck.errors import ModelError
from potluck.testing.sentence_piece_file import write_sentence_pieces
from potluck.testing.tokenizer_json import (
    Json,
    byte_level_json,
    sentence_piece_json,
    write_json,
)
from potluck.testing.vocabulary import byte_letters, vocabulary

MERGES = ["h e", "l l", "he ll", "hell o"]
TOKENS = byte_letters() + [merge.replace(" ", "") for merge in MERGES]
N = len(TOKENS) + 1
N_PIECES = 420
Change = Callable[[Any], object]


def byte_level() -> Json:
    return byte_level_json("smollm", TOKENS, MERGES, ["<|end|>"])


def pieces() -> Json:
    pairs: dict[str, Any] = dict(vocabulary("spm", N_PIECES))
    tokens = list(pairs["tokenizer.ggml.tokens"])
    return sentence_piece_json(tokens, list(pairs["tokenizer.ggml.scores"]))


def refusal(folder: Path, n_rows: int) -> str:
    with pytest.raises(ModelError) as caught:
        vocabulary_pairs(folder, n_rows)
    check(caught.value)
    return caught.value.message


def check(error: ModelError) -> None:
    assert error.message.isprintable()
    assert len(error.message) < 600


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"\0" * 100, "no field at offset 0"),
        (b"garbage, and no proto at all", "is no SentencePiece model, or damaged"),
        (b"\xff" * 100, "a number at offset 0 does not end"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + b"x" * 50, "ends behind the end"),
        (b"\x12\x00", "0 tokens, expected 1 to"),
        (b"\x08\x01", "a number where text is expected"),
        (b"\x0a\x04\x0a\x02\xff\xfe", "token 0 is not UTF-8"),
        (b"\x0a\x09\x0a\x01a\x15\0\0\xc0\x7f\x18", "a number at offset 9 does not end"),
        (b"\x0a\x08\x0a\x01a\x15\0\0\xc0\x7f", "the score of token 0 is not finite"),
        (b"\x0a\x05\x0a\x01a\x10\x01", "the score of token 0 is not a 32-bit float"),
        (b"\x0a\x05\x0a\x01a\x18\x09", r"token 0 ('a') is of the type 9, expected 1 to 6"),
        (b"\x0a\x05\x0a\x01a\x08\x01", "a number where text is expected"),
        (b"\x0a\x03\x0a\x01a", "of the type unigram is not supported (bpe)"),
        (b"\x0a\x03\x0a\x01a\x12\x02\x18\x02\x1a\x02\x20\x00", "the token is 1, expected 0"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>Not found</html>", "is no SentencePiece model, or damaged"),
    ],
)
def test_a_file_that_is_no_sentencepiece_model_says_why(
    tmp_path: Path, data: bytes, says: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    found = refusal(tmp_path, N_PIECES)
    assert says.replace("the token is", "its bos token is") in found
    assert str(tmp_path / "tokenizer.model") in found


def test_a_sentencepiece_model_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_sentence_pieces(tmp_path / "tokenizer.model", N_PIECES)
    assert vocabulary_pairs(tmp_path, N_PIECES)
    whole = path.read_bytes()
    for size in [*range(1, len(whole) - 40, 41), *range(len(whole) - 40, len(whole))]:
        path.write_bytes(whole[:size])
        refusal(tmp_path, N_PIECES)


def test_a_changed_byte_never_gives_anything_but_a_vocabulary_or_a_refusal(tmp_path: Path) -> None:
    path = write_sentence_pieces(tmp_path / "tokenizer.model", N_PIECES)
    whole, made = path.read_bytes(), random.Random(3)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(made.randint(1, 3)):
            damaged[made.randrange(len(whole))] = made.randrange(256)
        path.write_bytes(damaged)
        try:
            vocabulary_pairs(tmp_path, N_PIECES)
        except ModelError as error:
            check(error)
            refused += 1
    assert 50 < refused < 300


def test_pieces_that_repeat_or_are_too_long_are_refused(tmp_path: Path) -> None:
    path = write_sentence_pieces(tmp_path / "tokenizer.model", N_PIECES)
    whole = path.read_bytes()
    path.write_bytes(b"\x0a\x05\x0a\x03<s>" + whole)
    assert "the token '<s>' has the ids 0 and 2" in refusal(tmp_path, N_PIECES + 1)
    long = b"\x0a\x80\x80\x40" + b"y" * 2**20
    path.write_bytes(whole + b"\x0a\x84\x80\x40" + long)
    assert "token 420 has 1,048,576 bytes, expected 1 to 4,096" in refusal(tmp_path, N_PIECES + 1)


def changed(document: Json, place: str, value: object) -> Json:
    """`document` with the value at "model.vocab.x"; a function is given what stands there."""
    document = copy.deepcopy(document)
    at: Any = document
    *way, last = place.split(".")
    for step in way:
        at = at[int(step)] if isinstance(at, list) else at[step]
    key = int(last) if isinstance(at, list) else last
    at[key] = value(at[key]) if callable(value) else value
    return document


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("model", None, "has no model: is it a tokenizer.json?"),
        ("model", [], "model is an array, expected an object"),
        ("model.type", "Unigram", "a tokenizer of the type 'Unigram' is not supported (BPE)"),
        ("model.type", None, "a tokenizer of the type None is not supported"),
        ("model.dropout", 0.1, "model.dropout 0.1 is not supported"),
        ("model.end_of_word_suffix", "</w>", "model.end_of_word_suffix '</w>' is not supported"),
        ("model.ignore_merges", True, "ignore_merges is not supported with the pre_tokenizer smol"),
        ("model.unk_token", "<x>", "it names the token '<x>', which it does not have"),
        ("model.vocab", None, "model.vocab is missing"),
        ("model.vocab", {}, "no token has the id 0, and others have higher ones"),
        ("model.vocab", lambda ids: ids | {"hello": 9999}, "no token has the id 259"),
        ("model.vocab", lambda ids: ids | {"hello": 1}, "'hello' and "),
        ("model.vocab", lambda ids: ids | {"hello": -1}, "the token 'hello' has the id -1"),
        ("model.vocab", lambda ids: ids | {"hello": True}, "the token 'hello' has the id True"),
        ("model.vocab", lambda ids: ids | {"hello": 2**60}, "the token 'hello' has the id 115292"),
        ("model.vocab", lambda ids: ids | {"zz": N - 2}, "'zz' and 'hello' both have the id 259"),
        ("model.vocab", lambda ids: ids | {"y" * 2**20: N}, "token 261 has 1,048,576 bytes"),
        ("model.merges", "h e", "model.merges is 'h e', expected an array"),
        ("model.merges", ["h e x"], "merge 0 is 'h e x', expected two tokens"),
        ("model.merges", ["he"], "merge 0 is 'he', expected two tokens"),
        ("model.merges", [["h", "e", "x"]], "merge 0 is ['h', 'e', 'x'], expected two tokens"),
        ("model.merges", [["h", 1]], "merge 0 is ['h', 1], expected two tokens"),
        ("model.merges", [" e"], "merge 0 is ' e', expected two tokens"),
        ("model.merges", ["h e", "q q"], "merge 1 (q q) needs 'qq', which is no token"),
        ("model.merges", [["h e", "x"]], "merge 0 (h e x) needs 'h e', which is no token"),
        ("model.merges", ["h e", "h e"], "a merge stands twice"),
        ("added_tokens", [7], "added_tokens[0] is 7, expected an object"),
        ("added_tokens", [{"id": 3}], "added_tokens[0] has no id, or no content"),
        ("added_tokens", [{"id": 1, "content": "<x>"}], "token 1 is '<x>', in the vocabulary"),
        ("added_tokens", [{"id": 900, "content": "<x>"}], "no token has the id 260"),
        ("added_tokens", [{"id": 259, "content": "hello", "special": True}], "the merge 'hell o'"),
        ("pre_tokenizer", None, "a pre_tokenizer that does nothing is not one that has a name"),
        ("pre_tokenizer", {"type": "Whitespace"}, 'does {"type": "Whitespace"} is not one'),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "with add_prefix_space"),
        ("pre_tokenizer.pretokenizers", lambda steps: steps[::-1], "does ByteLevel use_regex, Dig"),
        ("normalizer", {"type": "NFC"}, "the normalizer NFC is not supported"),
        ("normalizer", {"type": "Lowercase"}, "the normalizer Lowercase is not supported"),
        ("post_processor", {"type": "BertProcessing"}, "the post_processor 'BertProcessing' is no"),
    ],
)
def test_a_byte_level_file_that_contradicts_itself_is_refused_by_name(
    tmp_path: Path, place: str, value: object | Change, says: str
) -> None:
    write_json(tmp_path / "tokenizer.json", changed(byte_level(), place, value))
    assert says in refusal(tmp_path, N)


SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\d{1,4}"}, "behavior": "Isolated"},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
}


def test_an_unknown_pattern_is_shown(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", changed(byte_level(), "pre_tokenizer", SPLIT))
    found = refusal(tmp_path, N)
    assert r"does Split \d{1,4}, ByteLevel is not one that has a name here (gpt-2, smollm" in found


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("model.merges", lambda merges: merges[1:], "are not merged, though they give a token"),
        ("model.merges", lambda merges: torn(merges), "is merged at two places"),
        ("model.byte_fallback", False, "a pre_tokenizer that does nothing"),
        ("model.ignore_merges", True, "model.ignore_merges is not supported with byte_fallback"),
        ("normalizer", None, "of SentencePiece's kind that does nothing is not supported"),
        ("normalizer.normalizers", lambda steps: steps[:1], "that does Prepend is not supported"),
        ("normalizer.normalizers.0", {"type": "NFKC"}, 'that does {"type": "NFKC"}, Replace is'),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "▁"}, "Replace, {"),
    ],
)
def test_a_file_of_sentence_pieces_that_cannot_be_scores_is_refused_by_name(
    tmp_path: Path, place: str, value: object | Change, says: str
) -> None:
    write_json(tmp_path / "tokenizer.json", pieces())
    assert vocabulary_pairs(tmp_path, N_PIECES)
    write_json(tmp_path / "tokenizer.json", changed(pieces(), place, value))
    assert says in refusal(tmp_path, N_PIECES)


def torn(merges: list[str]) -> list[str]:
    """With the pairs that give one piece no longer all together."""
    made = [merge.replace(" ", "") for merge in merges]
    i = next(i for i in range(len(made) - 1) if made[i] == made[i + 1])
    return [*merges[:i], *merges[i + 1 :], merges[i]]


def places(value: object, way: str = "") -> Iterator[str]:
    """Every place in a document, but the single tokens."""
    items: list[tuple[str, object]] = []
    if isinstance(value, dict) and len(value) < 100:
        items = [(str(key), inner) for key, inner in value.items()]
    if isinstance(value, list) and len(value) < 10:
        items = [(str(i), inner) for i, inner in enumerate(value)]
    for key, inner in items:
        yield f"{way}{key}"
        yield from places(inner, f"{way}{key}.")


@pytest.mark.parametrize("made", [byte_level, pieces])
def test_anything_anywhere_gives_a_vocabulary_or_a_refusal(
    tmp_path: Path, made: Callable[[], Json]
) -> None:
    document = made()
    n_rows = N if made is byte_level else N_PIECES
    path, refused = tmp_path / "tokenizer.json", 0
    anything: tuple[object, ...] = (
        None,
        True,
        7,
        -1,
        1e300,
        "x",
        "",
        [],
        [[]],
        {},
        {"type": "x"},
        [None],
        "\ud800",
    )
    tried = [(place, value) for place in places(document) for value in anything]
    assert len(tried) > 300
    for place, value in random.Random(4).sample(tried, 200):
        path.write_text(json.dumps(changed(document, place, value)))
        try:
            vocabulary_pairs(tmp_path, n_rows)
        except ModelError as error:
            check(error)
            refused += 1
    assert refused > 50
