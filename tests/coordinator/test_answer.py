"""Text of an answer: whole characters, stop texts across tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.answer import AnswerText
from potluck.errors import UsageError

WORDS = ["a", "b", "ab", "ba", "é", "stop", "op", "", " ", "ST", "s", "t"]


class Words:
    """A decoder whose token i is WORDS[i]; `tail` is what was held back."""

    def __init__(self, tail: str = "") -> None:
        self.tail = tail

    def push(self, token_id: int, /) -> str:
        return WORDS[token_id]

    def finish(self) -> str:
        return self.tail


def run(text: AnswerText, words: list[str]) -> list[str]:
    """What each token released, and at last what `finish` did; nothing is asked after a stop."""
    out = []
    for word in words:
        out.append(text.push(WORDS.index(word)))
        if text.is_stopped:
            break
    return [*out, text.finish()]


def test_without_stop_texts_text_goes_out_at_once() -> None:
    assert run(AnswerText(Words()), ["a", "", "é"]) == ["a", "", "é", ""]


def test_what_the_decoder_held_back_comes_at_the_end() -> None:
    assert run(AnswerText(Words(tail="\ufffd")), ["a"]) == ["a", "\ufffd"]


def test_a_tail_that_may_become_a_stop_text_is_held_back() -> None:
    text = AnswerText(Words(), ["stop"])
    assert run(text, ["a", "s", "t", "a"]) == ["a", "", "", "sta", ""]
    assert not text.is_stopped


def test_a_stop_text_across_tokens_is_never_sent() -> None:
    text = AnswerText(Words(), ["stop"])
    assert run(text, ["a", "s", "t", "op"]) == ["a", "", "", "", ""]
    assert text.is_stopped


def test_what_stands_before_a_stop_text_in_the_same_token_is_sent() -> None:
    text = AnswerText(Words(), ["top"])
    assert run(text, ["stop"]) == ["s", ""]


def test_what_was_held_back_comes_if_the_answer_ends_there() -> None:
    assert run(AnswerText(Words(), ["stop"]), ["s", "t"]) == ["", "", "st"]


def test_the_stop_text_that_is_complete_first_counts() -> None:
    text = AnswerText(Words(), ["stop", "t"])
    assert run(text, ["stop"]) == ["s", ""]


def test_a_stop_text_may_be_completed_by_what_the_decoder_held_back() -> None:
    text = AnswerText(Words(tail="p"), ["bp"])
    assert run(text, ["ab"]) == ["a", ""]
    assert text.is_stopped


@given(
    words=st.lists(st.sampled_from(WORDS), max_size=30),
    stops=st.lists(st.text("abstop", min_size=1, max_size=4), max_size=3),
)
def test_joined_text_is_the_decoded_answer_up_to_its_first_stop_text(
    words: list[str], stops: list[str]
) -> None:
    text = AnswerText(Words(), stops)
    sent = "".join(run(text, words))
    whole = "".join(words)
    met = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    assert text.is_stopped == bool(met)
    if not met:
        assert sent == whole
    else:
        assert whole.startswith(sent)
        assert not any(stop in sent for stop in stops)
        assert any(whole[len(sent) :].startswith(stop) for stop in stops)


@pytest.mark.parametrize(
    ("stops", "words"),
    [
        (["x"] * 9, "at most 8 texts, not 9"),
        ([""], "1 to 128 bytes, not 0"),
        (["é" * 65], "1 to 128 bytes, not 130"),
    ],
)
def test_stop_texts_out_of_bounds_are_refused(stops: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        AnswerText(Words(), stops)
