"""A folder's vocabulary as GGUF metadata: SentencePiece's file, and the JSON files beside it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import sentencepiece
from hypothesis import given, settings

from potluck.convert.vocabulary import vocabulary_pairs
from potluck.errors import ModelError
from potluck.testing.tokenizer_json import tokenizer_of, write_json
from potluck.tokenizer import Tokenizer
from potluck.vocabulary import Kind

N = 700  # tokens of the trained vocabulary
ROOT = Path(__file__).parents[2]
TEXTS = (
    "",
    " ",
    "     five spaces",
    "trailing  ",
    "The License, the licence: it's 1234.5!",
    "a\n\nb\r\n\tc",
    "naïve cafe\u0301 Å Å ﬁ ½ Ⅷ",
    "日本語 中文 한글 가",
    "שלום مرحبا \u200f\u202e",
    "👩‍👧 😀🏳️‍🌈",
    "\0\x01\x7f\u00a0\u2003\u3000",
    "<s> </s> <unk> <0x41> [PAD]",
    "y" * 5000,
)


@pytest.fixture(scope="module")
def model() -> bytes:
    """A tokenizer.model with the settings of LLaMA's, trained by sentencepiece on our licence."""
    return trained()


def trained(**changed: Any) -> bytes:
    out = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": N,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "byte_fallback": True,
        "character_coverage": 0.99995,
    }
    sentences = [*(ROOT / "LICENSE").read_text().splitlines(), "    indented   text", "日本語 中文"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=out, minloglevel=2, **settings | changed
    )
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path, model: bytes) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(model)
    return tmp_path


def pairs_of(folder: Path, n_rows: int = N) -> dict[str, Any]:
    """By the end of their keys: those all start with tokenizer.ggml."""
    pairs = vocabulary_pairs(folder, n_rows)
    assert len(dict(pairs)) == len(pairs)
    return {key.removeprefix("tokenizer.ggml."): value for key, value in pairs}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, model: bytes) -> Tokenizer:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes(model)
    return tokenizer_of(vocabulary_pairs(folder, N), folder / "x.gguf")


@pytest.fixture(scope="module")
def oracle(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.mark.parametrize("text", TEXTS)
def test_a_converted_vocabulary_cuts_as_sentencepiece_does(
    converted: Tokenizer, oracle: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    ids = converted.encode(text, add_start=False)
    assert ids == oracle.encode(text)
    assert converted.encode(text, add_start=True) == [1, *ids]
    assert converted.decode(ids) == text


@given(st.text(st.characters(codec="utf-8"), max_size=40).filter(lambda text: "▁" not in text))
@settings(deadline=None)
def test_any_text_is_cut_as_sentencepiece_does_and_comes_back(
    converted: Tokenizer, oracle: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    ids = converted.encode(text, add_start=False)
    assert ids == oracle.encode(text)
    assert converted.decode(ids) == text


def test_the_pairs_are_those_of_llama_cpp(
    folder: Path, oracle: sentencepiece.SentencePieceProcessor
) -> None:
    pairs = pairs_of(folder)
    ids = range(N)
    assert list(pairs.pop("tokens")) == [oracle.id_to_piece(i) for i in ids]
    assert list(pairs.pop("scores")) == [oracle.get_score(i) for i in ids]
    kinds = pairs.pop("token_type")
    assert kinds == [2, 3, 3, *[6] * 256, *[1] * (N - 259)]
    assert pairs == {
        "model": "llama",
        "pre": "default",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": True,
    }


def test_metas_layout_has_the_vocabulary_one_folder_above(folder: Path) -> None:
    (folder / "7B").mkdir()
    assert vocabulary_pairs(folder / "7B", N) == vocabulary_pairs(folder, N)


def test_a_vocabulary_without_the_first_space_keeps_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(add_dummy_prefix=False))
    tokenizer = tokenizer_of(vocabulary_pairs(tmp_path, N), tmp_path / "x.gguf")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in TEXTS:
        assert tokenizer.encode(text, add_start=False) == processor.encode(text)


def test_pieces_that_the_training_was_told_of_come_out_of_text(tmp_path: Path) -> None:
    model = trained(user_defined_symbols=["▁two▁words", "§§"], control_symbols=["[INST]"])
    (tmp_path / "tokenizer.model").write_bytes(model)
    pairs = pairs_of(tmp_path)
    kinds = dict(zip(pairs["tokens"], pairs["token_type"], strict=True))
    assert (kinds[" two words"], kinds["§§"], kinds["[INST]"]) == (4, 4, 3)
    tokenizer = tokenizer_of(vocabulary_pairs(tmp_path, N), tmp_path / "x.gguf")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = "the two words§§ [INST]"
    ids = tokenizer.encode(text, add_start=False)
    assert ids == processor.encode(text)
    assert tokenizer.decode(ids) == text


ALPACA = {
    "added_tokens.json": {"[PAD]": N},
    "special_tokens_map.json": {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "[PAD]"},
}
CHAT_ML = {
    "added_tokens.json": {"<|im_end|>": N, "<|im_start|>": N + 1},
    "tokenizer_config.json": {
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "<|im_end|>",
        "unk_token": "",
        "add_eos_token": False,
        "add_prefix_space": None,
    },
}
DECODER = {
    "tokenizer_config.json": {
        "added_tokens_decoder": {
            "0": {"content": "<unk>", "special": True},
            "1": {"content": "<s>", "special": True},
            str(N): {"content": "<tool>", "special": False},
            str(N + 1): {"content": "▁ten▁", "special": False},
            str(N + 2): {"content": "<pad>", "special": True},
        },
        "pad_token": "<pad>",
        "add_bos_token": False,
    },
}


def with_files(folder: Path, files: dict[str, Any]) -> Path:
    for name, value in files.items():
        write_json(folder / name, value)
    return folder


def test_alpacas_padding_is_a_control_token(folder: Path) -> None:
    pairs = pairs_of(with_files(folder, ALPACA), N + 1)
    assert (pairs["tokens"][N], pairs["token_type"][N], pairs["scores"][N]) == ("[PAD]", 3, -1000)
    assert pairs["padding_token_id"] == N
    assert pairs["bos_token_id"] == pairs["eos_token_id"] == 2  # what Alpaca's own files say


def test_chat_mls_tokens_are_control_tokens_by_their_looks(folder: Path) -> None:
    pairs = pairs_of(with_files(folder, CHAT_ML), N + 2)
    assert pairs["tokens"][N:] == ["<|im_end|>", "<|im_start|>"]
    assert pairs["token_type"][N:] == [3, 3]
    assert (pairs["bos_token_id"], pairs["eos_token_id"]) == (1, N)
    assert pairs["unknown_token_id"] == 0


def test_the_decoder_of_a_config_says_what_is_special(folder: Path) -> None:
    pairs = pairs_of(with_files(folder, DECODER), N + 3)
    assert pairs["tokens"][N:] == ["<tool>", " ten ", "<pad>"]
    assert pairs["token_type"][N:] == [4, 4, 3]
    assert pairs["token_type"][:3] == [2, 3, 3]
    assert (pairs["add_bos_token"], pairs["padding_token_id"]) == (False, N + 2)


def test_added_words_come_out_of_text_and_added_tools_do_not(folder: Path) -> None:
    pairs = vocabulary_pairs(with_files(folder, DECODER), N + 3)
    tokenizer = tokenizer_of(pairs, folder / "x.gguf")
    ids = tokenizer.encode("a ten b<tool>", add_start=False)
    assert N + 1 in ids
    assert N not in ids
    assert tokenizer.decode(ids) == "a ten b<tool>"
    assert tokenizer.encode_template([("<tool>", True)]) == [N]


@pytest.mark.parametrize(
    ("files", "n_rows", "says"),
    [
        ({}, N - 1, r"has 700 tokens, the model 699"),
        (ALPACA, N, r"has 701 tokens, the model 700"),
        ({}, N + 1, r"has 700 tokens, the model 701"),
        ({}, N + 1028, r"has 700 tokens, the model 1,728"),
        ({"added_tokens.json": {"qq": N + 1}}, N + 2, r"'qq' is added as token 701, expected 700"),
        ({"added_tokens.json": {"qq": -1}}, N, r"'qq' is added as token -1"),
        ({"added_tokens.json": {"qq": 2**70}}, N, r"'qq' is added as token 1,180,591,"),
        ({"added_tokens.json": {"qq": 5}}, N, r"token 5 is 'qq', in the vocabulary '<0x02>'"),
        ({"added_tokens.json": {"qq": "5"}}, N, r"json: qq is '5', expected a whole number"),
        ({"added_tokens.json": {"▁the": N}}, N + 1, r"'▁the' is token 700, in the vocabul"),
        ({"added_tokens.json": {"": N}}, N + 1, r"token 700 has 0 bytes"),
        ({"added_tokens.json": {"y" * 2**20: N}}, N + 1, r"token 700 has 1,048,576 bytes"),
        ({"tokenizer_config.json": {"eos_token": "<end>"}}, N, r"eos_token is '<end>', which the"),
        ({"tokenizer_config.json": {"eos_token": 7}}, N, r"eos_token is 7, expected a string"),
        ({"tokenizer_config.json": {"add_bos_token": 1}}, N, r"add_bos_token is 1, expected true"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "y"}}}}, N, "no tok"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"1": {}}}}, N, "'1' has no content"),
        ({"generation_config.json": {"eos_token_id": "2"}}, N, r"eos_token_id is '2', expected"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(
    folder: Path, files: dict[str, Any], n_rows: int, says: str
) -> None:
    with pytest.raises(ModelError, match=says) as refusal:
        vocabulary_pairs(with_files(folder, files), n_rows)
    assert "\n" not in refusal.value.message
    assert len(refusal.value.message) < 500


def test_too_many_tokens_are_named_in_the_remedy(folder: Path) -> None:
    with pytest.raises(ModelError) as refusal:
        vocabulary_pairs(with_files(folder, ALPACA), N)
    assert "'[PAD]'" in refusal.value.remedy


def test_rows_that_look_like_padding_get_unused_tokens(folder: Path) -> None:
    pairs = pairs_of(folder, 704)
    assert pairs["tokens"][N:] == ["[PAD700]", "[PAD701]", "[PAD702]", "[PAD703]"]
    assert pairs["token_type"][N:] == [Kind.UNUSED] * 4
    assert pairs["scores"][N:] == [-10000.0] * 4
    tokenizer = tokenizer_of(vocabulary_pairs(folder, 704), folder / "x.gguf")
    assert max(tokenizer.encode("[PAD700]", add_start=False)) < N


def test_ids_of_the_vocabulary_win_over_those_of_early_configurations(folder: Path) -> None:
    """The first LLaMA folders in Hugging Face's layout name 0 and 1 where 1 and 2 are meant."""
    wrong = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    empty = {"bos_token": "", "eos_token": "", "unk_token": ""}
    files = {"config.json": wrong, "generation_config.json": wrong, "tokenizer_config.json": empty}
    pairs = pairs_of(with_files(folder, files))
    assert [key for key in pairs if key.endswith("_id")] == [
        "bos_token_id",
        "eos_token_id",
        "unknown_token_id",
    ]
    assert (pairs["bos_token_id"], pairs["eos_token_id"]) == (1, 2)


def test_each_token_that_ends_an_answer_has_a_key(folder: Path) -> None:
    added = {text: N + i for i, text in enumerate(("<|eot_id|>", "<|x|>", "<|y|>", "<|z|>"))}
    ends = {"eos_token_id": [2, N, N + 1, N + 2]}
    files = {"added_tokens.json": added, "generation_config.json": ends}
    pairs = pairs_of(with_files(folder, files), N + 4)
    assert [pairs[f"{name}_token_id"] for name in ("eos", "eot", "eom")] == [2, N + 1, N + 2]
    tokenizer = tokenizer_of(vocabulary_pairs(folder, N + 4), folder / "x.gguf")
    assert tokenizer.end_ids == {2, N, N + 1, N + 2}
    ends["eos_token_id"].append(N + 3)
    with pytest.raises(ModelError, match="more tokens end an answer than a GGUF can name"):
        vocabulary_pairs(with_files(folder, files), N + 4)


def template_keys(folder: Path) -> dict[str, Any]:
    return {key: value for key, value in pairs_of(folder).items() if "chat_template" in key}


def test_the_chat_template_is_carried_over(folder: Path) -> None:
    assert template_keys(folder) == {}
    write_json(folder / "tokenizer_config.json", {"chat_template": "{{ one }}"})
    assert template_keys(folder) == {"tokenizer.chat_template": "{{ one }}"}
    named = [{"name": n, "template": f"{{{{ {n} }}}}"} for n in ("default", "tool_use")]
    write_json(folder / "tokenizer_config.json", {"chat_template": named})
    assert template_keys(folder) == {
        "tokenizer.chat_template": "{{ default }}",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "{{ tool_use }}",
    }
    (folder / "chat_template.jinja").write_text("{{ file }}\n")
    assert template_keys(folder) == {"tokenizer.chat_template": "{{ file }}\n"}


@pytest.mark.parametrize("template", [[{"name": "x"}], [7], {"a": 1}, 7])
def test_a_chat_template_of_another_shape_is_refused(folder: Path, template: object) -> None:
    write_json(folder / "tokenizer_config.json", {"chat_template": template})
    with pytest.raises(ModelError, match="chat_template"):
        vocabulary_pairs(folder, N)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model_type": "unigram"}, r"of the type unigram is not supported \(bpe\)"),
        ({"model_type": "char", "vocab_size": 320}, r"of the type char is not supported"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"the normalization nmt_nfkc is not supported"),
        ({"remove_extra_whitespaces": True}, r"remove_extra_whitespaces is true, which is not"),
        ({"treat_whitespace_as_suffix": True}, r"treat_whitespace_as_suffix is true"),
        ({"byte_fallback": False, "vocab_size": 300}, r"without byte fallback is not supported"),
    ],
)
def test_what_llamas_vocabulary_does_not_do_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(**settings))
    with pytest.raises(ModelError, match=says):
        vocabulary_pairs(tmp_path, N)


def test_a_folder_without_a_vocabulary_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no vocabulary, neither tokenizer.model nor tokenizer."):
        vocabulary_pairs(tmp_path, N)


def test_json_is_read_strictly(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    for text, says in (
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ("[]", "holds an array, expected an object"),
        ("", "is empty"),
        ("{", "is not JSON as expected"),
        ('{"a": ' + "1" * 5000 + "}", "is not JSON as expected"),
        ('{"bos_token": "\\ud800"}', "expected Unicode text"),
        (json.dumps({"a": "x" * 2**23}), "8,388,617 bytes, at most 4,194,304 are supported"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
    ):
        path.write_text(text)
        with pytest.raises(ModelError, match=says) as refusal:
            vocabulary_pairs(folder, N)
        assert str(path) in refusal.value.message
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ModelError, match="is not UTF-8"):
        vocabulary_pairs(folder, N)
