"""Steps out, results in: what the pipeline refuses, repeats and counts."""

from __future__ import annotations

import time
from typing import Any

import grpc.aio
import pytest

from coordinator.messages import RowsFailure
from coordinator.pipeline import Pipeline
from coordinator.scheduler import Batch, BatchRows, Room
from coordinator.session import SessionId
from potluck.errors import FrameError, StageLost, StepError
from potluck.plan import Plan, Span, Stage, WorkerId
from potluck.rpc.v1 import cluster_pb2, types_pb2
from potluck.sampling import Sampling

ONE = SessionId(1)


def plan(n_stages: int = 2) -> Plan:
    last = n_stages - 1
    return Plan(
        n_stages,
        tuple(
            Stage(WorkerId(f"w{i + 1}"), Span(i, i + 1), i == 0, i == last, 0, 0)
            for i in range(n_stages)
        ),
    )


def batch(want_logits: int = 1) -> Batch:
    rows = BatchRows(ONE, 0, (5, 6), want_logits, is_prompt=True, sampling=Sampling(seed=9))
    return Batch(closes=(SessionId(7),), opens=(Room(ONE, 10),), rows=(rows,))


def result(step: int, epoch: int = 3, **fields: Any) -> cluster_pb2.StepResult:
    return cluster_pb2.StepResult(epoch=epoch, step=step, **fields)


@pytest.fixture
async def pipeline() -> Any:
    changes: list[int] = []
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        made = Pipeline(plan(), 3, channel, lambda: changes.append(1))
        made.changes = changes  # type: ignore[attr-defined]  # for the tests
        yield made
        made.close()


async def test_one_step_more_than_stages_is_in_flight(pipeline: Pipeline) -> None:
    for _ in range(3):
        assert pipeline.has_room
        pipeline.send(batch())
    assert not pipeline.has_room
    pipeline.accept(result(1))
    assert not pipeline.has_room  # until the engine has taken it
    assert pipeline.take_result() is not None
    assert pipeline.has_room


async def test_results_come_in_the_order_of_sending(pipeline: Any) -> None:
    pipeline.send(batch())
    pipeline.send(batch())
    assert pipeline.take_result() is None
    pipeline.accept(result(1))
    pipeline.accept(result(2))
    assert [pipeline.take_result().step for _ in range(2)] == [1, 2]
    assert len(pipeline.changes) == 2


async def test_repeats_and_old_epochs_are_dropped(pipeline: Pipeline) -> None:
    pipeline.send(batch())
    pipeline.send(batch())
    pipeline.accept(result(1))
    pipeline.accept(result(1))
    pipeline.accept(result(2, epoch=2))
    assert pipeline.take_result() is not None
    assert pipeline.take_result() is None


async def test_a_result_out_of_order_is_refused(pipeline: Pipeline) -> None:
    pipeline.send(batch())
    pipeline.send(batch())
    with pytest.raises(StepError, match="step 2 came, step 1 is the next"):
        pipeline.accept(result(2))


async def test_a_result_of_a_step_that_was_never_sent_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(StepError):
        pipeline.accept(result(1))


async def test_a_step_says_closes_opens_and_rows_with_their_sampling(pipeline: Any) -> None:
    pipeline.send(batch())
    step = pipeline._steps[1]
    assert (step.epoch, step.step, step.HasField("activation")) == (3, 1, False)
    assert step.commands[0].close.session == 7
    assert (step.commands[1].open.session, step.commands[1].open.max_tokens) == (1, 10)
    (rows,) = step.rows
    assert (rows.session, rows.start_position, list(rows.token_ids)) == (1, 0, [5, 6])
    assert (rows.want_logits, rows.sampling.seed) == (1, 9)


async def test_rows_that_want_no_pick_carry_no_sampling(pipeline: Any) -> None:
    pipeline.send(batch(want_logits=0))
    assert not pipeline._steps[1].rows[0].HasField("sampling")


async def test_picks_failures_and_timings_are_read(pipeline: Any) -> None:
    pipeline.send(batch())
    pick = cluster_pb2.Pick(position=2, token_id=8, logprob=-1.5)
    pick.top.add(token_id=8, logprob=-1.5)
    failure = types_pb2.Failure(
        code=types_pb2.FAILURE_CODE_NOT_FINITE, worker="w1", session=4, message="NaN"
    )
    timing = types_pb2.StageTiming(worker="w1", wait_seconds=1, compute_seconds=2)
    rows = cluster_pb2.RowsResult(session=1, picks=[pick])
    pipeline.accept(result(1, rows=[rows], failures=[failure], timings=[timing]))
    outcome = pipeline.take_result()
    (picked,) = outcome.picks
    assert (picked.session, picked.position, picked.pick.token) == (1, 2, 8)
    assert (picked.pick.logprob, picked.pick.top) == (-1.5, ((8, -1.5),))
    (found,) = outcome.failures
    assert isinstance(found, RowsFailure)
    assert (found.session, type(found.error), str(found.error)) == (4, FrameError, "worker w1: NaN")
    assert (outcome.timings[0].wait, outcome.timings[0].compute) == (1, 2)


async def test_a_broken_link_is_the_fault_of_the_stage_behind_it(pipeline: Pipeline) -> None:
    pipeline.send(batch())
    code = types_pb2.FAILURE_CODE_LINK_LOST
    failure = types_pb2.Failure(code=code, worker="w1", message="socket closed")
    pipeline.accept(result(1, failures=[failure]))
    with pytest.raises(StageLost, match="w2 was lost: socket closed") as lost:
        pipeline.take_result()
    assert lost.value.worker == "w2"
    assert not pipeline.has_room


async def test_a_gap_is_the_fault_of_the_stage_that_says_so(pipeline: Pipeline) -> None:
    pipeline.send(batch())
    code = types_pb2.FAILURE_CODE_GAP
    failure = types_pb2.Failure(code=code, worker="w1", message="step 2 was skipped")
    pipeline.accept(result(1, failures=[failure]))
    with pytest.raises(StageLost) as lost:
        pipeline.take_result()
    assert lost.value.worker == "w1"


async def test_the_first_reason_of_a_loss_stays(pipeline: Pipeline) -> None:
    pipeline.lose(StageLost("first", worker="w1"))
    pipeline.lose(StageLost("second", worker="w2"))
    with pytest.raises(StageLost, match="first"):
        pipeline.take_result()


async def test_a_step_is_overdue_after_a_minute_without_results(pipeline: Pipeline) -> None:
    now = time.monotonic()
    assert not pipeline.is_overdue(now + 1000)
    pipeline.send(batch())
    assert not pipeline.is_overdue(now + 59)
    assert pipeline.is_overdue(now + 61)


async def test_nobody_at_the_first_workers_address_is_a_loss(pipeline: Pipeline) -> None:
    await pipeline.carry()
    with pytest.raises(StageLost, match="w1 was lost"):
        pipeline.take_result()
