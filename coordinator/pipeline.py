"""The stages of a plan, connected: steps to the first, results from the last.

One object per epoch. It carries and counts, it decides nothing: what a step holds is the
scheduler's business, what a loss means the engine's. All methods belong to the event loop.
Activations go from worker to worker; `traffic` looks at every message that passes here and would
show it if they did not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from coordinator import messages
from coordinator.figures import Traffic
from coordinator.messages import Outcome
from coordinator.scheduler import Batch
from potluck.errors import StageLost, StepError, Unreachable
from potluck.plan import Plan, WorkerId
from potluck.rpc import options
from potluck.rpc.calls import finished
from potluck.rpc.v1 import cluster_pb2, types_pb2, worker_pb2, worker_pb2_grpc

if TYPE_CHECKING:
    Run = grpc.aio.StreamStreamCall[worker_pb2.Step, worker_pb2.StepAck]

log = logging.getLogger(__name__)


class Pipeline:
    """Steps in flight through the stages of `plan`, in order, at most one more than stages.

    One more, so that a step waits at the first stage when it gets free (PIPELINE section 5).
    `on_change` is called when a result has come or the pipeline is lost.
    """

    def __init__(
        self, plan: Plan, epoch: int, channel: grpc.aio.Channel, on_change: Callable[[], None]
    ) -> None:
        self.plan = plan
        self.epoch = epoch
        self.traffic = Traffic()
        self.shard_bytes: dict[WorkerId, int] = {}  # as loaded
        self.rtt_seconds = 0.0  # of the newest acknowledged step, less the time it was held
        self._stub = worker_pb2_grpc.WorkerStub(channel)
        self._on_change = on_change
        self._depth = len(plan.stages) + 1
        self._n_sent = 0
        self._n_acked = 0
        self._steps: dict[int, worker_pb2.Step] = {}  # without a result, oldest first
        self._sent_at: dict[int, float] = {}
        self._to_write: deque[int] = deque()
        self._writable = asyncio.Event()
        self._results: deque[Outcome] = deque()
        self._quiet_since = time.monotonic()
        self._lost: StageLost | None = None
        self._results_link = 0  # how many Results streams are open
        self._grace: asyncio.TimerHandle | None = None

    @property
    def has_room(self) -> bool:
        """Whether another step may be sent."""
        return self._lost is None and len(self._steps) + len(self._results) < self._depth

    def send(self, batch: Batch) -> None:
        """Numbers a step and hands it to the link; `has_room` bounds what waits there."""
        assert self.has_room, "the engine asks first"
        if not self._steps:
            self._quiet_since = time.monotonic()
        self._n_sent += 1
        self._steps[self._n_sent] = messages.step_message(self.epoch, self._n_sent, batch)
        self._to_write.append(self._n_sent)
        self._writable.set()

    def take_result(self) -> Outcome | None:
        """The next step's outcome, in the order of sending; None if there is none yet.

        Raises StageLost, which says which worker is gone.
        """
        if self._lost is not None:
            raise self._lost
        return self._results.popleft() if self._results else None

    def accept(self, result: cluster_pb2.StepResult) -> None:
        """A result from the last stage. Old epochs and repeats are dropped.

        Raises StepError on a gap.
        """
        self.traffic.received_bytes += result.ByteSize()
        if result.epoch != self.epoch or result.step < self._oldest():
            return
        if result.step != self._oldest() or result.step not in self._steps:
            raise StepError(
                f"a result for step {result.step} came, step {self._oldest()} is the next one"
            )
        del self._steps[result.step]
        self._quiet_since = time.monotonic()
        outcome = messages.outcome_of(result)
        if outcome.breaking is not None:
            self.lose(self._blame(outcome.breaking))
            return
        self._results.append(outcome)
        self._on_change()

    def results_dialled(self) -> None:
        """A link for results is there; whose it is, its first result will say.

        Dialled again, it may have none to bring for as long as nobody asks anything: so the worker
        is not given up any more. If the link is no good, the worker says so to the stage before it.
        """
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    def results_opened(self) -> None:
        """The last stage sends results over a new link."""
        self._results_link += 1
        self.results_dialled()

    def results_closed(self) -> None:
        """It broke. The worker may dial again; if it does not, it is lost."""
        self._results_link -= 1
        if self._results_link == 0 and self._grace is None and self._lost is None:
            last = self.plan.stages[-1].worker
            gone = StageLost(f"worker {last} no longer sends results", worker=last)
            loop = asyncio.get_running_loop()
            self._grace = loop.call_later(options.CONNECT_SECONDS, self.lose, gone)

    def lose(self, lost: StageLost) -> None:
        """The pipeline is broken; the first reason stays."""
        if self._lost is None:
            self._lost = lost
            self._on_change()

    def is_overdue(self, now: float) -> bool:
        """Whether steps are in flight and none came back for too long (clock: time.monotonic)."""
        return bool(self._steps) and now - self._quiet_since > options.STEP_FLOOR_SECONDS

    def close(self) -> None:
        """Forgets timers; the link ends with its task."""
        if self._grace is not None:
            self._grace.cancel()

    async def carry(self) -> None:
        """The link to the first stage, until cancelled or lost. Broken, it is dialled again once.

        What has no result yet is then sent again; a stage answers repeats without running them.
        """
        first = self.plan.stages[0].worker
        is_second_try = False
        while self._lost is None:
            acked_before, dialled_at = self._n_acked, time.monotonic()
            self._to_write = deque(self._steps)
            try:
                async with asyncio.TaskGroup() as group:
                    call = self._stub.Run()
                    group.create_task(self._write(call))
                    group.create_task(self._read(call, first))
            except* (grpc.aio.AioRpcError, StageLost, Unreachable, TimeoutError) as broken:
                reason = _reason(broken)
                log.info("the link to worker %s broke: %s", first, reason)
                has_worked = (
                    self._n_acked > acked_before
                    or time.monotonic() - dialled_at > options.CALL_SECONDS
                )
                if is_second_try and not has_worked:
                    self.lose(StageLost(f"worker {first} was lost: {reason}", worker=first))
                is_second_try = True

    def link_ended(self, link: asyncio.Task[None]) -> None:
        """Its task is over. After a defect no step would ever go out, and nobody would know."""
        if not link.cancelled() and (error := link.exception()) is not None:
            first = self.plan.stages[0].worker
            log.error("the link to worker %s met a defect", first, exc_info=error)
            self.lose(StageLost(f"the link to worker {first} met a defect", worker=first))

    async def _write(self, call: Run) -> None:
        try:
            while True:
                while self._to_write:
                    step = self._steps.get(number := self._to_write.popleft())
                    if step is None:
                        continue  # its result has come since the link broke
                    self._sent_at[number] = time.monotonic()
                    self.traffic.sent_bytes += step.ByteSize()
                    self.traffic.activation_bytes += len(step.activation.values)
                    async with asyncio.timeout(options.ACK_SECONDS):
                        await finished(call.write(step))
                self._writable.clear()
                await self._writable.wait()
        except asyncio.InvalidStateError as error:  # the call ended under us; the reader knows why
            log.debug("write to an ended link: %s", error)
        finally:
            call.cancel()

    async def _read(self, call: Run, first: WorkerId) -> None:
        """Acknowledgements. Silence is no fault here: keepalive and the results watch for that."""
        while isinstance(ack := await finished(call.read()), worker_pb2.StepAck):
            if ack.epoch not in (0, self.epoch):
                continue  # news of an old epoch
            sent_at = self._sent_at.pop(ack.step, None)
            self._n_acked += 1
            if sent_at is not None:
                self.rtt_seconds = max(1e-9, time.monotonic() - sent_at - ack.held_seconds)
            if ack.HasField("failure"):
                self.lose(self._blame(ack.failure))
        raise StageLost("it closed the link", worker=first)

    def _oldest(self) -> int:
        return next(iter(self._steps), self._n_sent + 1)

    def _blame(self, failure: types_pb2.Failure) -> StageLost:
        """Who is lost: the one that failed, or the one after it whose link does not answer."""
        ids = [stage.worker for stage in self.plan.stages]
        worker = WorkerId(failure.worker)
        if failure.code == types_pb2.FAILURE_CODE_LINK_LOST and worker in ids[:-1]:
            worker = ids[ids.index(worker) + 1]
        return StageLost(f"worker {worker} was lost: {failure.message}", worker=worker)


def dial(address: str) -> grpc.aio.Channel:
    """A channel with our options. It connects on first use."""
    return grpc.aio.insecure_channel(address, options=options.client_options())


@asynccontextmanager
async def connected(
    plan: Plan, epoch: int, address: str, on_change: Callable[[], None]
) -> AsyncIterator[Pipeline]:
    """A pipeline whose stages are loaded; `address` is the first worker's."""
    async with dial(address) as channel:
        pipeline = Pipeline(plan, epoch, channel, on_change)
        link = asyncio.create_task(pipeline.carry(), name=f"link of epoch {epoch}")
        link.add_done_callback(pipeline.link_ended)
        try:
            yield pipeline
        finally:
            pipeline.close()
            link.cancel()
            await asyncio.gather(link, return_exceptions=True)


def _reason(broken: BaseExceptionGroup[Exception]) -> str:
    """One line of why a link broke."""
    for error in broken.exceptions:
        if isinstance(error, grpc.aio.AioRpcError):
            return error.details() or error.code().name
        if isinstance(error, StageLost | Unreachable):
            return error.message
    return f"it took no step for {options.ACK_SECONDS:g} s"
