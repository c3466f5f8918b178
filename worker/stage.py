"""One span of a plan at work: steps in, computed one by one in order, results out over the link.

Three tasks at most: the previous stage's stream hands steps in (`receive`), one computes, one
sends; so a step is received and another is sent while a third is in the engine. The computing
itself happens in the engine thread. Everything else here belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from potluck import wire
from potluck.errors import FrameError, PotluckError, StageLost
from potluck.rpc import status
from potluck.rpc.v1 import cluster_pb2, types_pb2, worker_pb2
from potluck.sampling import Pick
from potluck.wire import Hidden
from worker.engine_thread import EngineThread
from worker.link import Link, Message
from worker.sessions import Sessions, StepWork
from worker.shard import Shard, StepOutput
from worker.steps import Arrival, Remembered, StepOrder, check_batch

M = TypeVar("M", types_pb2.Rows, types_pb2.KvCommand)

log = logging.getLogger(__name__)

# Received and not yet computed; the coordinator has one more in flight than there are stages.
INCOMING_STEPS = 16
# How long an acknowledgement may wait for the step itself; its sender waits 10 s.
ACK_DELAY_SECONDS = 0.001
# Checking a larger activation takes over 0.1 ms: not on the event loop.
_LARGE_BYTES = 256 * 1024
_FOREVER = 2**64


@dataclass(slots=True)
class _Arrived:
    """A step on its way to the engine. Times: time.perf_counter()."""

    step: worker_pb2.Step
    arrival: Arrival
    hidden: Hidden | None  # [rows, dim]; None on the first stage and without rows
    received_at: float
    decode_seconds: float


class Stage:
    """A shard with its sessions, its place in an epoch and its link.

    `tell` gets what goes back to the previous stage unasked: failures of the link and of later
    stages. `thread` is the engine thread.
    """

    def __init__(
        self,
        worker: str,
        epoch: int,
        shard: Shard,
        sessions: Sessions,
        link: Link,
        wire_type: types_pb2.ActivationType.ValueType,
        thread: EngineThread,
        tell: Callable[[worker_pb2.StepAck], None],
    ) -> None:
        self.epoch = epoch
        self.shard = shard
        self.sessions = sessions
        self.link = link
        self.wire_type = wire_type
        self.n_steps = 0
        self._worker = worker
        self._thread = thread
        self._tell = tell
        self._order = StepOrder(epoch)
        self._remembered = Remembered[Message]()
        self._incoming: asyncio.Queue[_Arrived] = asyncio.Queue()
        self._taken = asyncio.Event()
        self._sent = asyncio.Event()
        self._running: tuple[int, StepWork] | None = None  # epoch and work that is in the engine
        self._task: asyncio.Task[None] | None = None

    @property
    def newest_epoch(self) -> int:
        """Of the steps that came, at least the one that was loaded."""
        return self._order.epoch

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Begins to compute; `close` ends it."""
        self._task = tasks.create_task(self._run(), name=f"stage of epoch {self.epoch}")

    async def close(self) -> None:
        """Ends the tasks and frees the sessions; a step in the engine stops at its next layer."""
        self.sessions.raise_floor(_FOREVER)
        self.shard.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.free_sessions()

    async def free_sessions(self) -> None:
        """Closes all sessions, here and in the engine."""
        closed = self.sessions.clear()
        await self._thread.run(self.shard.close, closed)

    def flush(self, epoch: int, sessions: Iterable[int]) -> None:
        """Makes rows of steps below `epoch` stale, and stops the engine if it runs nothing else."""
        self.sessions.raise_floor(epoch, sessions)
        if self._running is not None:
            running, work = self._running
            if all(self.sessions.is_stale(row.session, running) for row in work.rows):
                self.shard.cancel()

    async def receive(self, step: worker_pb2.Step, received_at: float) -> types_pb2.Failure | None:
        """Checks a step and queues it; or why it is refused, and then nothing has changed."""
        if self.link.lost is not None:
            return self.link.lost
        try:
            arrival = self._order.check(step.epoch, step.step)
            hidden = None
            if arrival is Arrival.NEXT:
                hidden = await self._decode(step)
                # Meanwhile the same step may have come over a stream that was dialled again.
                arrival = self._order.check(step.epoch, step.step)
        except PotluckError as e:
            log.warning("step %d of epoch %d is refused: %s", step.step, step.epoch, e.message)
            code = status.failure_code_of(e)
            return types_pb2.Failure(code=code, worker=self._worker, message=e.message)
        if arrival is Arrival.NEXT:
            self._order.accept(step.epoch, step.step)
        seconds = time.perf_counter() - received_at
        self._incoming.put_nowait(_Arrived(step, arrival, hidden, received_at, seconds))
        return None

    async def may_acknowledge(self) -> None:
        """Returns when an acknowledgement holds up no step: at once while the engine computes, else
        when the step just received has been sent on, or after ACK_DELAY_SECONDS.

        Writing one takes 0.1 ms of this process's Python, which the engine thread needs to begin
        and the link to send. Acknowledging first cost 0.06 ms a stage.
        """
        if self._running is not None:
            return
        self._sent.clear()
        timer = asyncio.get_running_loop().call_later(ACK_DELAY_SECONDS, self._sent.set)
        await self._sent.wait()
        timer.cancel()

    async def has_room(self) -> None:
        """Returns when another step may be received: a slow stage slows the one before it."""
        while self._incoming.qsize() >= INCOMING_STEPS:
            self._taken.clear()
            await self._taken.wait()

    async def _decode(self, step: worker_pb2.Step) -> Hidden | None:
        n_rows = check_batch(step, embeds=self.shard.order.embeds)
        if n_rows == 0 or self.shard.order.embeds:
            return None
        dim = self.shard.config.dim
        if n_rows * dim * 4 > _LARGE_BYTES:
            return await asyncio.to_thread(wire.from_message, step.activation, n_rows, dim)
        return wire.from_message(step.activation, n_rows, dim)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.link.run(), name="link")
            group.create_task(self._compute(), name="compute")

    async def _compute(self) -> None:
        """The one task that runs steps and changes sessions."""
        while True:
            arrived = await self._incoming.get()
            self._taken.set()
            epoch, number = arrived.step.epoch, arrived.step.step
            if self.link.lost is not None:
                continue
            try:
                await self._answer(arrived)
            except StageLost as e:  # the link has told the previous stage
                log.debug("step %d of epoch %d: %s", number, epoch, e.message)
            except Exception:  # the outermost frame of a step: others go on
                log.exception("step %d of epoch %d: a defect", number, epoch)
                failure = types_pb2.Failure(
                    code=types_pb2.FAILURE_CODE_INTERNAL,
                    worker=self._worker,
                    message=f"step {number} met a defect; the worker's log has the traceback",
                )
                self._tell(worker_pb2.StepAck(epoch=epoch, step=number, failure=failure))

    async def _answer(self, arrived: _Arrived) -> None:
        """Runs a step and sends what comes of it; a repeat is answered from memory."""
        step = arrived.step
        epoch, number = step.epoch, step.step
        if arrived.arrival is Arrival.REPEAT:
            answer = self._remembered.find(epoch, number)
            if answer is None:
                forgotten = f"step {number} of epoch {epoch} is no longer remembered"
                code = types_pb2.FAILURE_CODE_GAP
                failure = types_pb2.Failure(code=code, worker=self._worker, message=forgotten)
                self._tell(worker_pb2.StepAck(epoch=epoch, step=number, failure=failure))
                return
            await self.link.send(answer)
            return
        if arrived.arrival is Arrival.STALE:
            del step.rows[:], step.commands[:]
        work = self.sessions.decide(step)
        self._running = (epoch, work)
        try:
            output, message, activation_bytes = await self._thread.run(
                self._run_step, arrived, work
            )
        finally:
            self._running = None
        self.sessions.confirm(output.rows)
        for session in output.closed:
            self.sessions.forget(session)
        self.n_steps += 1
        if arrived.arrival is Arrival.NEXT:
            self._remembered.keep(epoch, number, message, message.ByteSize())
        await self.link.send(message, activation_bytes)
        self._sent.set()

    def _run_step(self, arrived: _Arrived, work: StepWork) -> tuple[StepOutput, Message, int]:
        """The engine thread's part: compute, then write the message; its activation's bytes."""
        step = arrived.step
        output = self.shard.run(
            work,
            _token_ids(step) if arrived.hidden is None else arrived.hidden,
            lambda session: self.sessions.is_stale(session, step.epoch),
        )
        before = time.perf_counter()
        failures = [*work.failures, *output.failures]
        message: Message
        if self.shard.order.has_head:
            message = _result(step, output, failures)
            activation_bytes = 0
        else:
            activation_bytes = self._pass_on(step, work, output, failures)
            message = step
        now = time.perf_counter()
        timing = message.timings.add(
            worker=self._worker,
            wait_seconds=output.started_at - arrived.received_at - arrived.decode_seconds,
            compute_seconds=output.compute_seconds,
            serialise_seconds=arrived.decode_seconds + now - before,
            wire_seconds=self.link.wire_seconds,
        )
        timing.sent_bytes = message.ByteSize()
        return output, message, activation_bytes

    def _pass_on(
        self,
        step: worker_pb2.Step,
        work: StepWork,
        output: StepOutput,
        failures: list[types_pb2.Failure],
    ) -> int:
        """Turns the step that came into the one that goes: without what failed here."""
        if len(output.rows) != len(step.rows):
            kept = [_copy(step.rows[row.place]) for row in output.rows]
            del step.rows[:]
            step.rows.extend(kept)
        commands = [_copy(c) for c in work.commands if _opened(c) not in output.closed]
        if len(commands) != len(step.commands):
            del step.commands[:]
            step.commands.extend(commands)
        step.failures.extend(failures)
        if output.hidden is None:
            step.ClearField("activation")
            return 0
        try:
            wire.write(output.hidden, self.wire_type, step.activation)
        except FrameError as e:  # f16 and q8 can't write every value
            code = status.failure_code_of(e)
            step.failures.add(code=code, worker=self._worker, message=e.message)
            del step.rows[:]
            step.ClearField("activation")
            return 0
        return len(output.hidden) * wire.row_bytes(self.wire_type, self.shard.config.dim)


def _token_ids(step: worker_pb2.Step) -> npt.NDArray[np.int32]:
    """[rows] of the whole batch. A refused one may be above 2^31; its rows are never taken."""
    ids = [token for rows in step.rows for token in rows.token_ids]
    return np.array(ids, dtype=np.uint32).view(np.int32)


def _opened(command: types_pb2.KvCommand) -> int:
    """The session that a command opens; 0: none."""
    return command.open.session or command.fork.new_session


def _copy(message: M) -> M:
    """An element of a repeated field that outlives it."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def _result(
    step: worker_pb2.Step, output: StepOutput, failures: list[types_pb2.Failure]
) -> cluster_pb2.StepResult:
    """What the last stage says of a step."""
    result = cluster_pb2.StepResult(epoch=step.epoch, step=step.step)
    for row, picks in zip(output.rows, output.picks, strict=True):
        if picks:
            first = row.start + row.n_tokens - row.want_logits + 1
            result.rows.add(
                session=row.session,
                picks=[_pick(first + i, pick) for i, pick in enumerate(picks)],
            )
    result.failures.extend([*step.failures, *failures])
    result.timings.extend(step.timings)
    return result


def _pick(position: int, pick: Pick) -> cluster_pb2.Pick:
    return cluster_pb2.Pick(
        position=position,
        token_id=pick.token,
        logprob=pick.logprob,
        top=[cluster_pb2.TokenLogprob(token_id=i, logprob=x) for i, x in pick.top],
    )
