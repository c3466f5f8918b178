"""From a plan to a pipeline: each worker loads its span, all at once, with progress.

An effect without state. A worker that does not answer, or makes no progress, is lost; one that
answers "no" (file not here, too little memory) makes the plan fail, with the worker's own words.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import grpc.aio

from coordinator import messages
from coordinator.fleet import LoadNews
from coordinator.pipeline import Pipeline, connected, dial
from potluck.errors import PlanError, PotluckError, StageLost, Unreachable
from potluck.model import KvType
from potluck.plan import Plan, Stage, WorkerId
from potluck.rpc import options
from potluck.rpc.calls import finished
from potluck.rpc.hello import hello
from potluck.rpc.v1 import types_pb2, worker_pb2, worker_pb2_grpc

# What a worker answers when it is there and refuses; anything else means that it is gone.
_REFUSALS = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
    }
)

MOST_NEIGHBOURS = 32  # that a worker asks what they have

Progress = Callable[[WorkerId, LoadNews], None]


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """What all stages of a plan are told alike."""

    epoch: int
    model: types_pb2.ModelReference
    context_tokens: int
    max_sessions: int
    kv_type: KvType
    wire: str  # f32, f16 or q8: what each stage sends
    addresses: Mapping[WorkerId, str]  # host:port of each worker of the plan
    fleet_address: str  # where the last stage sends results
    weights_address: str = ""  # where workers get tensors; "": they need none, or have them


@asynccontextmanager
async def open_pipeline(
    plan: Plan, order: LoadOrder, on_progress: Progress, on_change: Callable[[], None]
) -> AsyncIterator[Pipeline]:
    """A pipeline whose stages are loaded, until the context ends. Raises as `load` does."""
    loaded = await load(plan, order, on_progress)
    first = order.addresses[plan.stages[0].worker]
    async with connected(plan, order.epoch, first, on_change) as pipeline:
        pipeline.shard_bytes = {worker: shard.shard_bytes for worker, shard in loaded.items()}
        yield pipeline


async def load(
    plan: Plan, order: LoadOrder, on_progress: Progress
) -> dict[WorkerId, worker_pb2.LoadedShard]:
    """Loads all stages in parallel; what each of them holds then.

    Raises StageLost if a worker does not answer, PlanError with its words if it refuses.
    """
    loaded: dict[WorkerId, worker_pb2.LoadedShard] = {}

    async def load_one(i: int) -> None:
        worker = plan.stages[i].worker
        loaded[worker] = await _load(plan.stages[i], _request(plan, order, i), order, on_progress)

    try:
        async with asyncio.TaskGroup() as group:
            for i in range(len(plan.stages)):
                group.create_task(load_one(i))
    except* PotluckError as failed:
        first = failed.exceptions[0]
        assert isinstance(first, PotluckError), "load_one raises no groups"
        raise first from first.__cause__
    return loaded


async def _load(
    stage: Stage, request: worker_pb2.LoadRequest, order: LoadOrder, on_progress: Progress
) -> worker_pb2.LoadedShard:
    address = order.addresses[stage.worker]
    ready: worker_pb2.LoadedShard | None = None
    try:
        async with dial(address) as channel:
            async with asyncio.timeout(options.CONNECT_SECONDS):
                await channel.channel_ready()
            call = worker_pb2_grpc.WorkerStub(channel).Load(request)
            while True:
                async with asyncio.timeout(options.LOAD_STALL_SECONDS):
                    message = await finished(call.read())
                if not isinstance(message, worker_pb2.LoadProgress):  # grpc.aio.EOF
                    break
                on_progress(stage.worker, messages.load_news_of(message))
                if message.HasField("ready"):
                    ready = message.ready
    except grpc.aio.AioRpcError as error:
        raise _failure(stage.worker, error) from error
    except Unreachable as error:
        raise StageLost(
            f"worker {stage.worker} was lost while it loaded: {error.message}", worker=stage.worker
        ) from error
    except TimeoutError as error:
        raise StageLost(
            f"worker {stage.worker} at {address} does not answer", worker=stage.worker
        ) from error
    if ready is None:
        raise StageLost(f"worker {stage.worker} ended its load early", worker=stage.worker)
    return ready


def _failure(worker: WorkerId, error: grpc.aio.AioRpcError) -> PotluckError:
    message, _, remedy = (error.details() or error.code().name).partition("\n")
    if error.code() in _REFUSALS:
        return PlanError(f"worker {worker}: {message}", remedy=remedy)
    return StageLost(f"worker {worker} was lost while it loaded: {message}", worker=worker)


def _request(plan: Plan, order: LoadOrder, i: int) -> worker_pb2.LoadRequest:
    stage = plan.stages[i]
    return worker_pb2.LoadRequest(
        hello=hello(),
        epoch=order.epoch,
        model=order.model,
        span=types_pb2.Span(start=stage.span.start, stop=stage.span.stop),
        embeds=stage.embeds,
        has_head=stage.has_head,
        context_tokens=order.context_tokens,
        kv_bytes=stage.kv_bytes,
        kv_type=worker_pb2.KvType.Value(f"KV_TYPE_{order.kv_type.name}"),
        wire=types_pb2.ActivationType.Value(f"ACTIVATION_TYPE_{order.wire.upper()}"),
        next=_next(plan, order, i),
        max_sessions=order.max_sessions,
        weights_address=order.weights_address,
        neighbours=_neighbours(stage.worker, order),
    )


def _neighbours(worker: WorkerId, order: LoadOrder) -> list[worker_pb2.LinkTarget]:
    """Whom it may ask for tensors: those behind it in a ring of all, so that not all ask one."""
    ids = list(order.addresses)
    at = ids.index(worker) + 1
    ring = [*ids[at:], *ids[: at - 1]][:MOST_NEIGHBOURS]
    return [worker_pb2.LinkTarget(worker=id, address=order.addresses[id]) for id in ring]


def _next(plan: Plan, order: LoadOrder, i: int) -> worker_pb2.NextStage:
    if i + 1 == len(plan.stages):
        return worker_pb2.NextStage(address=order.fleet_address)
    worker = plan.stages[i + 1].worker
    return worker_pb2.NextStage(worker=worker, address=order.addresses[worker])
