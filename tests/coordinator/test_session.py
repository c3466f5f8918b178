"""One token timeline."""

from __future__ import annotations

import pytest

from coordinator.session import Ending, Session, SessionId
from potluck.errors import StepError
from potluck.sampling import Sampling


def session(prompt: int = 3, max_tokens: int = 2, end: int | None = 99) -> Session:
    ends = frozenset() if end is None else frozenset({end})
    return Session(SessionId(1), range(10, 10 + prompt), max_tokens, Sampling(), ends)


def read(s: Session) -> Session:
    s.advance(s.n_computed, s.n_prompt - s.n_computed)
    return s


def test_a_new_session_has_its_prompt_to_read() -> None:
    s = session(prompt=3, max_tokens=2)
    assert (s.is_live, s.is_reading, s.n_answer, s.room_tokens) == (True, True, 0, 5)


def test_rows_advance_a_session_without_gaps() -> None:
    s = session(prompt=3)
    s.advance(0, 2)
    s.advance(2, 1)
    assert not s.is_reading
    with pytest.raises(StepError, match="3 positions and rows of 5"):
        s.advance(5, 1)


def test_a_pick_becomes_the_next_token() -> None:
    s = read(session())
    assert s.push(3, 42)
    assert (s.tokens[-1], s.n_answer, s.is_live) == (42, 1, True)


@pytest.mark.parametrize("position", [2, 4])
def test_a_pick_for_another_position_is_refused(position: int) -> None:
    s = read(session())
    with pytest.raises(StepError, match=f"awaits position 3 and was given {position}"):
        s.push(position, 42)
    assert s.n_answer == 0


def test_a_pick_before_the_prompt_is_read_is_refused() -> None:
    with pytest.raises(StepError):
        session().push(3, 42)


def test_the_end_token_ends_the_answer_and_is_not_part_of_it() -> None:
    s = read(session(end=99))
    assert not s.push(3, 99)
    assert (s.ending, s.n_answer) == (Ending.STOP, 0)


def test_an_ignored_end_token_is_a_token_like_any_other() -> None:
    s = read(session(end=None))
    assert s.push(3, 99)
    assert s.is_live


def test_max_tokens_end_the_answer() -> None:
    s = read(session(max_tokens=2))
    s.push(3, 1)
    s.advance(3, 1)
    s.push(4, 2)
    assert (s.ending, s.n_answer) == (Ending.LENGTH, 2)


def test_the_first_ending_stays() -> None:
    s = session()
    s.end(Ending.STOP)
    s.end(Ending.GIVEN_UP)
    assert s.ending is Ending.STOP
