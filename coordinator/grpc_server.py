"""The coordinator's gRPC ports: which method answers where, and how errors leave.

Two servers, one for people and one for workers: a handler of grpc.aio can't see which port a call
came in by, so a port is a server with its own gate. One table says which method belongs to which
door; what is not in it is refused. Errors of ours become status codes by potluck/rpc/status.py,
everything else is a defect: logged under an id, which is all that the caller learns.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import logging
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator.cluster import Cluster, Fleet
from coordinator.config import Settings
from coordinator.engine import Engine, ServiceState
from coordinator.inference import Conversations, Inference
from coordinator.weights import Weights
from potluck.errors import PotluckError, UsageError
from potluck.rpc import options
from potluck.rpc.status import code_of, details_of
from potluck.rpc.v1 import (
    cluster_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    weights_pb2_grpc,
)

log = logging.getLogger(__name__)

LIVE = "live"  # health of the process; the model's name and "" say whether a token could be made
_STOP_SECONDS = 0.5  # for what is still open once the engine has ended all answers


class Door(Enum):
    """Who comes in."""

    PUBLIC = "public"  # people and their programs, and workers that join
    FLEET = "fleet"  # workers


_V1 = "/potluck.rpc.v1."
CALLERS = {
    f"{_V1}Inference/Generate": Door.PUBLIC,
    f"{_V1}Inference/Chat": Door.PUBLIC,
    f"{_V1}Inference/Tokenize": Door.PUBLIC,
    f"{_V1}Inference/Detokenize": Door.PUBLIC,
    f"{_V1}Inference/ListModels": Door.PUBLIC,
    f"{_V1}Inference/Status": Door.PUBLIC,
    f"{_V1}Cluster/Join": Door.PUBLIC,
    "/grpc.health.v1.Health/Check": Door.PUBLIC,
    "/grpc.health.v1.Health/Watch": Door.PUBLIC,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Door.PUBLIC,
    f"{_V1}Fleet/Register": Door.FLEET,
    f"{_V1}Fleet/Heartbeat": Door.FLEET,
    f"{_V1}Fleet/Leave": Door.FLEET,
    f"{_V1}Fleet/Results": Door.FLEET,
    f"{_V1}Weights/Manifest": Door.FLEET,
    f"{_V1}Weights/Find": Door.FLEET,
    f"{_V1}Weights/Fetch": Door.FLEET,
}


@dataclass(frozen=True, slots=True)
class Addresses:
    """host:port of the two doors, as they are bound."""

    public: str
    fleet: str


class Gate(grpc.aio.ServerInterceptor):
    """Lets through what the table allows at this door, and translates what goes wrong inside."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        """Called for every call, before its handler is looked up."""
        method: str = handler_call_details.method
        door = CALLERS.get(method)
        if door is not self._door:
            return _refusal(method, is_known=door is not None)
        handler = await continuation(handler_call_details)
        return handler and _guarded(method, handler)


@asynccontextmanager
async def open_doors(
    engine: Engine, conversations: Conversations, settings: Settings
) -> AsyncIterator[Addresses]:
    """Both ports, open until the context ends. Raises PotluckError if a port is in use."""
    public, fleet = (
        grpc.aio.server(
            interceptors=[Gate(door)],
            options=options.server_options(),
            maximum_concurrent_rpcs=options.PUBLIC_RPCS + settings.max_sessions + settings.queue,
        )
        for door in Door
    )
    health_servicer = health.aio.HealthServicer()
    inference_pb2_grpc.add_InferenceServicer_to_server(Inference(engine, conversations), public)
    cluster_pb2_grpc.add_ClusterServicer_to_server(Cluster(engine), public)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, public)
    names = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
    reflection.enable_server_reflection(
        (names, health.SERVICE_NAME, reflection.SERVICE_NAME), public
    )
    cluster_pb2_grpc.add_FleetServicer_to_server(Fleet(engine), fleet)
    weights_pb2_grpc.add_WeightsServicer_to_server(Weights(engine.model), fleet)
    addresses = Addresses(
        public=_bind(public, settings.host, settings.grpc_port, "--grpc-port"),
        fleet=_bind(fleet, settings.host, settings.fleet_port, "--fleet-port"),
    )
    await public.start()
    await fleet.start()
    following = asyncio.create_task(_follow(engine, health_servicer), name="health")
    try:
        yield addresses
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await asyncio.gather(public.stop(_STOP_SECONDS), fleet.stop(_STOP_SECONDS))


async def _follow(engine: Engine, servicer: health.aio.HealthServicer) -> None:
    """Keeps the health service true. Until cancelled."""
    serving = health_pb2.HealthCheckResponse.SERVING
    await servicer.set(LIVE, serving)
    state = engine.state
    while True:
        is_serving = state is ServiceState.SERVING
        status = serving if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", engine.model.name):
            await servicer.set(name, status)
        state = await engine.state_after(state)


def _bind(server: grpc.aio.Server, host: str, port: int, option: str) -> str:
    """Binds a port, 0: any free one; its host:port. Raises PotluckError, naming the option.

    Asks the system first: gRPC would write the reason to its own log and tell us nothing.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
            probe.bind((host, port))
    except OSError as error:
        remedy = f"choose another port with {option}"
        if error.errno == errno.EADDRINUSE:
            raise PotluckError(f"port {port} on {host} is in use", remedy=remedy) from error
        reason = error.strerror or "no reason given"
        raise PotluckError(f"port {port} on {host}: {reason.lower()}", remedy=remedy) from error
    shown = f"[{host}]" if ":" in host else host
    bound = server.add_insecure_port(f"{shown}:{port}")
    return f"{shown}:{bound}"


def _refusal(method: str, *, is_known: bool) -> Any:
    """A handler that refuses. It reads nothing, so it fits every kind of call."""
    code = grpc.StatusCode.PERMISSION_DENIED if is_known else grpc.StatusCode.UNIMPLEMENTED

    async def refuse(_: object, context: Any) -> None:
        await context.abort(code, f"{method} is not served on this port")

    return grpc.stream_stream_rpc_method_handler(refuse)


async def _relay(result: AsyncGenerator[Any, Any], context: Any) -> None:
    """Writes what a handler yields. It is closed when its caller is gone, or does not read."""
    is_read = True
    async with aclosing(result) as replies:
        async for reply in replies:
            if not (is_read := await _written(context, reply)):
                break
    if not is_read:  # what it did take comes first, then this, should it ever read on
        words = f"the answer was not read for {options.WRITE_SECONDS:g} s"
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, words)


async def _written(context: Any, reply: Any) -> bool:
    try:
        async with asyncio.timeout(options.WRITE_SECONDS):
            await context.write(reply)
    except TimeoutError:
        return False
    return True


class _Malformed:
    """Stands for a request that could not be read."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _guarded(method: str, handler: Any) -> Any:
    """`handler` with errors translated; generators are closed as soon as their caller is gone."""
    behavior = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )

    async def call(request: Any, context: Any) -> Any:
        try:
            if isinstance(request, _Malformed):
                raise UsageError(f"the request can't be read: {request.reason}")
            result = behavior(request, context)
            if not inspect.isasyncgen(result):
                return await result
            await _relay(result, context)
        except grpc.aio.BaseError:  # gRPC's own: the call was aborted, or its server has stopped
            raise
        except PotluckError as error:
            await context.abort(code_of(error), details_of(error))
        except Exception:  # the outermost frame of a call: a defect is logged once
            number = secrets.token_hex(4)
            log.exception("defect %s in %s", number, method)
            await context.abort(grpc.StatusCode.INTERNAL, f"internal error {number}; see the log")

    def read(data: bytes) -> Any:
        try:
            return handler.request_deserializer(data)
        except Exception as error:  # noqa: BLE001  protobuf's DecodeError and what it may become
            return _Malformed(str(error).splitlines()[0] if str(error) else type(error).__name__)

    kind = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return kind(call, read, handler.response_serializer)
