"""Which workers there are, and how each of them is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.fleet import FORGET_SECONDS, Fleet, Heartbeat, LinkFigures, LoadNews, WorkerState
from potluck.errors import UnknownWorker, UsageError, WorkerExists
from potluck.plan import WorkerId, WorkerInfo

A, B = WorkerId("a"), WorkerId("b")
READY = Heartbeat(WorkerState.READY)


def info(address: str = "127.0.0.1:1", free: int = 1000) -> WorkerInfo:
    return WorkerInfo(WorkerId(""), address, "avx2", 2, 2000, free, 1e9, "laptop")


def fleet_of(*ids: str) -> Fleet:
    fleet = Fleet()
    for i, id in enumerate(ids):
        fleet.register(id, info(f"127.0.0.1:{i + 1}"), instance=i + 1, now=0.0)
    return fleet


def test_a_worker_gets_the_id_it_wishes() -> None:
    fleet = Fleet()
    assert fleet.register("pi5-kitchen", info(), 1, 0.0) == ("pi5-kitchen", True)
    assert [worker.id for worker in fleet.usable()] == ["pi5-kitchen"]


def test_workers_without_a_wish_are_numbered() -> None:
    fleet = fleet_of("w2")
    assert fleet.register("", info("127.0.0.1:8"), 8, 0.0)[0] == "w1"
    assert fleet.register("", info("127.0.0.1:9"), 9, 0.0)[0] == "w3"


@pytest.mark.parametrize("wished", ["A", "a b", "x" * 33, "ä", "a_b"])
def test_an_id_that_is_no_id_is_refused(wished: str) -> None:
    with pytest.raises(UsageError, match="a-z"):
        Fleet().register(wished, info(), 1, 0.0)


def test_a_repeated_registration_changes_nothing() -> None:
    fleet = fleet_of("a")
    fleet.hear(A, 1, READY, 1.0)
    assert fleet.register("a", info(), 1, 2.0) == (A, False)
    assert fleet.workers()[0].state is WorkerState.READY
    assert fleet.overdue(5.0, 4.0) == []


def test_a_process_without_a_wish_keeps_its_number() -> None:
    fleet = Fleet()
    fleet.register("", info(), 7, 0.0)
    assert fleet.register("", info(), 7, 1.0) == ("w1", False)


def test_another_process_cannot_take_a_living_workers_id() -> None:
    with pytest.raises(WorkerExists, match=r"127\.0\.0\.1:1"):
        fleet_of("a").register("a", info("127.0.0.1:2"), 99, 1.0)


def test_a_new_process_at_the_same_address_has_replaced_the_old_one() -> None:
    fleet = fleet_of("a")
    assert fleet.register("a", info(), 99, 1.0) == (A, True)
    with pytest.raises(UnknownWorker):
        fleet.hear(A, 1, READY, 1.5)


def test_a_lost_workers_id_is_free_for_the_next_process() -> None:
    fleet = fleet_of("a")
    fleet.lose(A, "socket closed")
    assert fleet.register("a", info("127.0.0.1:2"), 99, 1.0) == (A, True)
    assert fleet.workers()[0].state is WorkerState.JOINING


def test_a_worker_with_a_new_address_is_planned_anew() -> None:
    assert fleet_of("a").register("a", info("127.0.0.1:2"), 1, 1.0) == (A, True)


def test_a_worker_that_comes_back_offers_what_it_offered_before_it_loaded() -> None:
    fleet = Fleet()
    fleet.register("a", info(free=1000), 1, 0.0)
    fleet.lose(A, "silent")
    fleet.register("a", info(free=200), 1, 1.0)
    assert fleet.usable()[0].memory_free_bytes == 1000
    mapped = replace(info(), room_bytes=700)
    fleet.register("b", mapped, 2, 0.0)
    fleet.lose(B, "silent")
    fleet.register("b", replace(mapped, room_bytes=100), 2, 1.0)
    assert [worker.room_bytes for worker in fleet.usable()] == [None, 700]


def test_a_silent_worker_is_overdue_after_four_seconds() -> None:
    fleet = fleet_of("a", "b")
    fleet.hear(A, 1, READY, 3.0)
    assert fleet.overdue(4.0, 4.0) == []
    assert fleet.overdue(4.1, 4.0) == [B]


def test_a_lost_worker_must_register_again() -> None:
    fleet = fleet_of("a")
    fleet.lose(A, "silent")
    assert fleet.usable() == []
    with pytest.raises(UnknownWorker, match="not registered"):
        fleet.hear(A, 1, READY, 1.0)
    assert fleet.workers()[0].lost_why == "silent"


def test_a_lost_worker_stays_visible_for_ten_minutes() -> None:
    fleet = fleet_of("a")
    fleet.lose(A, "silent")
    fleet.overdue(FORGET_SECONDS, 4.0)
    assert len(fleet.workers()) == 1
    fleet.overdue(FORGET_SECONDS + 1, 4.0)
    assert fleet.workers() == []


def test_a_heartbeat_of_a_stranger_is_refused() -> None:
    with pytest.raises(UnknownWorker):
        Fleet().hear(A, 1, READY, 0.0)
    with pytest.raises(UnknownWorker):
        fleet_of("a").hear(A, 2, READY, 0.0)


def test_a_draining_worker_is_not_planned() -> None:
    fleet = fleet_of("a", "b")
    fleet.hear(A, 1, Heartbeat(WorkerState.DRAINING), 1.0)
    assert [worker.id for worker in fleet.usable()] == ["b"]


def test_a_worker_that_leaves_is_forgotten_at_once() -> None:
    fleet = fleet_of("a")
    assert not fleet.leave(A, 99)
    assert fleet.leave(A, 1)
    assert not fleet.leave(A, 1)
    assert fleet.workers() == []


def test_losing_a_stranger_is_no_error() -> None:
    fleet = fleet_of("a")
    fleet.lose(B, "never seen")
    fleet.note_load(B, LoadNews(1, 2), 0.0)
    assert len(fleet.usable()) == 1


def test_the_stillest_engine_is_the_one_that_moved_longest_ago() -> None:
    fleet = fleet_of("a", "b")
    fleet.hear(A, 1, Heartbeat(WorkerState.READY, progress=5), 1.0)
    fleet.hear(B, 2, Heartbeat(WorkerState.READY, progress=5), 1.0)
    fleet.hear(A, 1, Heartbeat(WorkerState.READY, progress=5), 9.0)
    fleet.hear(B, 2, Heartbeat(WorkerState.READY, progress=6), 9.0)
    assert fleet.stillest([A, B]) == (A, 9.0)


def test_a_worker_that_is_gone_is_the_stillest() -> None:
    assert fleet_of("a").stillest([A, B])[0] == B


def test_load_progress_is_kept_for_people() -> None:
    fleet = fleet_of("a")
    fleet.note_load(A, LoadNews(30, 100), 0.0)
    worker = fleet.workers()[0]
    assert (worker.load.done_bytes, worker.load.total_bytes) == (30, 100)
    assert (worker.load_bytes_per_second(0.0), worker.load_seconds_left(0.0)) == (0.0, 0.0)


def test_a_fetch_has_a_rate_over_its_newest_seconds_and_a_time_left() -> None:
    fleet = fleet_of("a")
    worker = fleet.workers()[0]
    for second, fetched in enumerate((0, 10, 20, 30, 40, 50, 60, 260)):
        fleet.note_load(A, LoadNews(0, 1000, fetched, 960), float(second))
    assert worker.load_bytes_per_second(7.0) == (260 - 20) / 5
    assert worker.load_seconds_left(7.0) == (960 - 260) / 48
    assert worker.load_bytes_per_second(32.0) == (260 - 20) / 30  # it stands still


def test_packing_after_fetching_and_another_load_begin_their_rate_anew() -> None:
    fleet = fleet_of("a")
    worker = fleet.workers()[0]
    fleet.note_load(A, LoadNews(0, 100, 50, 100), 0.0)
    fleet.note_load(A, LoadNews(0, 100, 100, 100), 1.0)
    assert worker.load_bytes_per_second(1.0) == 0.0
    fleet.note_load(A, LoadNews(20, 100, 100, 100), 2.0)
    assert (worker.load_bytes_per_second(2.0), worker.load_seconds_left(2.0)) == (20.0, 4.0)
    fleet.note_load(A, LoadNews(0, 100, 5, 100), 3.0)
    assert worker.load_bytes_per_second(3.0) == 0.0
    fleet.note_load(A, LoadNews(0, 100, 5, 100), 3.0)
    assert worker.load_bytes_per_second(3.0) == 0.0


def test_a_links_rate_is_the_mean_over_the_newest_heartbeats() -> None:
    fleet = fleet_of("a")
    worker = fleet.workers()[0]
    assert worker.link_bytes_per_second == 0.0
    for second in range(3):
        link = LinkFigures("b", 0.001, sent_bytes=500 * second, activation_bytes=0)
        fleet.hear(A, 1, Heartbeat(WorkerState.READY, link=link), float(second))
    assert worker.link_bytes_per_second == 500.0


def test_a_new_link_begins_its_rate_anew() -> None:
    fleet = fleet_of("a")
    worker = fleet.workers()[0]
    for now, sent in ((1.0, 5000), (2.0, 100)):
        link = LinkFigures("b", 0.001, sent_bytes=sent, activation_bytes=0)
        fleet.hear(A, 1, Heartbeat(WorkerState.READY, link=link), now)
    assert worker.link_bytes_per_second == 0.0
    fleet.hear(A, 1, READY, 3.0)
    assert worker.link_bytes_per_second == 0.0


def test_two_heartbeats_at_the_same_moment_make_no_rate() -> None:
    fleet = fleet_of("a")
    for sent in (0, 100):
        link = LinkFigures("b", 0.001, sent_bytes=sent, activation_bytes=0)
        fleet.hear(A, 1, Heartbeat(WorkerState.READY, link=link), 1.0)
    assert fleet.workers()[0].link_bytes_per_second == 0.0


def test_a_port_has_one_owner_so_a_newcomer_without_a_wish_takes_its_place() -> None:
    fleet = fleet_of("a", "b")
    assert fleet.register("", info("127.0.0.1:2"), 99, 1.0) == (B, True)
    assert [worker.id for worker in fleet.usable()] == ["a", "b"]


def test_a_newcomer_with_another_name_displaces_who_had_its_address() -> None:
    fleet = fleet_of("a", "b")
    c, _ = fleet.register("c", info("127.0.0.1:2"), 99, 1.0)
    assert fleet.displaced(c) == ["b"]
    fleet.lose(B, "displaced")
    assert fleet.displaced(c) == []


def test_who_was_lost_leaves_its_place_to_a_spare_and_others_keep_theirs() -> None:
    fleet = fleet_of("a", "b", "spare")
    assert [worker.id for worker in fleet.steadiest(2)] == ["a", "b"]
    fleet.lose(A, "silent")
    fleet.register("a", info("127.0.0.1:1"), instance=1, now=1.0)
    assert [worker.id for worker in fleet.steadiest(2)] == ["b", "spare"]
    assert [worker.id for worker in fleet.steadiest(3)] == ["a", "b", "spare"]


def test_a_loaded_worker_is_ready_at_once_whatever_an_old_heartbeat_says() -> None:
    fleet = fleet_of("a", "b")
    fleet.note_load(A, LoadNews(10, 10), 0.0)
    fleet.note_ready([A, WorkerId("gone")], epoch=3)
    assert [worker.state for worker in fleet.workers()] == [WorkerState.READY, WorkerState.JOINING]
    fleet.hear(A, 1, Heartbeat(WorkerState.LOADING, epoch=2), 1.0)  # written before the load's end
    assert fleet.workers()[0].state is WorkerState.READY
    fleet.hear(A, 1, Heartbeat(WorkerState.DRAINING, epoch=3), 2.0)
    assert fleet.workers()[0].state is WorkerState.DRAINING
    fleet.note_load(A, LoadNews(1, 10), 0.0)  # of the next epoch
    fleet.hear(A, 1, Heartbeat(WorkerState.LOADING, epoch=0), 3.0)
    assert fleet.workers()[0].state is WorkerState.LOADING


def test_a_lost_worker_does_not_become_ready() -> None:
    fleet = fleet_of("a")
    fleet.lose(A, "silent")
    fleet.note_ready([A], epoch=1)
    assert fleet.workers()[0].state is WorkerState.LOST
