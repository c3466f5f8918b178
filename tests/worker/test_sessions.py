"""What a stage runs of a step, alone and against a model of ten lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from potluck.errors import StepError
from potluck.rpc.v1 import types_pb2, worker_pb2
from potluck.sampling import Sampling
from worker.kv import KvBudget, pages_for
from worker.sessions import Sessions, StageLimits, StepWork
from worker.steps import Arrival, StepOrder

VOCAB, CONTEXT, PAGES, PLACES = 10, 64, 6, 3
Command = types_pb2.KvCommand


def new(*, has_head: bool = True) -> Sessions:
    return Sessions("w1", StageLimits(VOCAB, CONTEXT, has_head), KvBudget(PAGES, 100, PLACES))


def opened(session: int, max_tokens: int = 16) -> types_pb2.KvCommand:
    return Command(open=Command.Open(session=session, max_tokens=max_tokens))


def rows(session: int, start: int, tokens: Sequence[int], want: int = 0, **more: Any) -> Any:
    return types_pb2.Rows(
        session=session, start_position=start, token_ids=tokens, want_logits=want, **more
    )


def step(*parts: Any, epoch: int = 1, number: int = 1) -> worker_pb2.Step:
    return worker_pb2.Step(
        epoch=epoch,
        step=number,
        commands=[p for p in parts if isinstance(p, Command)],
        rows=[p for p in parts if isinstance(p, types_pb2.Rows)],
    )


def run(sessions: Sessions, *parts: Any, epoch: int = 1) -> StepWork:
    work = sessions.decide(step(*parts, epoch=epoch))
    sessions.confirm(work.rows)
    return work


def codes(work: StepWork) -> list[tuple[int, str]]:
    assert all(f.worker == "w1" and f.message for f in work.failures)
    return [
        (f.session, types_pb2.FailureCode.Name(f.code).removeprefix("FAILURE_CODE_"))
        for f in work.failures
    ]


def test_a_prompt_and_its_answer_run_in_order() -> None:
    sessions = new()
    work = run(sessions, opened(7), rows(7, 0, [1, 2, 3], 1))
    assert [(r.session, r.start, r.n_tokens, r.first_row) for r in work.rows] == [(7, 0, 3, 0)]
    assert sessions.length(7) == 3
    work = run(sessions, rows(7, 3, [4], 1))
    assert work.rows[0].tokens.tolist() == [1, 2, 3, 4]
    assert not work.failures


def test_rows_are_not_committed_before_they_are_computed() -> None:
    sessions = new()
    sessions.decide(step(opened(1), rows(1, 0, [1, 2])))
    assert sessions.length(1) == 0


def test_rows_at_or_above_a_position_are_overwritten() -> None:
    sessions = new()
    run(sessions, opened(1), rows(1, 0, [1, 2, 3, 4]))
    work = run(sessions, rows(1, 2, [9]))
    assert work.rows[0].tokens.tolist() == [1, 2, 9]
    assert sessions.length(1) == 3


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (rows(9, 0, [1]), (9, "UNKNOWN_SESSION")),
        (rows(1, 4, [1]), (1, "POSITION")),
        (rows(1, 3, [1] * 14), (1, "POSITION")),
        (rows(1, 3, []), (1, "INVALID")),
        (rows(1, 3, [1], 2), (1, "INVALID")),
        (rows(1, 3, [VOCAB]), (1, "INVALID")),
        (rows(1, 3, [2**32 - 1]), (1, "INVALID")),
        (rows(1, 3, [1], 1, sampling=types_pb2.Sampling(temperature=9)), (1, "INVALID")),
        (rows(1, 3, [1, 2], 1, scored_ids=[2, 3]), (1, "INVALID")),
        (rows(1, 3, [1, 2], 2, scored_ids=[2, VOCAB]), (1, "INVALID")),
    ],
)
def test_one_sessions_mistake_fails_no_other(bad: types_pb2.Rows, code: tuple[int, str]) -> None:
    sessions = new()
    run(sessions, opened(1), opened(2), rows(1, 0, [1, 2, 3]), rows(2, 0, [1]))
    work = run(sessions, bad, rows(2, 1, [5]))
    assert codes(work) == [code]
    assert [(r.session, r.place, r.first_row) for r in work.rows] == [(2, 1, len(bad.token_ids))]
    assert (sessions.length(1), sessions.length(2)) == (3, 2)


def test_sampling_is_read_by_the_last_stage_only() -> None:
    wanted = rows(1, 0, [1], 1, sampling=types_pb2.Sampling(temperature=0.5, seed=3))
    assert run(new(), opened(1), wanted).rows[0].sampling == Sampling(temperature=0.5, seed=3)
    work = run(new(has_head=False), opened(1), wanted)
    assert work.rows[0].sampling == Sampling()
    assert work.rows[0].tokens.size == 0


def test_a_session_stands_once_in_a_step() -> None:
    sessions = new()
    work = run(sessions, opened(1), rows(1, 0, [1]), rows(1, 1, [2]))
    assert codes(work) == [(1, "INVALID")]
    assert sessions.length(1) == 1


def test_logits_of_a_step_are_limited() -> None:
    sessions = Sessions("w1", StageLimits(2**24, CONTEXT, has_head=True), KvBudget(9, 1, 9))
    work = run(sessions, opened(1), opened(2), rows(1, 0, [1], 1), rows(2, 0, [1], 1))
    assert codes(work) == [(2, "FULL")]


def test_commands_that_fail_leave_their_rows_out_and_are_named_once() -> None:
    sessions = new()
    work = run(sessions, opened(1, CONTEXT), opened(2, CONTEXT), rows(2, 0, [1]), rows(1, 0, [1]))
    assert codes(work) == [(2, "FULL")]
    assert [r.session for r in work.rows] == [1]
    assert [c.open.session for c in work.commands] == [1]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (opened(0), (0, "INVALID")),
        (opened(5, 0), (5, "INVALID")),
        (opened(1), (1, "INVALID")),
        (opened(5, CONTEXT + 1), (5, "POSITION")),
        (Command(truncate=Command.Truncate(session=5)), (5, "UNKNOWN_SESSION")),
        (Command(fork=Command.Fork(session=5, new_session=6)), (6, "UNKNOWN_SESSION")),
        (Command(fork=Command.Fork(session=1, new_session=6, max_tokens=2)), (6, "POSITION")),
        (Command(fork=Command.Fork(session=1, new_session=1, max_tokens=9)), (1, "INVALID")),
        (Command(), (0, "INVALID")),
    ],
)
def test_commands_that_do_not_fit_are_refused(
    command: types_pb2.KvCommand, code: tuple[int, str]
) -> None:
    sessions = new()
    run(sessions, opened(1), rows(1, 0, [1, 2, 3]))
    work = run(sessions, command)
    assert codes(work) == [code]
    assert not work.commands
    assert (len(sessions), sessions.length(1)) == (1, 3)


def test_closing_twice_is_no_error() -> None:
    sessions = new()
    close = Command(close=Command.Close(session=1))
    assert not run(sessions, opened(1), close, close).failures
    assert (len(sessions), sessions.kv_used_bytes) == (0, 0)


def test_a_fork_has_its_origins_tokens_and_goes_its_own_way() -> None:
    sessions = new()
    run(sessions, opened(1), rows(1, 0, [1, 2, 3]))
    fork = Command(fork=Command.Fork(session=1, new_session=2, max_tokens=20))
    work = run(sessions, fork, rows(2, 3, [7]), rows(1, 3, [8]))
    assert [r.tokens.tolist() for r in work.rows] == [[1, 2, 3, 7], [1, 2, 3, 8]]


def test_truncating_shortens_and_never_lengthens() -> None:
    sessions = new()
    run(sessions, opened(1), rows(1, 0, [1, 2, 3]))
    run(sessions, Command(truncate=Command.Truncate(session=1, position=9)))
    assert sessions.length(1) == 3
    run(sessions, Command(truncate=Command.Truncate(session=1, position=1)))
    assert sessions.length(1) == 1


def test_stale_rows_are_left_out_and_fresh_ones_of_the_same_step_are_not() -> None:
    sessions = new()
    run(sessions, opened(1), opened(2), rows(1, 0, [1]), rows(2, 0, [1]))
    sessions.raise_floor(2, [1, 99])
    work = run(sessions, rows(1, 1, [2, 3]), rows(2, 1, [4]), epoch=1)
    assert [(r.session, r.first_row) for r in work.rows] == [(2, 2)]
    assert (work.n_stale, work.failures) == (2, [])
    assert len(run(sessions, rows(1, 1, [2]), epoch=2).rows) == 1


def test_a_floor_for_all_holds_for_sessions_to_come() -> None:
    sessions = new()
    run(sessions, opened(1))
    sessions.raise_floor(5)
    sessions.raise_floor(4)
    work = run(sessions, opened(2), rows(1, 0, [1]), rows(2, 0, [1]), epoch=4)
    assert (work.n_stale, len(sessions)) == (2, 2)
    assert len(run(sessions, rows(1, 0, [1]), rows(2, 0, [1]), epoch=5).rows) == 2


def test_a_session_closed_while_its_rows_ran_stays_closed() -> None:
    sessions = new()
    work = sessions.decide(step(opened(1), rows(1, 0, [1])))
    assert sessions.clear() == [1]
    sessions.confirm(work.rows)
    assert (sessions.length(1), sessions.kv_used_bytes) == (None, 0)


SESSION = st.integers(1, 5)


class Protocol(RuleBasedStateMachine):
    """Any order of commands, rows, repeats, gaps and flushes, against the plainest model."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions, self.order = new(), StepOrder(1)
        self.epoch, self.step = 1, 0  # of the newest step sent
        # The model: tokens and room of each session, floors.
        self.tokens: dict[int, list[int]] = {}
        self.room: dict[int, int] = {}
        self.floor: dict[int, int] = {}

    def send(self, *parts: Any) -> StepWork:
        self.step += 1
        assert self.order.check(self.epoch, self.step) is Arrival.NEXT
        self.order.accept(self.epoch, self.step)
        work = self.sessions.decide(step(*parts, epoch=self.epoch, number=self.step))
        self.sessions.confirm(work.rows)
        return work

    @rule(session=SESSION, room=st.integers(0, CONTEXT + 1))
    def open(self, session: int, room: int) -> None:
        pages = sum(pages_for(r) for r in self.room.values()) + pages_for(room)
        fits = 0 < room <= CONTEXT and pages <= PAGES and len(self.room) < PLACES
        work = self.send(opened(session, room))
        assert bool(work.commands) == (fits and session not in self.room)
        if work.commands:
            self.tokens[session], self.room[session] = [], room

    @rule(session=SESSION, fork=SESSION, room=st.integers(1, CONTEXT))
    def fork(self, session: int, fork: int, room: int) -> None:
        work = self.send(
            Command(fork=Command.Fork(session=session, new_session=fork, max_tokens=room))
        )
        pages = sum(pages_for(r) for r in self.room.values()) + pages_for(room)
        fits = pages <= PAGES and len(self.room) < PLACES
        known = session in self.room and fork not in self.room
        assert bool(work.commands) == (fits and known and room >= len(self.tokens[session]))
        if work.commands:
            self.tokens[fork], self.room[fork] = list(self.tokens[session]), room
            self.floor[fork] = self.floor.get(session, 0)

    @rule(session=SESSION)
    def close(self, session: int) -> None:
        assert not self.send(Command(close=Command.Close(session=session))).failures
        self.tokens.pop(session, None)
        self.room.pop(session, None)
        self.floor.pop(session, None)

    @rule(session=SESSION, position=st.integers(0, CONTEXT))
    def truncate(self, session: int, position: int) -> None:
        work = self.send(Command(truncate=Command.Truncate(session=session, position=position)))
        assert bool(work.failures) == (session not in self.room)
        if session in self.room:
            del self.tokens[session][position:]

    @rule(session=SESSION, back=st.integers(-2, 5), tokens=st.lists(st.integers(0, 9), min_size=1))
    def run_rows(self, session: int, back: int, tokens: list[int]) -> None:
        at = len(self.tokens.get(session, []))
        start = max(0, at - back)
        work = self.send(rows(session, start, tokens))
        stale = self.epoch < self.floor.get(session, 0)
        fits = session in self.room and start <= at
        fits = fits and start + len(tokens) <= self.room.get(session, 0)
        assert bool(work.rows) == (fits and not stale)
        assert bool(work.failures) == (not fits and not stale)
        if work.rows:
            self.tokens[session][start:] = tokens
            assert work.rows[0].tokens.tolist() == self.tokens[session]

    @rule(session=SESSION)
    def flush(self, session: int) -> None:
        self.sessions.raise_floor(self.epoch + 1, [session])
        if session in self.room:
            self.floor[session] = self.epoch + 1

    @rule()
    def next_epoch(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0
        self.send()
        assert self.order.check(self.epoch - 1, 1) is Arrival.STALE

    @rule(ahead=st.integers(2, 100))
    def gap(self, ahead: int) -> None:
        with pytest.raises(StepError):
            self.order.check(self.epoch, self.step + ahead)

    @rule(back=st.integers(0, 100))
    def repeat(self, back: int) -> None:
        if self.step > back:
            assert self.order.check(self.epoch, self.step - back) is Arrival.REPEAT

    @invariant()
    def agrees(self) -> None:
        assert {s: self.sessions.length(s) for s in range(1, 6)} == {
            s: len(self.tokens[s]) if s in self.tokens else None for s in range(1, 6)
        }
        used = sum(pages_for(room) for room in self.room.values())
        assert self.sessions.kv_used_bytes == used * 100


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
