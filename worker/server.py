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
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from potluck import catalogue, engine
from potluck.errors import DamagedTensor, PotluckError, StepError
from potluck.packs import PackFolder
from potluck.plan import LayerTimes
from potluck.rpc import options, status
from potluck.rpc.hello import check_hello, hello
from potluck.rpc.measured import layer_shape_of
from potluck.rpc.v1 import (
    cluster_pb2,
    types_pb2,
    weights_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from potluck.tensor_store import TensorStore
from worker.ack_stream import AckStream
from worker.delivery import Delivery
from worker.engine_thread import EngineThread
from worker.exchange import Exchanges
from worker.filling import fill
from worker.kv import KvBudget
from worker.late_tensors import LateTensors
from worker.layer_times import Conditions, layer_times
from worker.link import Link
from worker.orders import order_of
from worker.probe import Machine, Memory
from worker.probe import resources as resources_of
from worker.sessions import Sessions, StageLimits
from worker.shard import Order, Shard
from worker.stage import Stage
from worker.weights import OwnFiles, Weights

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

log = logging.getLogger(__name__)

DAMAGED_TRIES = 3  # loads of which a delivered tensor was damaged on the disk
UNUSED_SECONDS = 5.0  # an epoch without a step, after which sessions of the one before are freed


class Worker(Exchanges):
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
        store: TensorStore | None = None,
    ) -> None:
        self.name = ""
        self.store = store or TensorStore(catalogue.tensors_folder())
        self.own_files = OwnFiles()  # in which tensors were found that others may want
        self.machine = machine
        self.memory = memory
        self.is_loading = False
        self.is_fetching = False
        self.n_steps = 0  # of earlier stages
        self._engine = engine_
        self._packs = packs
        self._tasks = tasks
        self._thread = EngineThread()
        self._stage: Stage | None = None
        self._model: types_pb2.ModelReference | None = None
        self._times: LayerTimes | None = None  # of the layer that the coordinator asked for
        self._fence = 0  # newest epoch that a coordinator gave us
        # The stage that a newer epoch has no steps for, and since when.
        self._fenced: tuple[Stage, float] | None = None
        self._load_lock = asyncio.Lock()
        self._is_closing = False
        self._streams: set[AckStream] = set()

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: Context
    ) -> worker_pb2.DescribeReply:
        """Who this is and what it holds."""
        await _refused(context, check_hello, request.hello, "the caller", "worker")
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
        stream = AckStream(context)
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

    async def probe(self, shape: types_pb2.LayerShape) -> None:
        """Times the coordinator's layers, some seconds once a day. What can't be timed is not."""
        self._times = None
        try:
            layer = layer_shape_of(shape)
            memory = await asyncio.to_thread(self.memory.now)
            conditions = Conditions(
                self.machine.name,
                memory.room_bytes,
                self.machine.cpu_quota,
                lambda: self._is_closing,
            )
            self._times = await self._thread.run(layer_times, self._engine, layer, conditions)
        except (PotluckError, MemoryError) as e:
            log.info("the coordinator's layers are not timed: %s", e)

    async def resources(self) -> types_pb2.Resources:
        """What a shard and its KV may take: what is free, and what this one's shard would free."""
        held = self._stage.shard.shard_bytes if self._stage else 0
        mapped = self._stage.shard.mapped_bytes if self._stage else 0
        memory = await asyncio.to_thread(self.memory.now, mapped)
        resources = resources_of(self.machine, memory, self._times)
        resources.memory_free_bytes += held
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
        beat = cluster_pb2.HeartbeatRequest(
            worker=self.name,
            instance=instance,
            state=self._state(),
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

    def _state(self) -> cluster_pb2.WorkerState.ValueType:
        if self.is_fetching:
            return cluster_pb2.WORKER_STATE_FETCHING
        if self.is_loading:
            return cluster_pb2.WORKER_STATE_LOADING
        return cluster_pb2.WORKER_STATE_READY if self._stage else cluster_pb2.WORKER_STATE_JOINING

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
        order = order_of(request)
        stage = self._stage
        if request.epoch < max(1, self._fence):
            raise StepError(f"epoch {request.epoch} is over; {max(1, self._fence)} is loaded")
        is_repeat = stage is not None and self._fence == request.epoch == stage.epoch
        if is_repeat and not self._is_same(order, request):
            raise StepError(f"epoch {request.epoch} is loaded with another shard or next stage")
        fetched_bytes = 0
        if not is_repeat:
            async with contextlib.aclosing(self._replace(order, request)) as progress:
                async for message in progress:
                    fetched_bytes = message.fetched_bytes
                    yield message
        assert self._stage is not None, "_replace raises or sets it"
        total = self._stage.shard.weights_bytes
        yield worker_pb2.LoadProgress(
            done_bytes=total,
            total_bytes=total,
            ready=self.loaded(),
            fetched_bytes=fetched_bytes,
            fetch_total_bytes=fetched_bytes,
        )

    def _is_same(self, order: Order, request: worker_pb2.LoadRequest) -> bool:
        assert self._stage is not None
        there = (self._stage.shard.order, self._stage.link.to, self._stage.wire_type)
        return there == (order, request.next, request.wire)

    async def _replace(
        self, order: Order, request: worker_pb2.LoadRequest
    ) -> AsyncGenerator[worker_pb2.LoadProgress, None]:
        """Another shard, or the same one for a new epoch."""
        if self._stage is not None and self._stage.shard.order == order:
            shard = self._stage.shard
            budget = self._budget(shard)
            await self._drop_stage()
            if shard.late is not None:
                shard.late.renew(request)
            self._fence = request.epoch
        else:
            made: list[Shard] = []
            async with contextlib.aclosing(self._make(order, request, made)) as progress:
                async for message in progress:
                    yield message
            shard = made[0]
            budget = self._budget(shard)
        link = Link(self.name, request.next, self._pass_back)
        limits = StageLimits(shard.config.vocab, order.context_tokens, order.has_head)
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

    async def _make(
        self, order: Order, request: worker_pb2.LoadRequest, made: list[Shard]
    ) -> AsyncGenerator[worker_pb2.LoadProgress, None]:
        """A shard from weights that are here or are brought here; `made` gets it.

        What is loaded is kept until they are all here. A delivered tensor that turns out to be
        damaged when it is loaded is brought anew.
        """
        async with contextlib.AsyncExitStack() as claims:
            late = LateTensors(request, self.name, self.store) if self._packs else None
            delivery = Delivery(
                order,
                request,
                self.name,
                self.store,
                self.own_files,
                claims,
                makes_packs=late is not None,
            )
            for left in reversed(range(DAMAGED_TRIES)):
                async with contextlib.aclosing(self._deliver(delivery)) as progress:
                    async for message in progress:
                        yield message
                file, config = delivery.file, delivery.config
                shard = Shard(self._engine, self.name, order, file, config, self._packs, late)
                resident_bytes = await self._make_way(request.epoch, shard)
                try:
                    async with contextlib.aclosing(self._fill(shard, resident_bytes)) as progress:
                        async for message in progress:
                            message.fetched_bytes += delivery.fetched_bytes
                            message.fetch_total_bytes += delivery.fetched_bytes
                            yield message
                except DamagedTensor as e:
                    if not left:
                        raise
                    log.warning("%s", e.message)
                    await self._thread.run(shard.free)
                else:
                    made.append(shard)
                    return

    async def _deliver(self, delivery: Delivery) -> AsyncGenerator[worker_pb2.LoadProgress, None]:
        self.is_fetching = True
        try:
            async with contextlib.aclosing(delivery.bring()) as progress:
                async for message in progress:
                    yield message
        finally:
            self.is_fetching = False

    async def _make_way(self, epoch: int, shard: Shard) -> int:
        """Drops what is loaded; how much of mapped weights may stay in memory. Raises Full."""
        self._budget(shard)  # raises while the old one is still here
        before = await self._drop_stage()
        self._fence = epoch
        if before is not None:  # its memory goes back before the new one's is taken
            await self._thread.run(before.free)
        memory = await asyncio.to_thread(self.memory.now)
        return shard.check_memory(memory.free_bytes, memory.room_bytes)

    def _budget(self, shard: Shard) -> KvBudget:
        order = shard.order
        return KvBudget.of_bytes(order.kv_bytes, shard.bytes_per_token, order.max_sessions)

    async def _fill(
        self, shard: Shard, resident_bytes: int
    ) -> AsyncGenerator[worker_pb2.LoadProgress, None]:
        self.is_loading = True
        filling = fill(shard, self._thread, resident_bytes, lambda: self._is_closing)
        try:
            async with contextlib.aclosing(filling) as progress:
                async for message in progress:
                    self.is_fetching = message.fetched_bytes < message.fetch_total_bytes
                    yield message
        finally:
            self.is_loading = self.is_fetching = False

    async def _drop_stage(self) -> Shard | None:
        """Ends the stage; its shard, without sessions, for whoever wants to keep it."""
        if (stage := self._stage) is None:
            return None
        self._stage = self._fenced = None
        self.n_steps += stage.n_steps
        if stage.shard.late is not None:
            stage.shard.late.stop()
        await stage.close()
        return stage.shard

    def _pass_back(self, ack: worker_pb2.StepAck) -> None:
        """To the previous stage, over every stream that is open: old ones end by themselves."""
        for stream in self._streams:
            self._tasks.create_task(stream.tell(ack), name="failure")

    def _not_loaded(self) -> types_pb2.Failure:
        code = types_pb2.FAILURE_CODE_NOT_LOADED
        return types_pb2.Failure(code=code, worker=self.name, message="no shard is loaded here")


@asynccontextmanager
async def open_door(worker: Worker, host: str, port: int) -> AsyncIterator[str]:
    """Serves `worker`; its host:port. Raises PotluckError if the port can't be had."""
    server = grpc.aio.server(
        options=options.server_options(),
        maximum_concurrent_rpcs=options.WORKER_RPCS + options.SERVED_STREAMS,
    )
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
    weights = Weights(worker.store, worker.own_files)
    weights_pb2_grpc.add_WeightsServicer_to_server(weights, server)
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


async def _refused(context: Context, check_: Any, *arguments: Any) -> None:
    """Runs a check; what it raises ends the call with the status it stands for."""
    try:
        check_(*arguments)
    except PotluckError as e:
        await context.abort(status.code_of(e), status.details_of(e))
