"""A worker's connection to the next stage: messages out in order, acknowledgements back.

The next stage is a worker (Worker.Run) or, for the last stage, the coordinator (Fleet.Results).
One task writes, so a message is sent while the next step computes; what waits is bounded, so a slow
next stage slows this one. A broken stream is dialled again once, and what was not acknowledged is
sent again: receivers answer repeats without running them. Broken again before an acknowledgement,
the link is lost for good, and its owner is told; a new plan makes a new link.
Everything here belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc.aio

from potluck.errors import StageLost, Unreachable
from potluck.rpc import options
from potluck.rpc.calls import finished
from potluck.rpc.v1 import cluster_pb2, cluster_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc

if TYPE_CHECKING:
    Call = grpc.aio.StreamStreamCall[Any, Any]

log = logging.getLogger(__name__)

Message = worker_pb2.Step | cluster_pb2.StepResult
Ack = worker_pb2.StepAck | cluster_pb2.ResultAck

# One message is written while one step's result waits; more would only hide that the next stage
# is slower, and hold up to 4 MiB each.
WAITING_MESSAGES = 2
# Refusals that sending once more may cure: a damaged frame, and what followed it.
_WORTH_ANOTHER_TRY = (types_pb2.FAILURE_CODE_BAD_FRAME, types_pb2.FAILURE_CODE_GAP)


@dataclass(slots=True)
class Sending:
    """A message on its way. `sent_at` is on the event loop's clock."""

    message: Message
    activation_bytes: int
    sent_at: float = 0.0
    was_refused: bool = False


class Window:
    """Which message is written next, and which are not acknowledged yet. Pure."""

    def __init__(self) -> None:
        self.waiting: deque[Sending] = deque()
        self.unacked: deque[Sending] = deque()
        self._refused: list[Sending] = []

    def take(self, now: float) -> Sending | None:
        """The message to write now; None: wait for another, or for acknowledgements.

        After a refusal all that is under way comes back first, so that order is kept.
        """
        if self._refused:
            if self.unacked:
                return None
            self.waiting.extendleft(reversed(self._refused))
            self._refused.clear()
        if not self.waiting:
            return None
        sending = self.waiting.popleft()
        sending.sent_at = now
        self.unacked.append(sending)
        return sending

    def is_oldest(self, epoch: int, step: int) -> bool:
        """Whether that is the message whose acknowledgement comes next."""
        if not self.unacked:
            return False
        oldest = self.unacked[0].message
        return (oldest.epoch, oldest.step) == (epoch, step)

    def acknowledge(self) -> Sending:
        """The oldest message has arrived."""
        return self.unacked.popleft()

    def refuse(self, *, may_try_again: bool) -> bool:
        """The oldest message was refused; whether it will be sent once more."""
        sending = self.unacked.popleft()
        if sending.was_refused or not may_try_again:
            return False
        sending.was_refused = True
        self._refused.append(sending)
        return True

    def rewind(self) -> None:
        """The stream broke: all that is not acknowledged waits again, in its old order."""
        self.waiting.extendleft(reversed([*self._refused, *self.unacked]))
        self._refused.clear()
        self.unacked.clear()


class Link:
    """A connection from `worker` to the next stage. `on_failure` hears what comes back upstream.

    `run` is the one task that writes; `send` may be called before it starts. It dials when the
    first message comes.
    """

    def __init__(
        self,
        worker: str,
        to: worker_pb2.NextStage,
        on_failure: Callable[[worker_pb2.StepAck], None],
    ) -> None:
        self.to = to
        self.lost: types_pb2.Failure | None = None
        self.wire_seconds = 0.0  # half of the newest round trip, less the time it was held
        self.sent_bytes = 0
        self.activation_bytes = 0
        self._worker = worker
        self._on_failure = on_failure
        self._window = Window()
        self._wake = asyncio.Event()  # something may be written
        self._room = asyncio.Event()
        self._n_acked = 0
        self._newest = (0, 0)  # epoch and step sent last, for people

    @property
    def figures(self) -> cluster_pb2.LinkFigures:
        """Counted since the link was made."""
        return cluster_pb2.LinkFigures(
            to=self.to.worker,
            rtt_seconds=2 * self.wire_seconds,
            sent_bytes=self.sent_bytes,
            activation_bytes=self.activation_bytes,
        )

    async def send(self, message: Message, activation_bytes: int = 0) -> None:
        """Hands over a message, which is not changed from then on; waits while others wait.

        Raises StageLost if the link is lost.
        """
        while self.lost is None and len(self._window.waiting) >= WAITING_MESSAGES:
            self._room.clear()
            await self._room.wait()
        if self.lost is not None:
            raise StageLost(self.lost.message, worker=self.to.worker)
        self._window.waiting.append(Sending(message, activation_bytes))
        self._wake.set()

    async def run(self) -> None:
        """Keeps the stream until cancelled or lost."""
        loop = asyncio.get_running_loop()
        await self._wake.wait()
        is_second_try = False
        while True:
            n_acked, dialled_at = self._n_acked, loop.time()
            reason = await self._carry()
            log.info("the link to %s broke: %s", self._name, reason)
            held = self._n_acked > n_acked or loop.time() - dialled_at > options.CALL_SECONDS
            if is_second_try and not held:
                self._lose(reason)
                return
            is_second_try = True

    async def _carry(self) -> str:
        """One stream, from dialling to its end; why it ended."""
        reason = ""
        self._window.rewind()
        self._wake.set()
        async with grpc.aio.insecure_channel(
            self.to.address, options=options.client_options()
        ) as channel:
            call = self._dial(channel)
            try:
                async with asyncio.timeout(options.CONNECT_SECONDS):
                    await finished(call.wait_for_connection())
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._write(call))
                    group.create_task(self._read(call))
                    group.create_task(self._watch())
            except* (grpc.aio.AioRpcError, _Broken, Unreachable, TimeoutError) as broken:
                reason = _reason(broken)
            finally:
                call.cancel()
        return reason

    def _dial(self, channel: grpc.aio.Channel) -> Call:
        if self.to.worker:
            return worker_pb2_grpc.WorkerStub(channel).Run()
        return cluster_pb2_grpc.FleetStub(channel).Results()

    async def _write(self, call: Call) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sending = self._window.take(loop.time())
            if sending is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._room.set()
            self._newest = (sending.message.epoch, sending.message.step)
            self.sent_bytes += sending.message.ByteSize()
            self.activation_bytes += sending.activation_bytes
            try:
                await finished(call.write(sending.message))
            except asyncio.InvalidStateError as e:  # the call has ended; its status says more
                raise _Broken(await call.details() or "it closed the stream") from e

    async def _read(self, call: Call) -> None:
        while True:
            ack = await finished(call.read())
            if not isinstance(ack, worker_pb2.StepAck | cluster_pb2.ResultAck):  # grpc.aio.EOF
                raise _Broken("it closed the stream")
            self._take_ack(ack)

    async def _watch(self) -> None:
        """Ends the stream when the oldest message waits too long for its acknowledgement."""
        loop = asyncio.get_running_loop()
        while True:
            unacked = self._window.unacked
            oldest_at = unacked[0].sent_at if unacked else loop.time()
            late_seconds = loop.time() - oldest_at - options.ACK_SECONDS
            if late_seconds >= 0:
                raise _Broken(f"no acknowledgement within {options.ACK_SECONDS:g} s")
            await asyncio.sleep(-late_seconds)

    def _take_ack(self, ack: Ack) -> None:
        failure = ack.failure if isinstance(ack, worker_pb2.StepAck) else None
        if failure is None or not failure.code:
            if not self._window.is_oldest(ack.epoch, ack.step):
                raise _Broken(f"it acknowledged step {ack.step}, which was not next")
            sending = self._window.acknowledge()
            round_trip = asyncio.get_running_loop().time() - sending.sent_at
            self.wire_seconds = max(0.0, (round_trip - ack.held_seconds) / 2)
            self._n_acked += 1
        elif failure.worker == self.to.worker and self._window.is_oldest(ack.epoch, ack.step):
            log.warning("%s refused step %d: %s", self._name, ack.step, failure.message)
            if not self._window.refuse(may_try_again=failure.code in _WORTH_ANOTHER_TRY):
                self._pass_back(ack)
        else:  # of a later stage: on its way to the coordinator
            self._pass_back(ack)
        self._wake.set()

    def _pass_back(self, ack: Ack) -> None:
        assert isinstance(ack, worker_pb2.StepAck)
        self._on_failure(worker_pb2.StepAck(epoch=ack.epoch, step=ack.step, failure=ack.failure))

    def _lose(self, reason: str) -> None:
        message = f"the link to {self._name} at {self.to.address} is lost: {reason}"
        log.warning("%s", message)
        self.lost = types_pb2.Failure(
            code=types_pb2.FAILURE_CODE_LINK_LOST, worker=self._worker, message=message
        )
        self._room.set()
        epoch, step = self._newest
        self._on_failure(worker_pb2.StepAck(epoch=epoch, step=step, failure=self.lost))

    @property
    def _name(self) -> str:
        return f"worker {self.to.worker}" if self.to.worker else "the coordinator"


class _Broken(Exception):
    """The stream can't be used any more."""


def _reason(broken: BaseExceptionGroup[Exception]) -> str:
    """One line of why a stream broke."""
    for error in broken.exceptions:
        if isinstance(error, grpc.aio.AioRpcError):
            details = error.details() or error.code().name
            # gRPC's words on this are a paragraph.
            return "nobody answers" if "failed to connect" in details.lower() else details
        if isinstance(error, _Broken | Unreachable):
            return str(error)
    return f"no connection within {options.CONNECT_SECONDS:g} s"
