"""What a person may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.request import check_model, checked
from potluck.errors import ContextExceeded, UnknownModel, UsageError
from potluck.sampling import Sampling


def ask(prompt: list[int], max_tokens: int = 0, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "ends_at": frozenset({2}),
        "continues": True,
        "context_tokens": 16,
        "vocab": 100,
        "sampling": Sampling(),
        **changes,
    }
    return checked(prompt, max_tokens, given.pop("sampling"), given.pop("stops", ()), **given)


def test_zero_max_tokens_are_all_that_the_context_has_room_for() -> None:
    assert ask([1] * 10).max_tokens == 6


def test_prompt_and_answer_may_fill_the_context() -> None:
    assert ask([1] * 10, 6).max_tokens == 6


def test_sampling_learns_where_the_answer_begins() -> None:
    assert ask([1] * 10, 1).sampling.prompt_tokens == 10


def test_an_answer_beyond_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(ContextExceeded, match=r"prompt has 10 tokens and max_tokens is 7; .* 16"):
        ask([1] * 10, 7)


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers() -> None:
    with pytest.raises(ContextExceeded, match=r"prompt has 1,600 tokens; the context is 16"):
        ask([1] * 1600)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        ask([])


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="token 100: the model has tokens 0 to 99"):
        ask([1, 100])


def test_top_k_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="top_k"):
        ask([1], sampling=Sampling(top_k=101))


def test_stop_texts_are_checked() -> None:
    with pytest.raises(UsageError, match="stop"):
        ask([1], stops=[""])


def test_the_served_model_is_found_by_its_name_and_without_one() -> None:
    check_model("", "smollm2")
    check_model("smollm2", "smollm2")
    with pytest.raises(UnknownModel, match="'7b'"):
        check_model("7b", "smollm2")
