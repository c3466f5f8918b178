"""Windows, surprises and what follows from them, against figures computed by hand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.errors import FrameError, UsageError
from potluck.perplexity import (
    Comparison,
    Estimate,
    Tally,
    as_read,
    compare,
    distance,
    first_scored_row,
    n_scored,
    rows_to_read,
    surprise,
    windows_of,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer


class PlainMaths:
    """The functions by the standard library."""

    def exp(self, values: Buffer, out: Buffer) -> None:
        raise AssertionError("nothing here draws")

    def log_sum_exp(self, logits: Buffer) -> float:
        values = np.asarray(logits, np.float32).astype(float)
        largest = values.max()
        return float(largest + math.log(sum(math.exp(x - largest) for x in values)))


def logits_of(*rows: tuple[float, ...]) -> np.ndarray:
    """Rows whose softmax is what is given, each shifted by something else."""
    return np.array(
        [[math.log(p) + 3.0 * i - 1.0 for p in row] for i, row in enumerate(rows)], np.float32
    )


def log_probs(*rows: tuple[float, ...]) -> np.ndarray:
    return np.log(np.array(rows, np.float32))


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def test_a_text_is_cut_into_whole_windows_that_do_not_overlap() -> None:
    assert windows_of(list(range(13)), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert windows_of(list(range(13)), 4, 2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(windows_of(list(range(13)), 4, 100)) == 3


def test_a_text_shorter_than_a_window_is_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match=r"has 1,023 tokens; one window takes 1,024"):
        windows_of([5] * 1023, 1024)


def test_the_start_token_takes_the_place_of_a_windows_first() -> None:
    window = ids(7, 8, 9)
    assert as_read(window, 1).tolist() == [1, 8, 9]
    assert as_read(window, None).tolist() == [7, 8, 9]
    assert window.tolist() == [7, 8, 9]


def test_the_second_half_of_a_window_is_scored_as_llama_cpp_does() -> None:
    assert (first_scored_row(512), n_scored(512)) == (256, 255)
    assert (first_scored_row(7), n_scored(7)) == (3, 3)
    assert (first_scored_row(4), n_scored(4)) == (2, 1)


@given(st.integers(4, 700), st.integers(1, 600), st.integers(1, 400))
def test_each_row_is_read_once_and_each_scored_one_wanted(
    size: int, most_rows: int, most_logits: int
) -> None:
    steps = rows_to_read(size, most_rows, most_logits)
    assert [row for s in steps for row in range(s.start, s.stop)] == list(range(size - 1))
    wanted = [row for s in steps for row in range(s.stop - s.wanted, s.stop)]
    assert wanted == list(range(size // 2, size - 1))
    assert all(s.stop - s.start <= most_rows and s.wanted <= most_logits for s in steps)


def test_a_surprise_is_minus_the_logarithm_of_the_probability() -> None:
    logits = logits_of((0.5, 0.25, 0.25), (0.1, 0.1, 0.8))
    found = surprise(logits, ids(1, 2), PlainMaths())
    assert found.dtype == np.float64
    assert found == pytest.approx([math.log(4), -math.log(0.8)], abs=1e-6)


def test_logits_that_are_not_finite_have_no_surprise() -> None:
    logits = logits_of((0.5, 0.25, 0.25))
    logits[0, 1] = np.nan
    with pytest.raises(FrameError, match="not finite"):
        surprise(logits, ids(0), PlainMaths())


def test_an_estimate_is_a_mean_with_its_standard_error() -> None:
    assert Estimate.of(np.array([1.0, 3.0])) == Estimate(2.0, 1.0)
    assert Estimate.of(np.array([5.0])) == Estimate(5.0, 0.0)
    # mean 4, squares 16 + 4 + 4 + 16 -> variance 10 of 4 samples, over 3
    found = Estimate.of(np.array([0.0, 2.0, 6.0, 8.0]))
    assert (found.value, found.error) == pytest.approx((4.0, math.sqrt(10 / 3)))


def test_perplexity_is_e_to_the_mean_surprise() -> None:
    tally = Tally()
    assert tally.running == math.inf
    tally.add(np.log([2.0, 8.0]))
    tally.add(np.log([4.0]))
    assert tally.n_tokens == 3
    assert tally.running == pytest.approx(4.0)
    assert tally.perplexity.value == pytest.approx(4.0)
    # ln 2, ln 8, ln 4: variance 2/3 ln(2)^2, so an error of ln(2)/sqrt(3), times the perplexity.
    assert tally.perplexity.error == pytest.approx(4 * math.log(2) / math.sqrt(3))


def test_a_model_that_knows_nothing_is_as_surprised_as_its_vocabulary_is_large() -> None:
    tally = Tally()
    tally.add(surprise(np.zeros((5, 421), np.float32), ids(1, 2, 3, 4, 5), PlainMaths()))
    assert (tally.perplexity.value, tally.perplexity.error) == pytest.approx((421, 0), abs=1e-9)


def test_a_divergence_is_the_bases_mean_of_the_logarithms_difference() -> None:
    base, model = (0.5, 0.25, 0.25), (0.25, 0.5, 0.25)
    found = compare(logits_of(model, base), log_probs(base, base), ids(0, 1), PlainMaths())
    assert found.divergence == pytest.approx([0.25 * math.log(2), 0.0], abs=1e-6)
    assert found.surprise == pytest.approx([math.log(4), math.log(4)], abs=1e-6)
    assert found.base_surprise == pytest.approx([math.log(2), math.log(4)], abs=1e-6)
    assert found.probability_change == pytest.approx([-0.25, 0.0], abs=1e-6)
    assert found.is_same_top.tolist() == [False, True]


def test_what_the_base_holds_all_but_impossible_adds_nothing() -> None:
    base = np.array([[0.0, -16.5]], np.float32)  # ln(probability)
    logits = np.array([[0.0, -80.0]], np.float32)
    found = compare(logits, base, ids(0), PlainMaths())
    assert found.divergence[0] == pytest.approx(0.0, abs=1e-9)
    base[0, 1] = -15.5
    found = compare(logits, base, ids(0), PlainMaths())
    assert found.divergence[0] == pytest.approx(math.exp(-15.5) * (80 - 15.5), rel=1e-4)


def random_part(seed: int, n: int) -> Comparison:
    random = np.random.default_rng(seed)
    base = random.gamma(2.0, 1.2, n)
    own = np.abs(base + random.normal(0.02, 0.1, n))
    change = np.exp(-own) - np.exp(-base)
    return Comparison(own, base, random.gamma(1.0, 0.01, n), change, random.random(n) < 0.9)


def test_parts_together_give_the_figures_of_llama_cpp() -> None:
    """Its formulas: errors of each perplexity, and their covariance for the ratio's."""
    parts = [random_part(1, 300), random_part(2, 200)]
    found = distance(parts)
    own, base, kl, change, same = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in (
            "surprise",
            "base_surprise",
            "divergence",
            "probability_change",
            "is_same_top",
        )
    )
    n = len(own)
    covariance = ((own * base).mean() - own.mean() * base.mean()) / (n - 1)
    errors = [math.sqrt((x**2).mean() - x.mean() ** 2) / math.sqrt(n - 1) for x in (own, base)]
    ratio_error = math.sqrt(errors[0] ** 2 + errors[1] ** 2 - 2 * covariance)
    assert found.log_ratio.value == pytest.approx(own.mean() - base.mean())
    assert found.log_ratio.error == pytest.approx(ratio_error, rel=1e-6)
    assert found.ratio.value == pytest.approx(math.exp(own.mean() - base.mean()))
    assert found.base_perplexity.value == pytest.approx(math.exp(base.mean()))
    assert found.base_perplexity.error == pytest.approx(math.exp(base.mean()) * errors[1])
    assert found.divergence.value == pytest.approx(kl.mean())
    assert found.divergence_max == kl.max()
    assert found.divergence_median == np.median(kl)
    assert kl.min() < found.divergence_p99 < kl.max()
    p = same.mean()
    assert found.same_top.value == pytest.approx(p)
    assert found.same_top.error == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    rms = math.sqrt((change**2).mean())
    assert found.change_rms.value == pytest.approx(rms)
    square_error = math.sqrt(((change**4).mean() - (change**2).mean() ** 2) / (n - 1))
    assert found.change_rms.error == pytest.approx(0.5 / rms * square_error)
    assert found.change_mean.value == pytest.approx(change.mean())
