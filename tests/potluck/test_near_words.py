"""Hints at known words, and sizes as people write them."""

from __future__ import annotations

import pytest

from potluck.near_words import nearest
from potluck.written_size import bytes_of


def test_a_near_word_is_offered_and_a_far_one_is_not() -> None:
    assert nearest("memroy", ["memory", "layers"]) == "; did you mean 'memory'?"
    assert nearest("disk_speed", ["memory", "layers"]) == ""


@pytest.mark.parametrize(("text", "n_bytes"), [("12 GiB", 12 * 2**30), ("1.5GB", 1_500_000_000)])
def test_a_size_may_have_a_unit(text: str, n_bytes: int) -> None:
    assert bytes_of(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "12 Gigs", "1e9", "nan", "\u0661 GiB"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="bytes or a size such as '2 GiB'"):
        bytes_of(text)
