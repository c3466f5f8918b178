"""What an answer is made with when little is asked for."""

from __future__ import annotations

from coordinator.inference import sampling_of
from potluck.replies import AnswerOptions
from potluck.rpc.messages import options_message


def test_nothing_asked_for_is_sampled_as_people_are_used_to() -> None:
    sampling = sampling_of(options_message(None), vocab=49152)
    assert (sampling.temperature, sampling.top_k) == (0.8, 40)
    assert (sampling.top_p, sampling.min_p) == (0.95, 0.05)


def test_what_is_switched_off_stays_off() -> None:
    plain = AnswerOptions(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    sampling = sampling_of(options_message(plain), vocab=49152)
    assert (sampling.temperature, sampling.top_k) == (0.0, 0)
    assert (sampling.top_p, sampling.min_p) == (1.0, 0.0)


def test_the_default_never_passes_a_small_vocabulary() -> None:
    assert sampling_of(options_message(None), vocab=17).top_k == 17


def test_unlike_requests_draw_unlike_seeds() -> None:
    seeds = {sampling_of(options_message(None), vocab=100).seed for _ in range(8)}
    assert len(seeds) == 8
