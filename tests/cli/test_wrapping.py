"""Line breaks in a streamed answer: only between words, and nothing is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from potluck.cli.wrapping import Wrapper


def wrapped(text: str, width: int, cuts: int = 1) -> str:
    wrapper = Wrapper(width)
    pieces = [text[i : i + cuts] for i in range(0, len(text), cuts)]
    return "".join(wrapper.push(piece) for piece in pieces) + wrapper.finish()


def test_a_word_that_would_cross_the_edge_begins_the_next_line() -> None:
    assert wrapped("the quick brown fox", 10) == "the quick\nbrown fox"


def test_a_word_is_written_when_its_end_is_known() -> None:
    wrapper = Wrapper(10)
    written = [wrapper.push(piece) for piece in ("pot", "luck", " is", " n", "ice")]
    assert written == ["", "", "potluck", " is", ""]
    assert wrapper.finish() == "\nnice"


def test_breaks_and_indents_of_the_answer_stay() -> None:
    code = "if x:\n    return 1\n\n- a\n"
    assert wrapped(code, 40) == code


def test_a_wide_character_takes_two_columns() -> None:
    assert wrapped("料理 料理", 8) == "料理\n料理"
    assert wrapped("料理 料理", 9) == "料理 料理"


def test_without_a_terminal_nothing_is_broken() -> None:
    text = "word " * 100 + "end"
    assert wrapped(text, 0) == text


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 12), st.integers(1, 7))
def test_only_blanks_become_line_breaks(text: str, width: int, cuts: int) -> None:
    assert wrapped(text, width, cuts).split() == text.split()


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 12), st.integers(2, 7))
def test_how_the_text_was_cut_changes_nothing(text: str, width: int, cuts: int) -> None:
    assert wrapped(text, width, cuts) == wrapped(text, width)
