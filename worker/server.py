"""The worker's door: Describe, Load, Run, Cancel. Translates and keeps the one stage of a worker.

Belongs to the event loop. The engine thread is made here, and everything that touches a shard runs
in it: loads, steps, freeing. Whatever comes over the wire, a call may fail but the worker lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from potluck import __version__, engine, wire
from potluck.errors import Cancelled, PotluckError, StepError, UsageError
from potluck.model import KvType
from potluck.packs import PackFolder
from potluck.plan import Span
from potluck.rpc import PROTOCOL, options, status
from potluck.rpc.v1 import cluster_pb2, types_pb2, worker_pb2, worker_pb2_grpc
from worker.engine_thread import EngineThread
from worker.kv import KvBudget
from worker.link import Link
from worker.probe import Machine, Memory
from worker.sessions import Sessions, StageLimits
from worker.shard import Order, Shard, check, find
from worker.stage import Stage

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

log = logging.getLogger(__name__)

DEFAULT_SESSIONS = 256
UNUSED_SECONDS = 5.0  # an epoch without a step, after which sessions of the one before are freed


class Worker(worker_pb2_grpc.WorkerServicer):
    """One worker: an engine, at most one stage, and the streams of the stage before it.

    `name` is the id that the coordinator gave, empty before. `tasks` outlives every stage. Without
    `packs` weights are kept in memory; with them they are mapped.
    """

    def __init__(
        self,
        engine_: engine.Engine,
        machine: Machine,
        memory: Memory,
        tasks: asyncio.TaskGroup,
        packs: PackFolder | None = None,
    ) -> None:
        self.name = ""
        self.machine = machine
        self.memory = memory
        self.is_loading = False
        self.n_steps = 0  # of earlier stages
        self._engine = engine_
        self._packs = packs
        self._tasks = tasks
        self._thread = EngineThread()
        self._stage: Stage | None = None
        self._model: types_pb2.ModelReference | None = None
        self._fence = 0  # newest epoch that a coordinator gave us
        # The stage that a newer epoch has no steps for, and since when.
        self._fenced: tuple[Stage, float] | None = None
        self._load_lock = asyncio.Lock()
        self._is_closing = False
        self._streams: set[_AckStream] = set()

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: Context
    ) -> worker_pb2.DescribeReply:
        """Who this is and what it holds."""
        await _refused(context, _check_hello, request.hello)
        return worker_pb2.DescribeReply(
            hello=hello(),
            worker=self.name,
            resources=await self.resources(),
            loaded=self.loaded(),
            progress=self.progress,
        )

    async def Load(
        self, request: worker_pb2.LoadRequest, context: Context
    ) -> AsyncGenerator[worker_pb2.LoadProgress, None]:
        """Loads a span, or keeps it; see worker.proto."""
        try:
            async with self._load_lock:
                async for progress in self._load(request):
                    yield progress
        except PotluckError as e:
            log.warning("load refused: %s", e.message)
            await context.abort(status.code_of(e), status.details_of(e))
        except (OSError, MemoryError) as e:  # said by the system, not by the file's contents
            log.exception("load failed")
            words = str(e) or type(e).__name__
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"the load failed: {words}")

    async def Run(  # type: ignore[override]  # writes by itself: failures come unasked
        self, request_iterator: AsyncIterator[worker_pb2.Step], context: Context
    ) -> None:
        """A link's receiving end: steps go to the stage, acknowledgements back."""
        stream = _AckStream(context)
        self._streams.add(stream)
        try:
            async for step in request_iterator:
                received_at = time.perf_counter()
                stage = self._stage
                if stage is None:
                    failure: types_pb2.Failure | None = self._not_loaded()
                else:
                    failure = await stage.receive(step, received_at)
                ack = worker_pb2.StepAck(epoch=step.epoch, step=step.step, failure=failure)
                moment = stage.may_acknowledge if stage and failure is None else None
                await stream.acknowledge(ack, received_at, moment)
                if stage is not None:
                    await stage.has_room()
        finally:
            self._streams.discard(stream)

    async def Cancel(
        self, request: worker_pb2.CancelRequest, context: Context
    ) -> worker_pb2.CancelReply:
        """Raises floors at once, outside the links."""
        if self._stage is not None:
            self._stage.flush(request.epoch, request.sessions)
        return worker_pb2.CancelReply()

    @property
    def progress(self) -> int:
        """The engine's counter."""
        return self._stage.shard.progress if self._stage else 0

    async def resources(self) -> types_pb2.Resources:
        """What a shard and its KV may take: what is free, and what this one's shard would free."""
        held = self._stage.shard.shard_bytes if self._stage else 0
        mapped = self._stage.shard.mapped_bytes if self._stage else 0
        memory = await asyncio.to_thread(self.memory.now, mapped)
        resources = types_pb2.Resources(
            machine=self.machine.name,
            platform=self.machine.platform,
            cores=self.machine.cores,
            threads=self.machine.threads,
            isa=self.machine.isa,
            memory_bytes=memory.total_bytes,
            memory_free_bytes=memory.free_bytes + held,
            read_bytes_per_second=self.machine.read_bytes_per_second,
        )
        if self._packs is not None:
            resources.room_bytes = memory.room_bytes + held - mapped
        return resources

    def loaded(self) -> worker_pb2.LoadedShard | None:
        """The shard; None if nothing is loaded."""
        if (stage := self._stage) is None:
            return None
        order = stage.shard.order
        return worker_pb2.LoadedShard(
            epoch=stage.epoch,
            model=self._model,
            span=types_pb2.Span(start=order.span.start, stop=order.span.stop),
            embeds=order.embeds,
            has_head=order.has_head,
            shard_bytes=stage.shard.shard_bytes,
            kv_bytes=stage.shard.kv_bytes,
            kv_used_bytes=stage.sessions.kv_used_bytes,
            sessions=len(stage.sessions),
        )

    async def heartbeat(self, instance: int) -> cluster_pb2.HeartbeatRequest:
        """How this worker is now."""
        stage = self._stage
        mapped = stage.shard.mapped_bytes if stage else 0
        memory = await asyncio.to_thread(self.memory.now, mapped)
        state = cluster_pb2.WORKER_STATE_READY if stage else cluster_pb2.WORKER_STATE_JOINING
        beat = cluster_pb2.HeartbeatRequest(
            worker=self.name,
            instance=instance,
            state=cluster_pb2.WORKER_STATE_LOADING if self.is_loading else state,
            progress=self.progress,
            steps=self.n_steps + (stage.n_steps if stage else 0),
            memory_free_bytes=memory.free_bytes,
            resident_bytes=memory.resident_bytes,
        )
        if stage is not None:
            beat.epoch = stage.epoch
            beat.kv_used_bytes = stage.sessions.kv_used_bytes
            beat.sessions = len(stage.sessions)
            beat.link.CopyFrom(stage.link.figures)
        return beat

    def fence(self, epoch: int) -> None:
        """The coordinator is at this epoch: rows of older ones are stale. Told at each heartbeat.

        If no step of it comes, this stage is in no plan any more, and its sessions are over. They
        are freed now and not by the next load: until enough workers are here, that may be hours.
        """
        stage = self._stage
        if stage is None or epoch <= stage.epoch:
            return
        stage.flush(epoch, ())
        now = asyncio.get_running_loop().time()
        is_used = epoch <= stage.newest_epoch
        if is_used or self._fenced is None or self._fenced[0] is not stage:
            self._fenced = (stage, now)
        elif now - self._fenced[1] > UNUSED_SECONDS and len(stage.sessions):
            self._tasks.create_task(stage.free_sessions(), name="free sessions")

    async def forget(self, *, epochs: bool) -> None:
        """Frees all sessions, keeps the shard: we are alone, or (`epochs`) the fleet is a new one
        and counts its epochs anew.
        """
        if epochs:
            self._fence = 0
        if self._stage is not None:
            self._stage.flush(self._stage.epoch + 1, ())
            await self._stage.free_sessions()

    async def close(self) -> None:
        """Ends the stage, and a load at its next matrix or pack; then the engine thread ends."""
        self._is_closing = True
        await self._drop_stage()
        await asyncio.to_thread(self._thread.close)

    async def _load(
        self, request: worker_pb2.LoadRequest
    ) -> AsyncGenerator[worker_pb2.LoadProgress, None]:
        order = _order_of(request)
        stage = self._stage
        if request.epoch < max(1, self._fence):
            raise StepError(f"epoch {request.epoch} is over; {max(1, self._fence)} is loaded")
        is_repeat = stage is not None and self._fence == request.epoch == stage.epoch
        if is_repeat and not self._is_same(order, request):
            raise StepError(f"epoch {request.epoch} is loaded with another shard or next stage")
        if not is_repeat:
            async with contextlib.aclosing(self._replace(order, request)) as progress:
                async for message in progress:
                    yield message
        assert self._stage is not None, "_replace raises or sets it"
        total = self._stage.shard.weights_bytes
        yield worker_pb2.LoadProgress(done_bytes=total, total_bytes=total, ready=self.loaded())

    def _is_same(self, order: Order, request: worker_pb2.LoadRequest) -> bool:
        assert self._stage is not None
        there = (self._stage.shard.order, self._stage.link.to, self._stage.wire_type)
        return there == (order, request.next, request.wire)

    async def _replace(
        self, order: Order, request: worker_pb2.LoadRequest
    ) -> AsyncGenerator[worker_pb2.LoadProgress, None]:
        """Another shard, or the same one for a new epoch."""
        file, config = await asyncio.to_thread(find, order)
        check(order, config)
        shard = Shard(self._engine, self.name, order, file, config, self._packs)
        budget = KvBudget.of_bytes(order.kv_bytes, shard.bytes_per_token, order.max_sessions)
        before = await self._drop_stage()
        self._fence = request.epoch
        if before is not None and before.order == order:
            shard = before
        else:
            if before is not None:  # its memory goes back before the new one's is taken
                await self._thread.run(before.free)
            memory = await asyncio.to_thread(self.memory.now)
            resident_bytes = shard.check_memory(memory.free_bytes, memory.room_bytes)
            async with contextlib.aclosing(self._fill(shard, resident_bytes)) as progress:
                async for message in progress:
                    yield message
        link = Link(self.name, request.next, self._pass_back)
        limits = StageLimits(config.vocab, order.context_tokens, order.has_head)
        sessions = Sessions(self.name, limits, budget)
        self._model = request.model
        self._stage = Stage(
            self.name,
            request.epoch,
            shard,
            sessions,
            link,
            request.wire,
            self._thread,
            self._pass_back,
        )
        self._stage.start(self._tasks)
        log.info("epoch %d: layers %s of %s", request.epoch, order.span, order.model_name)

    async def _fill(
        self, shard: Shard, resident_bytes: int
    ) -> AsyncGenerator[worker_pb2.LoadProgress, None]:
        """Loads in the engine thread; stops at the next matrix or pack if nobody listens any more.

        One of them may take minutes on a slow disk: meanwhile the engine's counter tells.
        """
        loop = asyncio.get_running_loop()
        progress: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        is_given_up = False

        def on_progress(done_bytes: int, matrix: str) -> None:
            if is_given_up or self._is_closing:
                raise Cancelled("the load was given up")
            loop.call_soon_threadsafe(progress.put_nowait, (done_bytes, matrix))

        self.is_loading = True
        loading = self._thread.run(shard.load, on_progress, resident_bytes)
        loading.add_done_callback(lambda _: progress.put_nowait(None))
        done_bytes, matrix, counted = 0, "", 0
        try:
            while True:
                try:
                    async with asyncio.timeout(options.LOAD_NEWS_SECONDS):
                        news = await progress.get()
                except TimeoutError:
                    if shard.progress == counted:
                        continue
                else:
                    if news is None:
                        break
                    done_bytes, matrix = news
                counted = shard.progress
                yield worker_pb2.LoadProgress(
                    done_bytes=done_bytes, total_bytes=shard.weights_bytes, matrix=matrix
                )
            await loading
        finally:
            is_given_up = True
            self.is_loading = False
            await asyncio.gather(loading, return_exceptions=True)

    async def _drop_stage(self) -> Shard | None:
        """Ends the stage; its shard, without sessions, for whoever wants to keep it."""
        if (stage := self._stage) is None:
            return None
        self._stage = self._fenced = None
        self.n_steps += stage.n_steps
        await stage.close()
        return stage.shard

    def _pass_back(self, ack: worker_pb2.StepAck) -> None:
        """To the previous stage, over every stream that is open: old ones end by themselves."""
        for stream in self._streams:
            self._tasks.create_task(stream.tell(ack), name="failure")

    def _not_loaded(self) -> types_pb2.Failure:
        code = types_pb2.FAILURE_CODE_NOT_LOADED
        return types_pb2.Failure(code=code, worker=self.name, message="no shard is loaded here")


class _AckStream:
    """The answering half of a Run stream; acknowledgements and failures share it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = asyncio.Lock()  # gRPC takes one write at a time

    async def acknowledge(
        self,
        ack: worker_pb2.StepAck,
        received_at: float,
        moment: Callable[[], Awaitable[None]] | None,
    ) -> None:
        """Waits for the moment and writes; a failure of the same step does not overtake it."""
        async with self._lock:
            if moment is not None:
                await moment()
            ack.held_seconds = time.perf_counter() - received_at
            await self._write(ack)

    async def tell(self, failure: worker_pb2.StepAck) -> None:
        """Writes what comes back unasked."""
        async with self._lock:
            await self._write(failure)

    async def _write(self, ack: worker_pb2.StepAck) -> None:
        try:
            await self._context.write(ack)
        except (grpc.aio.UsageError, grpc.aio.InternalError, asyncio.InvalidStateError) as e:
            # Nobody listens any more: then there is nobody to tell.
            log.debug("an acknowledgement found no reader: %s", e)


def hello() -> types_pb2.Hello:
    """This side's version."""
    return types_pb2.Hello(protocol=PROTOCOL, potluck_version=__version__)


@asynccontextmanager
async def open_door(worker: Worker, host: str, port: int) -> AsyncIterator[str]:
    """Serves `worker`; its host:port. Raises PotluckError if the port can't be had."""
    server = grpc.aio.server(
        options=options.server_options(), maximum_concurrent_rpcs=options.WORKER_RPCS
    )
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
    _check_port(host, port)
    shown = f"[{host}]" if ":" in host else host
    bound = server.add_insecure_port(f"{shown}:{port}")
    await server.start()
    try:
        yield f"{shown}:{bound}"
    finally:
        await server.stop(None)


def _check_port(host: str, port: int) -> None:
    """Asks the system first: gRPC would write the reason to its own log and tell us nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
            probe.bind((host, port))
    except OSError as e:
        remedy = "choose another port with --port, or 0 for any free one"
        if e.errno == errno.EADDRINUSE:
            raise PotluckError(f"port {port} on {host} is in use", remedy=remedy) from e
        reason = (e.strerror or "no reason given").lower()
        raise PotluckError(f"port {port} on {host}: {reason}", remedy=remedy) from e


_KV_TYPES: dict[int, KvType] = {
    worker_pb2.KV_TYPE_F16: KvType.F16,
    worker_pb2.KV_TYPE_Q8: KvType.Q8,
}


def _order_of(request: worker_pb2.LoadRequest) -> Order:
    """Raises UsageError: a field that no plan has. worker/shard.py checks it against the model."""
    _check_hello(request.hello)
    if request.epoch == 0:
        raise UsageError("epoch: counted from 1")
    if request.span.start >= request.span.stop:
        raise UsageError(f"span [{request.span.start}, {request.span.stop}) holds no layer")
    if request.kv_type not in _KV_TYPES:
        raise UsageError(f"kv_type {request.kv_type}: f16 or q8")
    if request.wire not in wire.TYPE_NAMES:
        raise UsageError(f"wire {request.wire}: f32, f16 or q8")
    if not request.next.address:
        raise UsageError("next.address: where results go")
    return Order(
        model_name=request.model.name,
        model_path=request.model.path,
        header_sha256=request.model.header_sha256,
        span=Span(request.span.start, request.span.stop),
        embeds=request.embeds,
        has_head=request.has_head,
        context_tokens=request.context_tokens,
        kv_bytes=request.kv_bytes,
        max_sessions=request.max_sessions or DEFAULT_SESSIONS,
        kv_type=_KV_TYPES[request.kv_type],
    )


def _check_hello(message: types_pb2.Hello) -> None:
    """Raises UsageError unless the caller's protocol works with ours."""
    if message.protocol == 0 or abs(message.protocol - PROTOCOL) > 1:
        raise UsageError(
            f"the caller speaks protocol {message.protocol}"
            f" (potluck {message.potluck_version or '?'}), this worker {PROTOCOL}"
            f" (potluck {__version__})",
            remedy="install the same version of potluck on all machines",
        )


async def _refused(context: Context, check_: Any, *arguments: Any) -> None:
    """Runs a check; what it raises ends the call with the status it stands for."""
    try:
        check_(*arguments)
    except PotluckError as e:
        await context.abort(status.code_of(e), status.details_of(e))
