"""What goes into the next step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.scheduler import (
    Batch,
    Limits,
    Scheduler,
    pages_of,
    picks_that_fit,
    rows_that_fit,
)
from coordinator.session import Session, SessionId
from potluck.errors import Full, PlanError
from potluck.rpc import options
from potluck.sampling import Sampling

LIMITS = Limits(
    n_stages=2,
    max_sessions=4,
    queue=2,
    chunk_tokens=8,
    step_tokens=16,
    step_picks=16,
    kv_tokens=1024,
)


def session(id: int, prompt: int = 5, max_tokens: int = 4) -> Session:
    return Session(SessionId(id), range(prompt), max_tokens, Sampling(), frozenset())


def scheduler(*sessions: Session, **changes: Any) -> Scheduler:
    s = Scheduler(replace(LIMITS, **changes))
    for one in sessions:
        s.add(one)
    return s


def rows_of(batch: Batch | None) -> list[tuple[int, int, int, int]]:
    """(session, start, tokens, wanted) of each entry."""
    assert batch is not None
    return [(r.session, r.start, len(r.tokens), r.want_logits) for r in batch.rows]


def commit(s: Scheduler, token: int = 7) -> None:
    """The oldest step comes back, and every pick is `token`."""
    live = {one.id: one for one in s.sessions()}
    for rows in s.returned().rows:
        if (one := live.get(rows.session)) is None:
            continue
        one.advance(rows.start, len(rows.tokens))
        if rows.want_logits:
            one.push(len(one.tokens), token)
            if one.is_live:
                s.make_ready(one.id)
            else:
                s.remove(one.id)


def test_a_session_opens_with_its_room_and_its_first_rows() -> None:
    batch = scheduler(session(1, prompt=5, max_tokens=4)).next_batch()
    assert batch is not None
    assert [(room.session, room.max_tokens) for room in batch.opens] == [(1, 9)]
    assert rows_of(batch) == [(1, 0, 5, 1)]


def test_a_step_wants_no_more_picks_than_the_last_stage_has_room_for() -> None:
    s = scheduler(*(session(i, prompt=2) for i in range(1, 5)), n_stages=1, step_picks=3)
    wanted = []
    for _ in range(12):
        batch = s.next_batch()
        if batch is None:
            break
        wanted.append(sum(rows.want_logits for rows in batch.rows))
        commit(s)
    assert max(wanted) == 3
    assert sum(wanted) == 4 * 4
    assert s.n_sessions == 0


def test_logits_of_the_largest_service_fit_the_last_stage() -> None:
    assert picks_that_fit(128_256, options.LOGITS_BYTES) == 130
    assert picks_that_fit(2**30, options.LOGITS_BYTES) == 1


def test_only_the_last_row_of_a_prompt_wants_a_pick() -> None:
    s = scheduler(session(1, prompt=20))
    assert [rows_of(s.next_batch()) for _ in range(3)] == [
        [(1, 0, 8, 0)],
        [(1, 8, 8, 0)],
        [(1, 16, 4, 1)],
    ]


def test_many_chunks_of_a_prompt_are_in_flight_but_one_decode_row() -> None:
    s = scheduler(session(1, prompt=16))
    s.next_batch()
    s.next_batch()
    assert s.next_batch() is None
    commit(s)
    assert s.next_batch() is None
    commit(s)
    assert rows_of(s.next_batch()) == [(1, 16, 1, 1)]
    assert s.next_batch() is None


def test_decode_rows_go_before_prompts() -> None:
    s = scheduler(session(1, prompt=2))
    s.next_batch()
    commit(s)
    s.add(session(2, prompt=20))
    batch = s.next_batch()
    assert rows_of(batch) == [(1, 2, 1, 1), (2, 0, 8, 0)]
    assert batch is not None
    assert not batch.is_decode


def test_ready_sessions_are_spread_over_the_stages() -> None:
    s = scheduler(*(session(i, prompt=1) for i in (1, 2, 3, 4)))
    s.next_batch()
    commit(s)
    assert [row[0] for row in rows_of(s.next_batch())] == [1, 2]
    assert [row[0] for row in rows_of(s.next_batch())] == [3, 4]


@pytest.mark.parametrize(("n_sessions", "n_stages"), [(8, 4), (4, 2), (2, 1), (7, 3), (5, 4)])
def test_sessions_that_began_one_by_one_end_up_in_a_step_per_stage(
    n_sessions: int, n_stages: int
) -> None:
    arriving = [session(i, prompt=2, max_tokens=60) for i in range(1, n_sessions + 1)]
    s = scheduler(n_stages=n_stages, max_sessions=n_sessions)
    batches: list[Batch] = []
    n_in_flight = 0
    while arriving or s.n_sessions == n_sessions:
        if arriving:
            s.add(arriving.pop())
        while n_in_flight <= n_stages and (batch := s.next_batch()) is not None:
            batches.append(batch)
            n_in_flight += 1
        commit(s)
        n_in_flight -= 1
    rows = [batch.n_rows for batch in batches[-6 * n_stages : -2 * n_stages]]
    assert sum(rows) / len(rows) >= n_sessions / n_stages
    assert max(rows) == -(-n_sessions // n_stages)


def test_a_whole_share_of_rows_goes_even_with_every_stage_busy() -> None:
    s = scheduler(*(session(i, prompt=1) for i in (1, 2)))
    assert [len(rows_of(s.next_batch())) for _ in range(1)] == [2]
    commit(s)
    assert [len(rows_of(s.next_batch())) for _ in range(2)] == [1, 1]


def test_rows_are_spread_over_as_many_steps_as_the_forecast_finds_best() -> None:
    s = scheduler(*(session(i, prompt=1) for i in (1, 2, 3, 4)), spread=(1, 1, 1, 1))
    s.next_batch()
    commit(s)
    assert [row[0] for row in rows_of(s.next_batch())] == [1, 2, 3, 4]
    assert s.next_batch() is None
    limits = replace(LIMITS, spread=(1, 2, 2, 3))
    assert [limits.steps_for(n) for n in (0, 1, 2, 3, 4, 9)] == [1, 1, 2, 2, 3, 3]
    assert [LIMITS.steps_for(n) for n in (1, 9)] == [2, 2]
    with pytest.raises(PlanError, match="no step"):
        replace(LIMITS, spread=(1, 0))


def test_a_batch_of_decode_rows_is_called_so() -> None:
    s = scheduler(session(1, prompt=1))
    s.next_batch()
    commit(s)
    batch = s.next_batch()
    assert batch is not None
    assert batch.is_decode
    assert batch.n_rows == 1


def test_prompts_take_turns() -> None:
    s = scheduler(session(1, prompt=20), session(2, prompt=20))
    order = [row[0] for _ in range(4) for row in rows_of(s.next_batch())]
    assert order == [1, 2, 1, 2]


def test_short_prompts_share_a_step() -> None:
    s = scheduler(session(1, prompt=3), session(2, prompt=3), session(3, prompt=3))
    assert rows_of(s.next_batch()) == [(1, 0, 3, 1), (2, 0, 3, 1), (3, 0, 2, 0)]


def test_a_step_never_holds_more_rows_than_a_message() -> None:
    s = scheduler(session(1, prompt=2), session(2, prompt=40), step_tokens=4)
    s.next_batch()
    commit(s)
    assert rows_of(s.next_batch()) == [(1, 2, 1, 1), (2, 2, 3, 0)]


def test_a_step_full_of_decode_rows_takes_no_prompt() -> None:
    s = scheduler(session(1, prompt=1), session(2, prompt=9), step_tokens=1, n_stages=1)
    s.next_batch()
    commit(s)
    assert rows_of(s.next_batch()) == [(1, 1, 1, 1)]
    assert rows_of(s.next_batch()) == [(2, 0, 1, 0)]


def test_more_sessions_than_places_wait_in_order() -> None:
    s = scheduler(*(session(i) for i in range(1, 6)))
    assert (s.n_sessions, s.n_waiting) == (4, 1)
    assert (s.queue_place(SessionId(5)), s.queue_place(SessionId(1))) == (1, 0)
    assert [one.id for one in s.sessions()] == [1, 2, 3, 4, 5]


def test_a_full_queue_refuses_with_its_bound() -> None:
    s = scheduler(*(session(i) for i in range(1, 7)))
    with pytest.raises(Full, match=r"queue is full \(2\)") as refused:
        s.add(session(7))
    assert "try again" in refused.value.remedy
    assert s.n_waiting == 2


def test_without_a_queue_free_places_are_still_taken() -> None:
    s = scheduler(session(1), queue=0, max_sessions=1)
    with pytest.raises(Full):
        s.add(session(2))
    assert s.n_sessions == 1


def test_a_session_waits_until_its_whole_room_is_free() -> None:
    s = scheduler(session(1, 100, 100), session(2, 100, 100), session(3, 1, 1), kv_tokens=320)
    assert (s.n_sessions, s.n_waiting) == (1, 2)  # and the small one does not overtake
    s.remove(SessionId(1))
    assert (s.n_sessions, s.n_waiting) == (2, 0)
    assert s.reserved_kv_tokens == 208 + 16


def test_a_session_that_would_never_fit_is_refused() -> None:
    with pytest.raises(Full, match="208 positions, the workers have room for 160"):
        scheduler(session(1, 100, 100), kv_tokens=160)


def test_a_finished_session_closes_with_the_next_step_before_others_open() -> None:
    s = scheduler(session(1, prompt=1, max_tokens=1), session(2), max_sessions=1)
    s.next_batch()
    commit(s)
    batch = s.next_batch()
    assert batch is not None
    assert batch.closes == (1,)
    assert [room.session for room in batch.opens] == [2]


def test_closing_needs_no_rows() -> None:
    s = scheduler(session(1))
    s.next_batch()
    s.remove(SessionId(1))
    batch = s.next_batch()
    assert batch is not None
    assert (batch.closes, batch.rows, batch.is_decode) == ((1,), (), False)
    assert s.next_batch() is None


def test_a_session_that_never_opened_needs_no_close() -> None:
    s = scheduler(session(1))
    s.remove(SessionId(1))
    assert s.next_batch() is None
    assert s.reserved_kv_tokens == 0


def test_removing_a_waiting_session_frees_its_place_in_the_queue() -> None:
    s = scheduler(*(session(i) for i in range(1, 7)))
    s.remove(SessionId(5))
    assert s.queue_place(SessionId(6)) == 1
    s.remove(SessionId(5))
    assert s.n_waiting == 1


def test_a_removed_sessions_rows_come_back_to_nobody() -> None:
    s = scheduler(session(1, prompt=16), session(2, prompt=1))
    s.next_batch()
    s.remove(SessionId(1))
    commit(s)
    assert rows_of(s.next_batch()) == [(2, 0, 1, 1)]


def test_a_ready_session_that_is_removed_is_not_run() -> None:
    s = scheduler(session(1, prompt=1))
    s.next_batch()
    commit(s)
    s.remove(SessionId(1))
    assert rows_of(s.next_batch()) == []


@pytest.mark.parametrize("name", ["n_stages", "max_sessions", "chunk_tokens", "step_tokens"])
def test_limits_that_let_nothing_through_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match="nothing through"):
        replace(LIMITS, **{name: 0})  # type: ignore[arg-type]  # none of them is spread


def test_kv_of_less_than_a_page_is_refused() -> None:
    with pytest.raises(PlanError, match="less than one page"):
        replace(LIMITS, kv_tokens=15)


def test_rooms_are_whole_pages() -> None:
    assert [pages_of(n) for n in (1, 16, 17)] == [16, 16, 32]


def test_rows_of_a_message_follow_from_the_models_width() -> None:
    assert rows_that_fit(8192, 4 * 2**20 - 64 * 1024) == 126
    assert rows_that_fit(10**9, 1000) == 1


class Stage:
    """KV as a stage keeps it: positions of each open session. Refuses what a worker refuses."""

    def __init__(self, kv_tokens: int) -> None:
        self.kv_tokens = kv_tokens
        self.rooms: dict[int, int] = {}
        self.lengths: dict[int, int] = {}

    def run(self, batch: Batch) -> None:
        for id in batch.closes:
            del self.rooms[id]
            del self.lengths[id]
        for room in batch.opens:
            assert room.session not in self.rooms
            self.rooms[room.session] = room.max_tokens
            self.lengths[room.session] = 0
        assert sum(map(pages_of, self.rooms.values())) <= self.kv_tokens, "KV over budget"
        assert max(Counter(rows.session for rows in batch.rows).values(), default=1) == 1
        for rows in batch.rows:
            assert rows.start == self.lengths[rows.session], "a row twice, or a gap"
            self.lengths[rows.session] += len(rows.tokens)
            assert self.lengths[rows.session] <= self.rooms[rows.session]


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 12)),
        st.tuples(st.just("remove"), st.integers(1, 30), st.just(0)),
        st.tuples(st.just("send"), st.just(0), st.just(0)),
        st.tuples(st.just("give_back"), st.just(0), st.just(0)),
    ),
    max_size=120,
)
limits = st.builds(
    Limits,
    n_stages=st.integers(1, 4),
    max_sessions=st.integers(1, 5),
    queue=st.integers(0, 6),
    chunk_tokens=st.integers(1, 9),
    step_tokens=st.integers(1, 9),
    step_picks=st.integers(1, 9),
    kv_tokens=st.integers(4, 12).map(lambda pages: pages * 16),
)


class Cluster:
    """A scheduler and a stage, with steps in flight between them."""

    def __init__(self, limits: Limits) -> None:
        self.scheduler = Scheduler(limits)
        self.stage = Stage(limits.kv_tokens)
        self.taken: dict[int, Session] = {}
        self.removed: set[int] = set()
        self.in_flight = 0

    def add(self, prompt: int, max_tokens: int) -> None:
        new = session(len(self.taken) + 1, prompt, max_tokens)
        try:
            self.scheduler.add(new)
        except Full:
            return
        self.taken[new.id] = new

    def remove(self, id: int, _: int) -> None:
        if id in self.taken:
            self.scheduler.remove(SessionId(id))
            self.removed.add(id)

    def send(self, *_: int) -> bool:
        limits = self.scheduler.limits
        if self.in_flight > limits.n_stages or (batch := self.scheduler.next_batch()) is None:
            return False
        assert batch.n_rows <= limits.step_tokens
        self.stage.run(batch)
        self.in_flight += 1
        return True

    def give_back(self, *_: int) -> None:
        if self.in_flight:
            commit(self.scheduler)
            self.in_flight -= 1

    def run_to_the_end(self) -> None:
        for _ in range(10_000):
            while self.send():
                pass
            if not self.in_flight:
                break
            self.give_back()
        assert self.scheduler.n_sessions + self.scheduler.n_waiting == 0, "somebody starves"


@given(limits=limits, actions=actions)
def test_in_any_order_of_events_no_row_runs_twice_no_kv_overflows_and_all_are_served(
    limits: Limits, actions: list[tuple[str, int, int]]
) -> None:
    cluster = Cluster(limits)
    for name, first, second in actions:
        getattr(cluster, name)(first, second)
        assert cluster.scheduler.reserved_kv_tokens <= limits.kv_tokens
    cluster.run_to_the_end()
    served = [one for id, one in cluster.taken.items() if id not in cluster.removed]
    assert all(one.n_answer == one.max_tokens for one in served)
    assert cluster.stage.rooms == {}
    assert cluster.scheduler.reserved_kv_tokens == 0


@given(n=st.integers(2, 6), prompts=st.lists(st.integers(1, 60), min_size=6, max_size=6))
def test_no_session_waits_for_more_than_one_turn_of_each_other(n: int, prompts: list[int]) -> None:
    s = Scheduler(replace(LIMITS, max_sessions=n, kv_tokens=10_000, n_stages=1))
    ids = range(1, n + 1)
    for id in ids:
        s.add(session(id, prompts[id - 1], max_tokens=50))
    waited = dict.fromkeys(ids, 0)
    for _ in range(60):
        batch = s.next_batch()
        assert batch is not None
        served = {int(rows.session) for rows in batch.rows}
        for id in ids:
            waited[id] = 0 if id in served else waited[id] + 1
        assert max(waited.values()) <= n
        commit(s)
        if len(list(s.sessions())) < n:
            return
