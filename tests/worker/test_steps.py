"""Numbers of steps and the memory of answers."""

from __future__ import annotations

import pytest

from potluck.errors import FrameError, StepError, UsageError
from potluck.rpc.v1 import types_pb2, worker_pb2
from worker.steps import Arrival, Remembered, StepOrder, check_batch


def test_steps_come_in_order_from_one() -> None:
    order = StepOrder(3)
    assert order.check(3, 1) is Arrival.NEXT
    order.accept(3, 1)
    assert order.check(3, 1) is Arrival.REPEAT
    assert order.check(3, 2) is Arrival.NEXT


def test_a_gap_is_refused_and_changes_nothing() -> None:
    order = StepOrder(1)
    with pytest.raises(StepError, match="step 2 came, step 1 is next"):
        order.check(1, 2)
    assert order.check(1, 1) is Arrival.NEXT


def test_a_new_epoch_starts_at_step_one_and_ends_the_old() -> None:
    order = StepOrder(1)
    order.accept(1, 1)
    with pytest.raises(StepError, match="step 1 is next"):
        order.check(2, 2)
    order.accept(2, 1)
    assert order.check(1, 2) is Arrival.STALE
    assert order.check(2, 2) is Arrival.NEXT


@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (1, 0)])
def test_zeros_are_refused(epoch: int, step: int) -> None:
    with pytest.raises(UsageError, match="counted from 1"):
        StepOrder(1).check(epoch, step)


def test_memory_is_bounded_by_count_and_bytes_but_keeps_the_newest() -> None:
    kept = Remembered[str](most_messages=3, most_bytes=100)
    for step in range(1, 6):
        kept.keep(1, step, f"answer {step}", 10)
    assert [kept.find(1, step) for step in (2, 3, 5)] == [None, "answer 3", "answer 5"]
    kept.keep(1, 6, "long", 95)
    assert [kept.find(1, step) for step in (5, 6)] == [None, "long"]
    kept.keep(1, 7, "too long", 1000)
    assert [kept.find(1, step) for step in (6, 7)] == [None, "too long"]
    assert kept.find(2, 7) is None


def batch(n_tokens: int, *, activation: bool) -> worker_pb2.Step:
    rows = [types_pb2.Rows(session=1, token_ids=[0] * n_tokens)] if n_tokens else []
    return worker_pb2.Step(
        epoch=1, step=1, rows=rows, activation=types_pb2.Activation() if activation else None
    )


def test_an_activation_stands_where_it_belongs_and_nowhere_else() -> None:
    assert check_batch(batch(3, activation=False), embeds=True) == 3
    assert check_batch(batch(3, activation=True), embeds=False) == 3
    assert check_batch(batch(0, activation=False), embeds=False) == 0
    for n_tokens, activation, embeds in [(3, True, True), (3, False, False), (0, True, False)]:
        with pytest.raises(FrameError):
            check_batch(batch(n_tokens, activation=activation), embeds=embeds)


def test_a_step_has_a_limited_number_of_rows() -> None:
    assert check_batch(batch(512, activation=False), embeds=True) == 512
    with pytest.raises(UsageError, match="513 rows; a step has at most 512"):
        check_batch(batch(513, activation=False), embeds=True)
