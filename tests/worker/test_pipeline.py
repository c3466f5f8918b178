"""Workers in a row: the same bits as one worker, whatever is repeated, cancelled or damaged."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from potluck.rpc.v1 import cluster_pb2, types_pb2, worker_pb2

Command = types_pb2.KvCommand
VOCAB = 421


def opened(session: int, max_tokens: int = 64) -> types_pb2.KvCommand:
    return Command(open=Command.Open(session=session, max_tokens=max_tokens))


def rows(session: int, start: int, tokens: Sequence[int], want: int = 0, **more: Any) -> Any:
    return types_pb2.Rows(
        session=session, start_position=start, token_ids=tokens, want_logits=want, **more
    )


def tokens(n: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + i * 104729 + i * i * 31) % VOCAB for i in range(n)]


def bits(result: cluster_pb2.StepResult) -> list[tuple[int, int, int, str]]:
    return [
        (r.session, p.position, p.token_id, p.logprob.hex()) for r in result.rows for p in r.picks
    ]


GREEDY = types_pb2.Sampling(logprobs=2)
SEEDED = types_pb2.Sampling(temperature=0.9, top_p=0.95, seed=5, logprobs=0, frequency_penalty=0.3)


async def story(r: Any) -> list[Any]:
    """Two sessions, chunks, mixed batches, a rollback, a fork; all picks with their bits."""
    seen = []
    first, second = tokens(9, 1), tokens(20, 2)
    result = await r.run(opened(1), opened(2), rows(1, 0, first, 1, sampling=GREEDY))
    seen += bits(result)
    chunk = rows(2, 0, second[:13])
    result = await r.run(rows(1, 9, [result.rows[0].picks[0].token_id], 1, sampling=SEEDED), chunk)
    seen += bits(result)
    seen += bits(await r.run(rows(2, 13, second[13:], 3, sampling=GREEDY)))
    fork = Command(fork=Command.Fork(session=1, new_session=3, max_tokens=40))
    result = await r.run(fork, rows(3, 10, [5], 1, sampling=GREEDY), rows(1, 4, [7, 8], 2))
    seen += bits(result)
    result = await r.run(Command(truncate=Command.Truncate(session=2, position=2)))
    assert not result.rows
    seen += bits(await r.run(rows(2, 2, [1, 2, 3], 1, sampling=SEEDED)))
    assert not result.failures
    return seen


async def test_two_and_three_workers_give_the_bits_of_one(rig: Callable[[int], Any]) -> None:
    answers = []
    for cuts in [(), (1,), (3,), (1, 2)]:
        async with rig(len(cuts) + 1) as r:
            await r.load(cuts)
            answers.append(await story(r))
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert len(answers[0]) == 9
    assert len({pick[2] for pick in answers[0]}) > 3


async def test_activations_go_from_worker_to_worker(rig: Callable[[int], Any]) -> None:
    async with rig(2) as r:
        await r.load((2,))
        await r.run(opened(1), rows(1, 0, tokens(32), 1))
        beats = [await worker.heartbeat(1) for worker in r.workers]
        assert beats[0].link.activation_bytes == 32 * 64 * 4
        assert beats[0].link.sent_bytes > beats[0].link.activation_bytes
        assert beats[1].link.activation_bytes == 0
        assert r.fleet.received_bytes < 500
        assert [beat.steps for beat in beats] == [1, 1]
        assert (beats[0].link.to, beats[1].link.to) == ("w1", "")


async def test_timings_of_all_stages_come_back(rig: Callable[[int], Any]) -> None:
    async with rig(2) as r:
        await r.load((2,))
        await r.run(opened(1), rows(1, 0, tokens(8)))
        result = await r.run(rows(1, 8, [1], 1))
        assert [t.worker for t in result.timings] == ["w0", "w1"]
        for timing in result.timings:
            assert 0 < timing.compute_seconds < 1
            assert 0 <= timing.wait_seconds < 1
            assert 0 < timing.serialise_seconds < 1
            assert 0 < timing.wire_seconds < 1
            assert timing.sent_bytes > 0


async def test_a_repeated_step_is_answered_and_not_run_again(rig: Callable[[int], Any]) -> None:
    async with rig(2) as r:
        await r.load((2,))
        await r.run(opened(1), rows(1, 0, tokens(5), 1, sampling=GREEDY))
        first = await r.run(rows(1, 5, [3], 1, sampling=GREEDY))
        computed = [(await w.heartbeat(1)).steps for w in r.workers]
        ack = await r.send(rows(1, 5, [3], 1, sampling=GREEDY), step=2)
        assert not ack.HasField("failure")
        again = await r.result()
        assert again == first
        assert [(await w.heartbeat(1)).steps for w in r.workers] == computed
        await r.run(rows(1, 6, [4], 1))  # and the next one runs


async def test_a_repeat_older_than_memory_is_a_gap(rig: Callable[[int], Any]) -> None:
    async with rig(1) as r:
        await r.load()
        for _ in range(18):
            await r.run()
        assert not (await r.send(step=1)).HasField("failure")
        assert (await r.ack()).failure.code == types_pb2.FAILURE_CODE_GAP


async def test_a_gap_is_refused_and_changes_nothing(rig: Callable[[int], Any]) -> None:
    async with rig(1) as r:
        await r.load()
        ack = await r.send(opened(1), step=3)
        assert ack.failure.code == types_pb2.FAILURE_CODE_GAP
        assert "step 3 came, step 1 is next" in ack.failure.message
        assert len((await r.run(opened(1), rows(1, 0, [1], 1))).rows) == 1


async def test_steps_of_an_old_epoch_pass_their_header_on(rig: Callable[[int], Any]) -> None:
    async with rig(2) as r:
        await r.load((2,))
        await r.load((2,))
        ack = await r.send(opened(1), rows(1, 0, [1], 1), epoch=1, step=7)
        assert not ack.HasField("failure")
        stale = await r.result()
        assert (stale.epoch, stale.step, len(stale.rows), len(stale.failures)) == (1, 7, 0, 0)
        r.step = 0
        assert len((await r.run(opened(1), rows(1, 0, [1], 1))).rows) == 1


async def test_flushed_rows_are_left_out_everywhere(rig: Callable[[int], Any]) -> None:
    async with rig(2) as r:
        await r.load((2,))
        await r.run(opened(1), opened(2), rows(1, 0, tokens(4)), rows(2, 0, tokens(4)))
        for i in range(2):
            await r.stub(i).Cancel(worker_pb2.CancelRequest(epoch=2, sessions=[1]))
        result = await r.run(rows(1, 4, [1], 1), rows(2, 4, [1], 1))
        assert [x.session for x in result.rows] == [2]
        assert not result.failures
        r.epoch, r.step = 2, 0
        assert len((await r.run(rows(1, 4, [1], 1))).rows) == 1


async def test_a_mistake_of_one_session_reaches_the_coordinator_and_no_other(
    rig: Callable[[int], Any],
) -> None:
    async with rig(3) as r:
        await r.load((1, 2))
        await r.run(opened(1), rows(1, 0, tokens(4)))
        alone = bits(await r.run(rows(1, 4, [9], 1, sampling=GREEDY)))
        result = await r.run(rows(8, 0, [1], 1), rows(1, 4, [9], 1, sampling=GREEDY))
        assert [(f.session, f.worker) for f in result.failures] == [(8, "w0")]
        assert result.failures[0].code == types_pb2.FAILURE_CODE_UNKNOWN_SESSION
        assert bits(result) == alone


async def test_a_session_that_finds_no_room_is_refused(rig: Callable[[int], Any]) -> None:
    async with rig(2) as r:
        await r.load((2,), kv_bytes=16 * 2 * 2 * 2 * 16 * 2 * 4)  # four pages
        result = await r.run(opened(1, 60), opened(2, 60), rows(1, 0, [1], 1), rows(2, 0, [1], 1))
        assert [(f.session, f.code) for f in result.failures] == [(2, types_pb2.FAILURE_CODE_FULL)]
        assert [x.session for x in result.rows] == [1]
        loaded = [worker.loaded() for worker in r.workers]
        assert [x.sessions for x in loaded] == [1, 1]


@pytest.mark.parametrize("count", [2, 3])
async def test_many_steps_may_be_in_flight(rig: Callable[[int], Any], count: int) -> None:
    async with rig(count) as r:
        await r.load(range(1, count))
        prompt = tokens(60)
        await r.send(opened(1))
        for i in range(0, 60, 3):
            ack = await r.send(rows(1, i, prompt[i : i + 3], 1 if i == 57 else 0, sampling=GREEDY))
            assert not ack.HasField("failure")
        results = [await r.result() for _ in range(21)]
        assert [x.step for x in results] == list(range(1, 22))
        chunked = bits(results[-1])
        whole = bits(await r.run(opened(2), rows(2, 0, prompt, 1, sampling=GREEDY)))
        assert [x[1:] for x in chunked] == [x[1:] for x in whole]


async def test_one_more_worker_costs_a_fraction_of_a_millisecond(rig: Callable[[int], Any]) -> None:
    """Best of many steps, so that other load on the machine does not count: 0.20 ms measured.

    The goal is 0.3 ms (bench/link.py, real processes); the bound here leaves room for slow CI.
    """
    best = []
    for cuts in [(), (1, 2)]:
        async with rig(len(cuts) + 1) as r:
            await r.load(cuts)
            await r.run(opened(1), rows(1, 0, tokens(4)))
            seconds = []
            for _ in range(100):
                started = time.perf_counter()
                await r.run(rows(1, 4, [1], 1))
                seconds.append(time.perf_counter() - started)
            best.append(min(seconds))
    assert (best[1] - best[0]) / 2 < 0.0006
