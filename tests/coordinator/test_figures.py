"""Speed as people are told it."""

from __future__ import annotations

import pytest

from coordinator.figures import Figures, StageSeconds


def test_tokens_per_second_count_from_the_first_token_of_the_window() -> None:
    figures = Figures()
    for second in range(5):
        figures.note_answer(10, float(second))
    assert figures.tokens_per_second(5.0) == pytest.approx(10.0)
    assert figures.answer_tokens == 50


def test_old_tokens_are_forgotten() -> None:
    figures = Figures()
    figures.note_answer(10, 0.0)
    assert figures.tokens_per_second(11.0) == 0.0


def test_one_token_makes_no_mad_rate() -> None:
    figures = Figures()
    figures.note_answer(1, 5.0)
    assert figures.tokens_per_second(5.0) == 1.0


def test_a_stage_shows_the_median_of_its_decode_steps() -> None:
    figures = Figures()
    figures.begin(1)
    for compute in (1.0, 9.0, 2.0):
        figures.note_step([StageSeconds(compute=compute)], is_decode=True)
    figures.note_step([StageSeconds(compute=50.0)], is_decode=False)
    assert figures.stage_seconds(0).compute == 2.0
    assert figures.steps == 4


def test_a_new_pipeline_begins_without_timings() -> None:
    figures = Figures()
    figures.begin(1)
    figures.note_step([StageSeconds(wire=1.0)], is_decode=True)
    figures.begin(2)
    assert figures.stage_seconds(1) == StageSeconds()


def test_a_plan_that_still_loads_has_no_timings() -> None:
    assert Figures().stage_seconds(2) == StageSeconds()


def test_timings_that_do_not_name_every_stage_are_left_out() -> None:
    figures = Figures()
    figures.begin(2)
    figures.note_step([StageSeconds(wire=1.0)], is_decode=True)
    assert figures.stage_seconds(0) == StageSeconds()


def test_a_figure_without_steps_is_zero() -> None:
    figures = Figures()
    figures.note_answer(0, 1.0)
    assert figures.tokens_per_second(1.0) == 0.0
