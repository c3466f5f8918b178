"""tokenizer.json as GGUF metadata: cut as the `tokenizers` library cuts with the very same file."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings

from potluck.convert.vocabulary import vocabulary_pairs
from potluck.errors import ModelError
from potluck.testing.tokenizer_json import (
    PRE_TOKENIZERS,
    Json,
    added_token,
    byte_level_json,
    sentence_piece_json,
    tokenizer_of,
    write_json,
)
from potluck.testing.vocabulary import byte_letters
from potluck.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# What ways of cutting disagree about; joined at random, with the seed that is given.
ALPHABET = (
    *("'s", "'S", "'LL", "'ve", "\u2019s", "'", "a", "the", "Licence", "İ", "\u017f", "ǅ", "ß"),
    *("1", "23", "4567", "½", "Ⅷ", "٣", "८"),
    *(" ", "  ", "   ", "\n", "\r\n", "\n\n", "\r", "\t", "\u00a0", "\u2003", "\u3000", "\u0085"),
    *("\u2028", "\u200b", "\x0b", "\x0c", "\x1c", "\x1f", "\0", "\x7f", "\x80"),
    *(".", ",", "!", "--", "_", "$", "+", "<", "^", "~", "|", "`", "€", "…", "—", "«"),
    *("中文", "日", "カ", "한", "é", "e\u0301", "\u0308", "ñ", "नि", "ไทย"),
    *(
        "שלום",
        "مر",
        "\u200f",
        "\u202e",
        "👩‍👧",
        "😀",
        "🏳️‍🌈",
        "👍🏽",
        "\ufe0f",
        "\U0010ffff",
        "\ue000",
    ),
)


@pytest.fixture(scope="module")
def trained() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level vocabulary, trained on our licence without cutting it.

    So there are tokens across every border where a way of cutting may cut: "1 2", ".\\n", "e t".
    """
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=byte_letters(), show_progress=False
    )
    made = random.Random(5)
    texts = (ROOT / "LICENSE").read_text().splitlines(keepends=True)
    texts += ["".join(made.choices(ALPHABET, k=2)) * 2 for _ in range(1500)]
    built.train_from_iterator(texts, trainer)
    vocabulary = built.get_vocab()
    merges = json.loads(built.to_str())["model"]
    pairs = cast("dict[str, list[list[str]]]", merges)["merges"]
    return sorted(vocabulary, key=vocabulary.__getitem__), [" ".join(pair) for pair in pairs]


@pytest.fixture(params=sorted(PRE_TOKENIZERS))
def pre(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def document(trained: tuple[list[str], list[str]], pre: str) -> Json:
    return byte_level_json(pre, *trained, SPECIAL)


def both(folder: Path, document: Json) -> tuple[Tokenizer, tokenizers.Tokenizer, dict[str, Any]]:
    """Ours, the library's, and our pairs by the end of their keys."""
    path = write_json(folder / "tokenizer.json", document)
    oracle = tokenizers.Tokenizer.from_file(str(path))
    pairs = vocabulary_pairs(folder, oracle.get_vocab_size())
    named = {key.removeprefix("tokenizer.ggml."): value for key, value in pairs}
    return tokenizer_of(pairs, folder / "x.gguf"), oracle, named


def test_each_way_of_cutting_is_known_and_cuts_the_same(
    tmp_path: Path, document: Json, pre: str
) -> None:
    ours, oracle, pairs = both(tmp_path, document)
    assert (pairs["model"], pairs["pre"], pairs["add_bos_token"]) == ("gpt2", pre, False)
    if document["normalizer"] is not None:  # composes letters; a GGUF can't say so
        oracle.normalizer = tokenizers.normalizers.Sequence([])
    made = random.Random(1)
    texts = ["".join(made.choices(ALPHABET, k=made.randint(0, 30))) for _ in range(1500)]
    texts += [(ROOT / "README.md").read_text(), Path(__file__).read_text().replace("<|", "")]
    assert len(set(texts)) > 1400
    cut = [ours.encode(text, add_start=False) for text in texts]
    expected = oracle.encode_batch(texts, add_special_tokens=False)
    assert cut == [encoding.ids for encoding in expected]
    assert [ours.decode(ids) for ids in cut] == texts


def test_the_ways_of_cutting_differ(tmp_path: Path, trained: tuple[list[str], list[str]]) -> None:
    """Otherwise the test above would compare one way with itself, four times."""
    cuts = {
        tuple(
            both(tmp_path / pre, byte_level_json(pre, *trained, SPECIAL))[0].encode(
                "It'S 1234  the\r\n\r\n", add_start=False
            )
        )
        for pre in PRE_TOKENIZERS
    }
    assert len(cuts) == 4


def test_any_text_is_cut_the_same_and_comes_back(tmp_path: Path, document: Json) -> None:
    document["normalizer"] = None
    ours, oracle, _ = both(tmp_path, document)

    @given(st.text(st.characters(codec="utf-8"), max_size=40))
    @settings(deadline=None, max_examples=60, database=None)
    def holds(text: str) -> None:
        ids = ours.encode(text, add_start=False)
        assert ours.decode(ids) == text
        if not any(special in text for special in SPECIAL):
            assert ids == oracle.encode(text, add_special_tokens=False).ids

    holds()


def test_letters_are_not_composed_whatever_qwens_own_tokenizer_does(
    tmp_path: Path, trained: tuple[list[str], list[str]]
) -> None:
    """The one known difference: potluck and llama.cpp give back what was put in."""
    ours, oracle, pairs = both(tmp_path, byte_level_json("qwen2", *trained, SPECIAL))
    assert pairs["pre"] == "qwen2"
    text = "cafe\u0301"
    ids = ours.encode(text, add_start=False)
    assert ours.decode(ids) == text
    assert oracle.encode(text).ids == ours.encode("caf\u00e9", add_start=False) != ids


def test_merges_may_be_pairs(tmp_path: Path, document: Json) -> None:
    _, _, as_strings = both(tmp_path / "a", document)
    model = cast("dict[str, Any]", document["model"])
    model["merges"] = [merge.split(" ") for merge in model["merges"]]
    _, _, as_pairs = both(tmp_path / "b", document)
    assert as_pairs == as_strings


def test_ids_and_kinds_follow_the_files(tmp_path: Path, document: Json) -> None:
    n = len(cast("dict[str, Any]", document["model"])["vocab"])
    added = cast("list[Json]", document["added_tokens"])
    added += [
        added_token(n + 3, "<tool>", special=False),
        added_token(n + 4, "ab c", special=False),
    ]
    added += [added_token(n + 5, "<|fim|>", special=False)]
    config = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}
    write_json(tmp_path / "tokenizer_config.json", config | {"add_prefix_space": True})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [n + 2, n], "bos_token_id": n})
    _, _, pairs = both(tmp_path, document)
    assert pairs["tokens"][n:] == [*SPECIAL, "<tool>", "ab c", "<|fim|>"]
    assert pairs["token_type"] == [1] * n + [3, 3, 3, 4, 4, 3]
    assert "scores" not in pairs
    names = ("bos", "eos", "eot", "padding")
    assert [pairs.get(f"{name}_token_id") for name in names] == [n, n + 2, None, n]
    assert not pairs["add_space_prefix"]


def test_what_stands_before_every_text_is_the_start_token(tmp_path: Path, document: Json) -> None:
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [1501], "tokens": ["<|im_start|>"]}
        },
    }
    document["post_processor"] = {"type": "Sequence", "processors": [template]}
    path = write_json(tmp_path / "tokenizer.json", document)
    n = len(cast("dict[str, Any]", document["model"])["vocab"])
    pairs = dict(vocabulary_pairs(tmp_path, n + 3))
    assert pairs["tokenizer.ggml.add_bos_token"] is True
    assert pairs["tokenizer.ggml.bos_token_id"] == n + 1
    assert tokenizer_of(list(pairs.items()), path.with_suffix(".gguf")).encode(
        "", add_start=True
    ) == [n + 1]


def test_special_tokens_in_a_text_are_text(tmp_path: Path, document: Json) -> None:
    ours, _, _ = both(tmp_path, document)
    for special in SPECIAL:
        ids = ours.encode(f"a {special} b", add_start=False)
        assert not {ours.name(i) for i in ids} & set(SPECIAL)
        assert ours.decode(ids) == f"a {special} b"


@pytest.fixture(scope="module")
def pieces() -> tuple[list[str], list[float], bytes]:
    """A vocabulary of LLaMA's kind: pieces, scores, and the file they come from."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((ROOT / "LICENSE").read_text().splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=900,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    ids = range(900)
    tokens = [processor.id_to_piece(i) for i in ids]
    return tokens, [processor.get_score(i) for i in ids], out.getvalue()


def test_sentence_pieces_get_their_scores_back_from_merges(
    tmp_path: Path, pieces: tuple[list[str], list[float], bytes]
) -> None:
    tokens, scores, model = pieces
    ours, oracle, pairs = both(tmp_path, sentence_piece_json(tokens, scores))
    (tmp_path / "spm").mkdir()
    (tmp_path / "spm" / "tokenizer.model").write_bytes(model)
    theirs = dict(vocabulary_pairs(tmp_path / "spm", 900))
    for key, value in pairs.items():
        assert value == theirs[f"tokenizer.ggml.{key}"], key
    made = random.Random(2)
    texts = ["".join(made.choices(ALPHABET, k=made.randint(0, 30))) for _ in range(500)]
    texts += ["", " ", "   three", (ROOT / "README.md").read_text()]
    for text in texts:
        ids = ours.encode(text, add_start=False)
        assert ids == oracle.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text


@pytest.mark.parametrize(("scheme", "adds"), [("first", True), ("always", True), ("never", False)])
def test_the_first_space_may_be_a_step_of_cutting(
    tmp_path: Path, pieces: tuple[list[str], list[float], bytes], scheme: str, *, adds: bool
) -> None:
    document = sentence_piece_json(pieces[0], pieces[1])
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    document |= {"normalizer": None, "pre_tokenizer": step}
    ours, oracle, pairs = both(tmp_path, document)
    assert pairs["add_space_prefix"] is adds
    for text in ("The License", "a  b\n c"):
        assert ours.encode(text, add_start=False) == oracle.encode(text).ids[1:]


def test_tokenizer_model_counts_where_both_are(
    tmp_path: Path, pieces: tuple[list[str], list[float], bytes]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(pieces[2])
    write_json(tmp_path / "tokenizer.json", {"model": "never read"})
    assert dict(vocabulary_pairs(tmp_path, 900))["tokenizer.ggml.model"] == "llama"


def test_llama_3s_tokenizer_model_is_left_for_its_tokenizer_json(
    tmp_path: Path, document: Json
) -> None:
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ModelError, match="of the tiktoken kind") as refusal:
        vocabulary_pairs(tmp_path / "original", 2)
    assert "tokenizer.json" in refusal.value.remedy
    write_json(tmp_path / "tokenizer.json", document)
    n = len(cast("dict[str, Any]", document["model"])["vocab"]) + 3
    pairs = dict(vocabulary_pairs(tmp_path / "original", n))
    assert pairs["tokenizer.ggml.model"] == "gpt2"
