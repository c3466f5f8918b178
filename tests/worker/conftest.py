"""Real workers in this process, on loopback, driven by a coordinator that only relays."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from potluck import engine, gguf
from potluck.rpc import PROTOCOL, options
from potluck.rpc.v1 import cluster_pb2, cluster_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc
from potluck.testing import TinyShape, write_tiny
from worker.probe import Machine, Memory
from worker.server import Worker, open_door

Command = types_pb2.KvCommand
DEADLINE_SECONDS = 10.0
SHAPE = TinyShape(n_layers=4, context_tokens=256)


class Fleet(cluster_pb2_grpc.FleetServicer, cluster_pb2_grpc.ClusterServicer):
    """The coordinator's doors: the end of the last link, and who is a member."""

    def __init__(self) -> None:
        self.address = ""
        self.epoch = 0
        self.results: asyncio.Queue[cluster_pb2.StepResult] = asyncio.Queue()
        self.received_bytes = 0
        self.registered: asyncio.Queue[cluster_pb2.RegisterRequest] = asyncio.Queue()
        self.beats: asyncio.Queue[cluster_pb2.HeartbeatRequest] = asyncio.Queue()
        self.left: list[str] = []
        self.known: set[int] = set()  # instances
        self.refuses = grpc.StatusCode.OK  # what Register answers
        self.shape: types_pb2.LayerShape | None = None  # what is to be timed

    async def Join(self, request: Any, context: Any) -> Any:
        return cluster_pb2.JoinReply(fleet_address=self.address, model="tiny", shape=self.shape)

    async def Register(self, request: Any, context: Any) -> Any:
        if self.refuses is not grpc.StatusCode.OK:
            await context.abort(self.refuses, "not you\nbe another")
        self.known.add(request.instance)
        self.registered.put_nowait(request)
        return cluster_pb2.RegisterReply(worker=request.worker or "w7", heartbeat_seconds=0.05)

    async def Heartbeat(self, request: Any, context: Any) -> Any:
        if request.instance not in self.known:
            await context.abort(grpc.StatusCode.NOT_FOUND, "register first")
        self.beats.put_nowait(request)
        return cluster_pb2.HeartbeatReply(epoch=self.epoch)

    async def Leave(self, request: Any, context: Any) -> Any:
        self.left.append(request.worker)
        return cluster_pb2.LeaveReply()

    async def Results(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        async for result in request_iterator:
            self.received_bytes += result.ByteSize()
            yield cluster_pb2.ResultAck(epoch=result.epoch, step=result.step)
            self.results.put_nowait(result)


@dataclass
class Rig:
    """`workers` under the names w0, w1, ...; steps go to the first of the newest plan."""

    model: Path
    fleet: Fleet
    fleet_address: str
    stack: AsyncExitStack
    doors: list[AsyncExitStack] = field(default_factory=list)  # closing one kills the worker
    workers: list[Worker] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    channels: list[grpc.aio.Channel] = field(default_factory=list)
    call: Any = None
    epoch: int = 0
    step: int = 0

    def stub(self, i: int) -> Any:
        return worker_pb2_grpc.WorkerStub(self.channels[i])

    def load_request(self, i: int, span: tuple[int, int], epoch: int, /, **more: Any) -> Any:
        file = gguf.read(self.model)
        is_last = span[1] == SHAPE.n_layers
        to = ("", self.fleet_address) if is_last else (f"w{i + 1}", self.addresses[i + 1])
        fields: dict[str, Any] = {
            "hello": types_pb2.Hello(protocol=PROTOCOL),
            "epoch": epoch,
            "model": types_pb2.ModelReference(
                name="tiny", path=str(self.model), header_sha256=file.header_sha256
            ),
            "span": types_pb2.Span(start=span[0], stop=span[1]),
            "embeds": span[0] == 0,
            "has_head": is_last,
            "context_tokens": 128,
            "kv_bytes": 2**20,
            "kv_type": worker_pb2.KV_TYPE_F16,
            "wire": types_pb2.ACTIVATION_TYPE_F32,
            "next": worker_pb2.NextStage(worker=to[0], address=to[1]),
        }
        return worker_pb2.LoadRequest(**{**fields, **more})

    async def load_one(self, i: int, request: Any) -> list[Any]:
        return [progress async for progress in self.stub(i).Load(request)]

    async def load(self, cuts: Sequence[int] = (), **more: Any) -> None:
        """A new epoch: layers [0, cuts[0]) on w0 and so on."""
        self.epoch, self.step = self.epoch + 1, 0
        bounds = [0, *cuts, SHAPE.n_layers]
        for i, span in enumerate(itertools.pairwise(bounds)):
            await self.load_one(i, self.load_request(i, span, self.epoch, **more))
        await self.dial()

    async def dial(self) -> None:
        """A new stream to the first worker; the old one is closed."""
        if self.call is not None:
            self.call.cancel()
        self.call = self.stub(0).Run()

    async def send(self, *parts: Any, epoch: int = 0, step: int = 0) -> Any:
        """One step; its acknowledgement."""
        if not step:
            self.step += 1
        message = worker_pb2.Step(
            epoch=epoch or self.epoch,
            step=step or self.step,
            commands=[p for p in parts if isinstance(p, Command)],
            rows=[p for p in parts if isinstance(p, types_pb2.Rows)],
        )
        await self.call.write(message)
        return await self.ack()

    async def ack(self) -> Any:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await self.call.read()

    async def result(self) -> cluster_pb2.StepResult:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await self.fleet.results.get()

    async def run(self, *parts: Any) -> cluster_pb2.StepResult:
        """One step and its result."""
        ack = await self.send(*parts)
        assert not ack.HasField("failure"), ack
        result = await self.result()
        assert (result.epoch, result.step) == (self.epoch, self.step)
        return result

    async def kill(self, i: int) -> None:
        """Ends worker i at once."""
        await self.doors[i].aclose()


async def add_worker(rig: Rig, engine_: engine.Engine, tasks: asyncio.TaskGroup) -> None:
    name = f"w{len(rig.workers)}"
    machine = Machine("here", "linux", 1, 1, engine_.isa, 1e9)
    worker = Worker(engine_, machine, Memory(), tasks)
    worker.name = name
    door = await rig.stack.enter_async_context(AsyncExitStack())
    door.push_async_callback(worker.close)
    address = await door.enter_async_context(open_door(worker, "127.0.0.1", 0))
    channel = grpc.aio.insecure_channel(address, options=options.client_options())
    rig.channels.append(await rig.stack.enter_async_context(channel))
    rig.doors.append(door)
    rig.workers.append(worker)
    rig.addresses.append(address)


@asynccontextmanager
async def fleet_of(port: int = 0) -> AsyncIterator[Fleet]:
    fleet = Fleet()
    server = grpc.aio.server(options=options.server_options())
    cluster_pb2_grpc.add_FleetServicer_to_server(fleet, server)
    cluster_pb2_grpc.add_ClusterServicer_to_server(fleet, server)
    fleet.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    await server.start()
    try:
        yield fleet
    finally:
        await server.stop(None)


@asynccontextmanager
async def rig_of(n_workers: int, model: Path, engine_: engine.Engine) -> AsyncIterator[Rig]:
    async with asyncio.TaskGroup() as tasks, AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(fleet_of())
        rig = Rig(model, fleet, fleet.address, stack)
        for _ in range(n_workers):
            await add_worker(rig, engine_, tasks)
        yield rig
        if rig.call is not None:
            rig.call.cancel()


@pytest.fixture(scope="session")
def one_thread() -> engine.Engine:
    return engine.Engine(threads=1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf", SHAPE)


@pytest.fixture
def rig(tiny_model: Path, one_thread: engine.Engine) -> Callable[[int], Any]:
    """`async with rig(2) as r`: two workers."""
    return lambda n_workers: rig_of(n_workers, tiny_model, one_thread)


@pytest.fixture
def fleet() -> Callable[..., Any]:
    """`async with fleet() as f`: a coordinator's doors, both on `f.address`."""
    return fleet_of
