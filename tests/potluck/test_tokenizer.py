"""Text <-> tokens: exact, whole characters only, and no special token out of anyone's text."""

from __future__ import annotations

import builtins
import io
import threading
import time
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import sentencepiece
from hypothesis import example, given, settings

from potluck.byte_level import _BYTE_OF
from potluck.errors import ModelError, UsageError
from potluck.gguf import GgufFile, TensorInfo, Value, read
from potluck.tokenizer import Tokenizer, load

LETTER_OF = {byte: letter for letter, byte in _BYTE_OF.items()}
START, END, FILLER = "<|im_start|>", "<|im_end|>", "  \t"
# The vocabulary of these tests: 256 bytes, what the merges make, two control tokens, an added run.
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "1 2", "< |"]
BYTE_TOKENS = [LETTER_OF[b] for b in range(256)] + [m.replace(" ", "") for m in MERGES]
# Bytes that never stand in UTF-8 make a stream invalid; a cut character does too.
any_text = st.text(st.characters(codec="utf-8"), max_size=40)


def gguf(
    metadata: Mapping[str, Value], tensors: Mapping[str, TensorInfo] | None = None
) -> GgufFile:
    return GgufFile(Path("x.gguf"), 3, 0, metadata, tensors or {}, 0, "")


def byte_level(**changed: Any) -> dict[str, Value]:
    """Metadata of a byte-level vocabulary; a key set to None is left out."""
    tokens = (*BYTE_TOKENS, START, END, FILLER, "<tool>")
    keys: dict[str, Any] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": numbers([1] * len(BYTE_TOKENS) + [3, 3, 4, 4]),
        "merges": tuple(MERGES),
        "bos_token_id": tokens.index(START),
        "eos_token_id": tokens.index(END),
    } | changed
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def numbers(values: Sequence[int]) -> memoryview:
    return memoryview(array("i", values))


@pytest.fixture(scope="module")
def trained() -> sentencepiece.SentencePieceProcessor:
    """A small vocabulary made by sentencepiece itself, with LLaMA's settings."""
    out = io.BytesIO()
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=["[PAD]", "§§"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def sentence_pieces(
    trained: sentencepiece.SentencePieceProcessor, **changed: Any
) -> dict[str, Value]:
    ids = range(trained.vocab_size())
    kinds = {
        i: 2
        if trained.is_unknown(i)
        else 3
        if trained.is_control(i)
        else 6
        if trained.is_byte(i)
        else 1
        for i in ids
    }
    kinds |= {trained.piece_to_id("[PAD]"): 4, trained.piece_to_id("§§"): 4}
    keys: dict[str, Any] = {
        "model": "llama",
        "tokens": tuple(trained.id_to_piece(i) for i in ids),
        "scores": memoryview(array("f", [trained.get_score(i) for i in ids])),
        "token_type": numbers([kinds[i] for i in ids]),
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changed
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return load(gguf(byte_level()))


@pytest.fixture(scope="module")
def llama(trained: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    return load(gguf(sentence_pieces(trained)))


@pytest.fixture(params=["bpe", "llama"])
def either(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


def names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.name(i) for i in ids]


def test_merges_are_applied_in_their_order(bpe: Tokenizer) -> None:
    ids = bpe.encode("hello world 12", add_start=False)
    assert names(bpe, ids) == ["hello", "Ġworld", "Ġ", "1", "2"]


@pytest.mark.parametrize(
    ("pre", "cut"),
    [
        ("smollm", ["1", "2", "Ġ", "Ġ"]),
        ("gpt-2", ["12", "Ġ", "Ġ"]),
        ("default", ["12", "Ġ", "Ġ"]),
        ("llama-bpe", ["12", "Ġ", "Ġ"]),
        ("llama3", ["12", "Ġ", "Ġ"]),
        ("qwen2", ["1", "2", "Ġ", "Ġ"]),
    ],
)
def test_each_name_cuts_words_its_own_way(pre: str, cut: list[str]) -> None:
    tokenizer = load(gguf(byte_level(pre=pre)))
    assert names(tokenizer, tokenizer.encode("12  ", add_start=False)) == cut


def test_default_keeps_punctuation_to_itself() -> None:
    cut = {pre: load(gguf(byte_level(pre=pre))) for pre in ("gpt-2", "default")}
    assert names(cut["gpt-2"], cut["gpt-2"].encode("<|", add_start=False)) == ["<|"]
    assert names(cut["default"], cut["default"].encode("a<|", add_start=False)) == ["a", "<|"]


def test_an_unknown_way_of_cutting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"'martian' is not supported \(default, gpt-2, smollm, "):
        load(gguf(byte_level(pre="martian")))


def test_llama_3_starts_with_its_start_token_unless_the_file_says_no() -> None:
    assert load(gguf(byte_level(pre="llama-bpe"))).encode("", add_start=True) != []
    assert (
        load(gguf(byte_level(pre="llama-bpe", add_bos_token=False))).encode("", add_start=True)
        == []
    )
    assert load(gguf(byte_level())).encode("", add_start=True) == []


@given(any_text)
@settings(deadline=None)
def test_llama_ids_are_those_of_sentencepiece(
    trained: sentencepiece.SentencePieceProcessor, llama: Tokenizer, text: str
) -> None:
    assert llama.encode(text.replace("[PAD]", ""), add_start=False) == trained.encode(
        text.replace("[PAD]", "")
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two",
        "The License",
        "a\n\nb\t",
        "naïve 日本 👩‍👧",
        "x  \ty",
        "\0",
        "1234",
        "y" * 5000,
    ],
)
def test_llama_ids_of_chosen_texts_are_those_of_sentencepiece(
    trained: sentencepiece.SentencePieceProcessor, llama: Tokenizer, text: str
) -> None:
    assert llama.encode(text, add_start=False) == trained.encode(text)
    assert llama.encode(text, add_start=True) == [1, *trained.encode(text)]


@given(any_text)
@example("  \t \u00a0 12<|")
@settings(deadline=None)
def test_byte_level_text_comes_back_as_it_went_in(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text, add_start=True)) == text


@pytest.mark.parametrize("pre", ["default", "gpt-2", "llama-bpe", "qwen2"])
def test_text_comes_back_whatever_cuts_it(pre: str) -> None:
    tokenizer = load(gguf(byte_level(pre=pre, add_bos_token=False)))

    @given(any_text)
    @example("e\u0301 \u212b 1234567\r\n  \u3000it'S '\u017f")
    @settings(deadline=None, max_examples=50)
    def holds(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text, add_start=True)) == text

    holds()


@given(any_text.filter(lambda text: "\u2581" not in text))
@example(" one")
@settings(deadline=None)
def test_llama_text_comes_back_as_it_went_in(llama: Tokenizer, text: str) -> None:
    assert llama.decode(llama.encode(text, add_start=True)) == text


def test_the_first_space_of_an_answer_to_a_bare_prompt_is_kept(llama: Tokenizer) -> None:
    ids = llama.encode("License", add_start=False)
    assert llama.decode(ids) == "License"
    assert llama.decode(ids, continues=True) == " License"


def test_an_unknown_token_may_be_called_a_control_token(
    trained: sentencepiece.SentencePieceProcessor, llama: Tokenizer
) -> None:
    """As llama.cpp's converter does where a folder's JSON says that <unk> is special."""
    metadata: dict[str, Any] = dict(sentence_pieces(trained))
    kinds = list(metadata["tokenizer.ggml.token_type"])
    assert kinds[0] == 2
    tokenizer = load(gguf(sentence_pieces(trained, token_type=numbers([3, *kinds[1:]]))))
    text = "The License <unk> 日本"
    ids = tokenizer.encode(text, add_start=False)
    assert ids == llama.encode(text, add_start=False)
    assert tokenizer.decode([0, *ids]) == text


def test_an_added_word_with_spaces_comes_out_of_text(
    trained: sentencepiece.SentencePieceProcessor,
) -> None:
    metadata: dict[str, Any] = dict(sentence_pieces(trained))
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[tokens.index("§§")] = "two words "
    tokenizer = load(gguf(metadata | {"tokenizer.ggml.tokens": tuple(tokens)}))
    ids = tokenizer.encode("the two words §", add_start=False)
    assert "two words " in names(tokenizer, ids)
    assert tokenizer.decode(ids) == "the two words §"


def test_a_vocabulary_can_forbid_the_first_space(
    trained: sentencepiece.SentencePieceProcessor,
) -> None:
    tokenizer = load(gguf(sentence_pieces(trained, add_space_prefix=False)))
    assert tokenizer.decode(tokenizer.encode(" a", add_start=True)) == " a"
    assert tokenizer.encode("a", add_start=False) == [trained.piece_to_id("a")]


@given(st.lists(st.integers(0, 255), max_size=24))
@example([0xF0, 0x9F, 0x98, 0x80])
@example([0xF0, 0x9F])
@example([0xF0, 0x90, 0x41, 0xC3, 0xE2, 0x82])
@example([0xED, 0xA0, 0x80, 0xFF])
@settings(deadline=None)
def test_a_stream_gives_the_text_of_the_whole(bpe: Tokenizer, data: list[int]) -> None:
    decoder = bpe.decoder()
    pieces = [decoder.push(byte) for byte in data]
    text = "".join([*pieces, decoder.finish()])
    assert text == bpe.decode(data) == bytes(data).decode("utf-8", "replace")


@given(any_text)
@settings(deadline=None)
def test_a_stream_of_valid_text_has_no_broken_character(bpe: Tokenizer, text: str) -> None:
    decoder = bpe.decoder()
    pieces = [decoder.push(i) for i in bpe.encode(text, add_start=False)]
    assert "".join(pieces) == text
    assert decoder.finish() == ""


def test_an_emoji_comes_with_its_last_byte(either: Tokenizer) -> None:
    decoder = either.decoder(continues=True)
    ids = either.encode("😀", add_start=False)[-4:]
    assert [decoder.push(i) for i in ids] == ["", "", "", "😀"]


@pytest.mark.parametrize(
    "text", [START, f"a{END}b", "</s>", "<s>", "<unk>", "[PAD]", "<tool>", "<0x41>"]
)
def test_no_special_token_comes_out_of_a_text(either: Tokenizer, text: str) -> None:
    ids = either.encode(text, add_start=False)
    assert not set(ids) & {either.start_id, *either.end_ids}
    assert not {either.name(i) for i in ids} & {
        START,
        END,
        "<s>",
        "</s>",
        "<unk>",
        "[PAD]",
        "<tool>",
    }
    assert either.decode(ids) == text


def test_added_letters_may_come_out_of_a_text(bpe: Tokenizer, llama: Tokenizer) -> None:
    assert FILLER in names(bpe, bpe.encode("a  \tb", add_start=False))
    assert "§§" in names(llama, llama.encode("a§§b", add_start=False))


def test_a_merge_that_would_make_a_special_token_is_refused() -> None:
    tokens = (*BYTE_TOKENS, START, "<|hello")
    kinds = numbers([1] * len(BYTE_TOKENS) + [3, 3])
    with pytest.raises(ModelError, match=r"needs '<\|hello', which is no plain token"):
        load(
            gguf(
                byte_level(
                    tokens=tokens,
                    token_type=kinds,
                    merges=(*MERGES, "<| hello"),
                    bos_token_id=None,
                    eos_token_id=None,
                )
            )
        )


def test_a_templates_special_tokens_count_and_a_persons_do_not(bpe: Tokenizer) -> None:
    ids = bpe.encode_template([(f"{START}user\n", True), (f"{END}{START}", False), (END, True)])
    start, end = bpe.start_id, next(iter(bpe.end_ids))
    assert [i for i in ids if i in (start, end)] == [start, end]
    assert (ids[0], ids[-1]) == (start, end)
    assert bpe.decode(ids) == f"user\n{END}{START}"


def test_borders_between_template_and_content_leave_no_trace(bpe: Tokenizer) -> None:
    whole = bpe.encode("hello world", add_start=False)
    assert bpe.encode_template([("he", True), ("llo w", False), ("orld", True)]) == whole


def test_a_special_token_across_a_border_is_plain(bpe: Tokenizer) -> None:
    ids = bpe.encode_template([("<|im_", True), ("start|>", False)])
    assert bpe.start_id not in ids


def test_a_template_gets_one_start_token(llama: Tokenizer) -> None:
    with_it = llama.encode_template([("<s>The ", True), ("License", False)])
    assert with_it == llama.encode_template([("The ", True), ("License", False)])
    assert with_it.count(1) == 1
    assert with_it == llama.encode("The License", add_start=True)


def test_ends_are_what_the_file_names_and_what_everyone_knows() -> None:
    tokens = (*BYTE_TOKENS, START, END, "<|endoftext|>", "<|other|>")
    kinds = numbers([1] * len(BYTE_TOKENS) + [3, 3, 3, 3])
    metadata = byte_level(
        tokens=tokens, token_type=kinds, eos_token_id=None, eot_token_id=tokens.index("<|other|>")
    )
    tokenizer = load(gguf(metadata))
    assert names(tokenizer, sorted(tokenizer.end_ids)) == [END, "<|endoftext|>", "<|other|>"]


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_a_token_that_is_not_there_is_refused(either: Tokenizer, token_id: int) -> None:
    with pytest.raises(UsageError, match=f"token {token_id}: 0 to"):
        either.decode([token_id])
    with pytest.raises(UsageError, match=f"token {token_id}: 0 to"):
        either.name(token_id)


def test_half_a_surrogate_pair_is_refused(either: Tokenizer) -> None:
    with pytest.raises(UsageError, match="half a pair at letter 2"):
        either.encode("ab\ud800", add_start=False)
    with pytest.raises(UsageError, match="half a pair"):
        either.encode_template([("\udfff", False)])


@pytest.mark.parametrize("key", ["model", "tokens", "token_type", "merges"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ModelError, match=f"missing metadata key tokenizer.ggml.{key}"):
        load(gguf(byte_level(**{key: None})))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": "rwkv"}, r"tokenizer.ggml.model 'rwkv' is not supported \(gpt2, llama\)"),
        ({"tokens": ()}, "has 0 tokens, expected 1 to"),
        ({"tokens": tuple("abc")}, "token_type has 271 elements for 3 tokens"),
        ({"token_type": numbers([1] * 270 + [9])}, r"token 270 \('<tool>'\) is of the type 9"),
        ({"bos_token_id": 271}, "bos_token_id is 271, expected 0 to 270"),
        ({"eot_token_id": -1}, "eot_token_id is -1, expected 0 to 270"),
        ({"eos_token_id": "x"}, "expected a whole number"),
        ({"add_bos_token": True, "bos_token_id": None}, "bos_token_id is missing"),
        ({"merges": ("h e x",)}, "the merge 'h e x' does not name two tokens"),
        ({"merges": ("he",)}, "the merge 'he' does not name two tokens"),
        ({"merges": ("q q",)}, "the merge 'q q' needs 'qq', which is no plain token"),
        ({"tokens": (*BYTE_TOKENS, "a", "b", "c", "d")}, "has the token 'a' 2 times"),
    ],
)
def test_a_contradiction_in_the_vocabulary_is_named(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        load(gguf(byte_level(**changed)))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"scores": None}, "missing metadata key tokenizer.ggml.scores"),
        ({"scores": memoryview(array("f", [0.0]))}, "scores has 1 elements for 600 tokens"),
        ({"token_type": numbers([1] * 600)}, "0 tokens of the type unknown, expected 1"),
        ({"token_type": numbers([2] + [1] * 598 + [6])}, "the byte token '.*' is not one of"),
        ({"token_type": numbers([2, 1, 1, 1, 1, 6] + [1] * 594)}, "1 byte tokens, expected 256"),
    ],
)
def test_a_contradiction_in_llamas_vocabulary_is_named(
    trained: sentencepiece.SentencePieceProcessor, changed: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        load(gguf(sentence_pieces(trained, **changed)))


def test_a_vocabulary_of_another_size_than_the_model_is_refused() -> None:
    embedding = TensorInfo("token_embd.weight", "f32", (270, 4), 0, 4320)
    with pytest.raises(ModelError, match="the tokenizer has 271 tokens, the model 270"):
        load(gguf(byte_level(), {"token_embd.weight": embedding}))
    claimed: dict[str, Value] = {"general.architecture": "bert", "bert.vocab_size": 300}
    with pytest.raises(ModelError, match="the tokenizer has 271 tokens, the model 300"):
        load(gguf(byte_level() | claimed))


@pytest.mark.parametrize("library", ["tokenizers", "sentencepiece"])
def test_a_missing_library_is_one_line_with_the_install_to_type(
    library: str,
    trained: sentencepiece.SentencePieceProcessor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real_import = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == library:
            raise ModuleNotFoundError(name)
        return real_import(name, *rest)

    metadata = byte_level() if library == "tokenizers" else sentence_pieces(trained)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=f"package {library}") as refusal:
        load(gguf(metadata))
    assert refusal.value.remedy == "pip install 'potluck[server]'"


def test_the_chat_template_is_the_files() -> None:
    assert load(gguf(byte_level())).chat_template is None
    with_one = byte_level() | {"tokenizer.chat_template": "{{ messages }}"}
    assert load(gguf(with_one)).chat_template == "{{ messages }}"


def test_smollm2_cuts_text_as_other_programs_do(smollm2: Path) -> None:
    started = time.monotonic()
    tokenizer = load(read(smollm2))
    assert time.monotonic() - started < 1.0  # 0.2 s here; people wait for it at each start
    text = "Hello world, it's 2026!\n\n  Fine."
    # As llama.cpp cuts it; 3,000 random texts were compared by hand, without a difference.
    ids = [19556, 905, 28, 357, 506, 216, 34, 32, 34, 38, 17, 8866, 22939, 30]
    assert tokenizer.encode(text, add_start=True) == ids
    assert tokenizer.decode(ids) == text
    turn = tokenizer.encode_template([("<|im_start|>user\n", True), ("<|im_end|>", False)])
    assert turn == [1, 4093, 198, 44, 108, 306, 79, 486, 108, 46]


def test_encoding_a_long_text_lets_other_threads_run(either: Tokenizer) -> None:
    """Fails if encoding holds the GIL: then the only pause is as long as the whole work."""
    may_begin, has_ended = threading.Event(), threading.Event()

    def work() -> None:
        may_begin.wait()
        either.encode("hello world 12 " * 100_000, add_start=False)
        has_ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    started = last = time.perf_counter()
    longest = 0.0
    may_begin.set()
    while not has_ended.is_set():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    thread.join()
    assert longest < (last - started) / 2
