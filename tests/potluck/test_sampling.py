"""Sampling against a plain reference, and each setting shown to take effect."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck import sampling
from potluck.errors import FrameError, UsageError
from potluck.rpc.v1 import types_pb2
from potluck.sampling import Logits, Pick, Sampling, pick, uniform


def f32(values: Sequence[float]) -> Logits:
    return np.array(values, dtype=np.float32)


class PlainMaths:
    """Exponentials one value at a time, so that the reference can repeat them exactly."""

    def exp(self, values: Any, out: Any) -> None:
        np.asarray(out)[:] = [math.exp(x) for x in values]

    def log_sum_exp(self, logits: Any) -> float:
        return math.log(math.fsum(math.exp(x) for x in logits))


class NumpyMaths(PlainMaths):
    """Fast enough for large vocabularies."""

    def exp(self, values: Any, out: Any) -> None:
        np.exp(np.asarray(values), out=np.asarray(out))

    def log_sum_exp(self, logits: Any) -> float:
        wide = np.asarray(logits).astype(np.float64)
        return float(np.log(np.exp(wide - wide.max()).sum()) + wide.max())


def reference(logits: list[float], s: Sampling, position: int, tokens: Sequence[int]) -> Pick:
    """Lists and loops only; rounds to f32 where the contract says so."""
    raw = [float(np.float32(x)) for x in logits]
    changed = list(raw)
    for token in set(tokens):
        x = raw[token]
        x = x / s.repetition_penalty if x > 0 else x * s.repetition_penalty
        count = list(tokens[s.prompt_tokens :]).count(token)
        x -= s.presence_penalty * (count > 0) + s.frequency_penalty * count
        changed[token] = float(np.float32(x))
    for token in s.refused_ids:
        changed[token] = -math.inf
    order = sorted(range(len(raw)), key=lambda i: (-changed[i], i))
    token = order[0]
    if s.temperature > 0:
        token = drawn(changed, order, s, position)
    if s.logprobs is None:
        return Pick(token)
    log_sum = PlainMaths().log_sum_exp(raw)
    ranked = sorted(range(len(raw)), key=lambda i: (-raw[i], i))[: s.logprobs]
    top = tuple((i, float(np.float32(raw[i] - log_sum))) for i in ranked)
    return Pick(token, float(np.float32(raw[token] - log_sum)), top)


def drawn(changed: list[float], order: list[int], s: Sampling, position: int) -> int:
    weights: dict[int, float] = {}
    for i in order:
        scaled = (changed[i] - changed[order[0]]) / s.temperature
        weights[i] = (
            float(np.float32(math.exp(float(np.float32(scaled))))) if scaled > -104 else 0.0
        )
    if 0 < s.top_k < len(order):
        order = order[: s.top_k]
        total = running(weights[i] for i in order)[-1]
    else:
        total = running(weights[i] for i in range(len(changed)))[-1]
    sums = running(weights[i] for i in order)
    ends = []
    if s.top_p < 1:
        ends.append(next((n for n, x in enumerate(sums, 1) if x >= s.top_p * total), len(order)))
    if s.min_p > 0:
        ends.append(sum(weights[i] >= s.min_p * weights[order[0]] for i in order))
    if ends:
        order, total = order[: min(ends)], sums[min(ends) - 1]
    u = uniform(s.seed, position)
    alive = [i for i in order if weights[i] > 0]
    return next((i for i, x in zip(order, sums, strict=False) if x > u * total), alive[-1])


def running(values: Any) -> list[float]:
    sums, total = [], 0.0
    for x in values:
        total += x
        sums.append(total)
    return sums


# Few distinct values: ties are the rule and not the exception.
LOGIT = st.sampled_from([-30.0, -2.5, -1.0, 0.0, 0.5, 1.0, 3.25]) | st.floats(-40, 40, width=32)
VOCAB = 24
SETTINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-300, 0.01, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, VOCAB - 1, VOCAB, 1000]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
    presence_penalty=st.sampled_from([-1.0, 0.0, 0.5]),
    frequency_penalty=st.sampled_from([-0.5, 0.0, 0.25]),
    seed=st.integers(0, 2**63 - 1),
    logprobs=st.none() | st.integers(0, 20),
    prompt_tokens=st.integers(0, 8),
    prompt_logprobs=st.none() | st.integers(0, 20),
    refused_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
)


@settings(max_examples=600, deadline=None)
@given(
    st.lists(LOGIT, min_size=VOCAB, max_size=VOCAB),
    SETTINGS,
    st.lists(st.integers(0, VOCAB - 1), max_size=12),
    st.sampled_from([1, 5, 64]),
)
def test_a_pick_equals_the_plain_reference(
    logits: list[float], s: Sampling, tokens: list[int], first_sorted: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_FIRST_SORTED", first_sorted)
        array = np.array(logits, dtype=np.float32)
        got = pick(array, s, len(tokens), tokens, PlainMaths())
    assert got == reference(logits, s, len(tokens), tokens)
    assert array.tolist() == [float(np.float32(x)) for x in logits]  # untouched


def large(seed: int = 0, vocab: int = 49152) -> Logits:
    return (np.random.default_rng(seed).normal(size=vocab) * 3).astype(np.float32)


def test_sorting_a_prefix_changes_no_pick(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        Sampling(temperature=t, top_p=p, min_p=m, seed=seed)
        for t in (0.3, 1.0, 2.0)
        for p in (0.5, 0.999, 1.0)
        for m in (0.0, 1e-6)
        for seed in range(5)
    ]
    logits = large(vocab=20_000)
    lazy = [pick(logits, s, 7, (), NumpyMaths()) for s in cases]
    monkeypatch.setattr(sampling, "_FIRST_SORTED", 10**9)
    assert lazy == [pick(logits, s, 7, (), NumpyMaths()) for s in cases]
    assert len(set(lazy)) > 20  # the cases do vary


def share(s: Sampling, logits: Sequence[float], tokens: Sequence[int] = (), n: int = 2000) -> Any:
    """How often each token is picked at n positions."""
    array = np.array(logits, dtype=np.float32)
    counts = Counter(pick(array, s, i, tokens, PlainMaths()).token for i in range(n))
    return {token: count / n for token, count in counts.items()}


def test_temperature_one_draws_from_the_softmax() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.2)]
    got = share(Sampling(temperature=1), logits)
    assert got == {
        0: pytest.approx(0.5, abs=0.04),
        1: pytest.approx(0.3, abs=0.04),
        2: pytest.approx(0.2, abs=0.04),
    }


def test_a_higher_temperature_flattens_and_a_lower_sharpens() -> None:
    logits = [1.0, 0.0, -1.0]
    shares = [share(Sampling(temperature=t), logits)[0] for t in (0.3, 1.0, 2.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[2] < 0.55


def test_greedy_takes_the_smallest_id_among_equals() -> None:
    assert pick(f32([0, 5, 5, 1]), Sampling(), 0, (), PlainMaths()).token == 1


def test_top_k_leaves_k_tokens_and_the_smaller_id_among_equals() -> None:
    assert set(share(Sampling(temperature=1, top_k=2), [0, 3, 3, 3])) == {1, 2}


def test_top_p_leaves_the_shortest_prefix_that_reaches_it() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.2)]
    assert set(share(Sampling(temperature=1, top_p=0.6), logits)) == {0, 1}
    assert set(share(Sampling(temperature=1, top_p=0.4), logits)) == {0}


def test_top_p_counts_what_top_k_left() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.3)]
    assert set(share(Sampling(temperature=1, top_k=2, top_p=0.55), logits)) == {0}


def test_min_p_is_relative_to_the_most_likely() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.2)]
    assert set(share(Sampling(temperature=1, min_p=0.5), logits)) == {0, 1}


def test_repetition_penalty_covers_prompt_and_answer_and_both_signs() -> None:
    s = Sampling(repetition_penalty=2.0, prompt_tokens=1)
    assert pick(f32([4.0, 3.0]), s, 1, [0], PlainMaths()).token == 1
    assert pick(f32([-2.0, -3.0]), s, 1, [0], PlainMaths()).token == 1


def test_presence_and_frequency_penalties_cover_the_answer_only() -> None:
    logits = f32([4.0, 3.0])
    presence = Sampling(presence_penalty=1.5, prompt_tokens=2)
    assert pick(logits, presence, 2, [0, 0], PlainMaths()).token == 0
    assert pick(logits, presence, 3, [1, 1, 0], PlainMaths()).token == 1
    frequency = Sampling(frequency_penalty=0.6)
    assert pick(logits, frequency, 1, [0], PlainMaths()).token == 0
    assert pick(logits, frequency, 2, [0, 0], PlainMaths()).token == 1


def test_refused_ids_are_never_picked() -> None:
    logits = [9.0, 1.0, 0.0]
    assert pick(f32(logits), Sampling(refused_ids=(0,)), 0, (), PlainMaths()).token == 1
    assert 0 not in share(Sampling(temperature=2, refused_ids=(0,)), logits)
    with pytest.raises(UsageError, match="no token"):
        pick(f32(logits), Sampling(refused_ids=(0, 1, 2)), 0, (), PlainMaths())


def test_the_draw_depends_on_seed_and_position_and_nothing_else() -> None:
    s, logits = Sampling(temperature=1, seed=11), large()
    ids = [pick(logits, s, i, (), NumpyMaths()).token for i in range(30)]
    assert ids == [pick(logits, s, i, (), NumpyMaths()).token for i in range(30)]
    assert len(set(ids)) > 10
    assert ids != [pick(logits, replace(s, seed=12), i, (), NumpyMaths()).token for i in range(30)]


def test_draws_are_philox_as_numpy_has_it() -> None:
    def numpys(seed: int, position: int) -> float:
        # numpy raises the counter before it makes a block.
        block = position - 1 & 2**256 - 1
        words = [block >> 64 * i & 2**64 - 1 for i in range(4)]
        generator = np.random.Philox(
            key=np.array([seed, 0], dtype=np.uint64), counter=np.array(words, dtype=np.uint64)
        )
        return float(int(generator.random_raw()) >> 11) * 2.0**-53

    for seed, position in [(0, 0), (1, 2), (2**63 - 1, 2**32 - 1), (12345, 678)]:
        assert uniform(seed, position) == numpys(seed, position)
    assert uniform(0, 0) == 0.08723912359911234


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = f32([math.log(0.5), math.log(0.3), math.log(0.2)])
    plain = pick(logits, Sampling(logprobs=2), 0, (), PlainMaths())
    assert [token for token, _ in plain.top] == [0, 1]
    assert [math.exp(x) for _, x in plain.top] == pytest.approx([0.5, 0.3], abs=1e-6)
    assert plain.logprob == plain.top[0][1]
    bent = Sampling(logprobs=2, temperature=0.1, top_k=1, repetition_penalty=5, refused_ids=(0,))
    other = pick(logits, bent, 1, [1], PlainMaths())
    assert other.token in (1, 2)
    assert other.top == plain.top
    assert other.logprob == pytest.approx(math.log((0, 0.3, 0.2)[other.token]), abs=1e-6)


def test_a_known_token_is_scored_as_a_picked_one() -> None:
    logits = large()
    picked = pick(logits, Sampling(logprobs=3), 7, (), NumpyMaths())
    bent = Sampling(prompt_logprobs=3, temperature=0.5, repetition_penalty=5, refused_ids=(9,))
    assert sampling.score(logits, picked.token, bent, 7, NumpyMaths()) == picked
    third = picked.top[2]
    assert sampling.score(logits, third[0], Sampling(), 7, NumpyMaths()) == Pick(*third)
    logits[777] = math.nan
    with pytest.raises(FrameError, match="position 7"):
        sampling.score(logits, 3, Sampling(), 7, NumpyMaths())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad: float, temperature: float) -> None:
    logits = large()
    logits[777] = bad
    with pytest.raises(FrameError, match="position 5"):
        pick(logits, Sampling(temperature=temperature), 5, (), NumpyMaths())


def test_penalties_refuse_ids_outside_the_vocabulary() -> None:
    with pytest.raises(UsageError, match="0 to 1"):
        pick(f32([1, 2]), Sampling(repetition_penalty=2), 1, [2], PlainMaths())
    with pytest.raises(UsageError, match="refused_ids"):
        pick(f32([1, 2]), Sampling(refused_ids=(2,)), 1, [0], PlainMaths())


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("temperature", 7, "temperature: 0 to 2, not 7"),
        ("temperature", math.nan, "temperature: 0 to 2, not nan"),
        ("temperature", -0.5, "temperature: 0 to 2, not -0.5"),
        ("temperature", True, "temperature: 0 to 2, not True"),
        ("top_p", 0.0, "top_p: above 0, to 1, not 0"),
        ("top_p", 2, "top_p: above 0, to 1, not 2"),
        ("top_k", -1, "top_k: 0 to 2147483647, not -1"),
        ("top_k", 1.5, "top_k: 0 to 2147483647, not 1.5"),
        ("min_p", 1.1, "min_p: 0 to 1, not 1.1"),
        ("repetition_penalty", 1e30, "repetition_penalty: 0.1 to 10, not 1e+30"),
        ("presence_penalty", -3, "presence_penalty: -2 to 2, not -3"),
        ("frequency_penalty", math.inf, "frequency_penalty: -2 to 2, not inf"),
        ("seed", -1, "seed: 0 to 9223372036854775807, not -1"),
        ("seed", 2**63, "seed: 0 to 9223372036854775807, not 9223372036854775808"),
        ("logprobs", 21, "logprobs: 0 to 20, not 21"),
        ("prompt_logprobs", 21, "prompt_logprobs: 0 to 20, not 21"),
        ("prompt_tokens", "3", "prompt_tokens: 0 to 4294967295, not '3'"),
        ("refused_ids", tuple(range(1025)), "refused_ids: at most 1024, not 1025"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(field: str, value: Any, text: str) -> None:
    with pytest.raises(UsageError) as error:
        Sampling(**{field: value})
    assert error.value.message == text


def test_some_ranges_need_the_vocabulary() -> None:
    Sampling(top_k=10, refused_ids=(9,)).check_vocab(10)
    with pytest.raises(UsageError, match="top_k: 0 to 10, not 11"):
        Sampling(top_k=11).check_vocab(10)
    with pytest.raises(UsageError, match="ids are 0 to 9, not 10"):
        Sampling(refused_ids=(10,)).check_vocab(10)


@given(SETTINGS)
def test_settings_survive_the_wire(s: Sampling) -> None:
    assert sampling.from_message(sampling.to_message(s)) == s


def test_zeros_on_the_wire_switch_filters_off() -> None:
    assert sampling.from_message(types_pb2.Sampling()) == Sampling()


def test_a_pick_costs_little_beside_a_step() -> None:
    """Bounds ten times what was measured (0.004, 0.06 ms): they catch a sort of the vocabulary."""
    tokens: npt.NDArray[np.int32] = np.arange(2000, dtype=np.int32)
    filtered = Sampling(temperature=0.8, top_k=40, top_p=0.95)
    for s, seconds in [(Sampling(), 0.0001), (filtered, 0.001)]:
        logits, best = large(), math.inf
        for i in range(20):
            start = time.perf_counter()
            pick(logits, s, i, tokens, NumpyMaths())
            best = min(best, time.perf_counter() - start)
        assert best < seconds
