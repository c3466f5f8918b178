"""How a worker becomes known to the coordinator and stays so: join, probe, register, heartbeats,
leave.

While the coordinator is away it tries again with growing pauses and keeps its shard; after a minute
it frees its sessions, which nobody will continue. It decides nothing: what the coordinator says
(an epoch, "register again") goes to the worker. Belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, cast

import grpc
import grpc.aio

from potluck.errors import Unreachable
from potluck.rpc import options, status
from potluck.rpc.calls import finished
from potluck.rpc.hello import hello
from potluck.rpc.v1 import cluster_pb2, cluster_pb2_grpc, types_pb2

log = logging.getLogger(__name__)

# Pauses between tries while the coordinator is away; the last one repeats.
BACK_OFF_SECONDS = (0.2, 0.5, 1.0, 2.0)
LEASE_SECONDS = 60.0  # sessions live so long without a coordinator
# Another process has our name: perhaps our predecessor, not yet declared lost.
NAME_TAKEN_SECONDS = options.LOST_SECONDS + 2.0
# Heartbeats that fail before the coordinator is asked anew where its fleet port is.
_MISSES = 3
# Not a refusal of this worker: nobody is there, the port is crowded, it stops, it met a defect.
_AWAY = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
}


class Member(Protocol):
    """What membership knows of worker.server.Worker."""

    name: str

    async def probe(self, shape: types_pb2.LayerShape) -> None:
        """Times a layer of the coordinator's model."""

    async def resources(self) -> types_pb2.Resources:
        """What it offers."""

    async def heartbeat(self, instance: int) -> cluster_pb2.HeartbeatRequest:
        """How it is now."""

    def fence(self, epoch: int) -> None:
        """The coordinator's epoch."""

    async def forget(self, *, epochs: bool) -> None:
        """Frees sessions; the fleet may be a new one."""


class Membership:
    """One worker's place in the fleet of the coordinator at `coordinator` (its public port).

    `on_registered` is called once, when the worker is known for the first time.
    """

    def __init__(
        self,
        member: Member,
        coordinator: str,
        token: str,
        wished_name: str,
        address: str,
        on_registered: Callable[[], None],
    ) -> None:
        self._member = member
        self._coordinator = coordinator
        self._token = token
        self._name = wished_name
        self._address = address
        self._on_registered = on_registered
        self._instance = secrets.randbits(63) + 1
        self._heard_at = asyncio.get_running_loop().time()
        self._fleet_address = ""

    async def run(self) -> None:
        """Until cancelled. Raises PotluckError if the coordinator refuses this worker."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._lease(), name="lease")
            n_tries = 0
            while True:
                heard_at = self._heard_at
                try:
                    joined = await self._join()
                    self._fleet_address = joined.fleet_address
                    if joined.HasField("shape"):  # an older coordinator asks for nothing
                        await self._member.probe(joined.shape)
                    async with _dialled(self._fleet_address) as channel:
                        await self._stay(cluster_pb2_grpc.FleetStub(channel))
                except Unreachable as e:
                    if self._heard_at > heard_at:  # it was there meanwhile
                        n_tries = 0
                    if n_tries == 0:
                        log.warning("%s; trying until it answers", e.message)
                await asyncio.sleep(BACK_OFF_SECONDS[min(n_tries, len(BACK_OFF_SECONDS) - 1)])
                n_tries += 1

    async def leave(self) -> None:
        """Says goodbye, if the coordinator listens."""
        if not self._member.name:
            return
        request = cluster_pb2.LeaveRequest(worker=self._member.name, instance=self._instance)
        async with _dialled(self._fleet_address) as channel:
            try:
                await _answer(cluster_pb2_grpc.FleetStub(channel).Leave(request, timeout=1.0))
            except (Unreachable, grpc.aio.AioRpcError) as e:
                log.info("the coordinator did not hear us leave: %s", e)

    async def _join(self) -> cluster_pb2.JoinReply:
        """Where the fleet port is, and what is to be measured before we go there.

        Raises Unreachable, or what the coordinator refuses us with.
        """
        request = cluster_pb2.JoinRequest(hello=hello(), token=self._token)
        async with _dialled(self._coordinator) as channel:
            call = cluster_pb2_grpc.ClusterStub(channel).Join(
                request, timeout=options.REGISTER_SECONDS
            )
            try:
                return cast("cluster_pb2.JoinReply", await _answer(call))
            except grpc.aio.AioRpcError as e:
                raise status.error_of(e.code(), e.details() or "", self._coordinator) from e

    async def _stay(self, fleet: cluster_pb2_grpc.FleetAsyncStub) -> None:
        """Registers and beats. Raises Unreachable when some heartbeats were not answered."""
        loop = asyncio.get_running_loop()
        interval = await self._register(fleet)
        misses, next_at = 0, loop.time()
        while True:
            beat = await self._member.heartbeat(self._instance)
            call = fleet.Heartbeat(beat, timeout=options.HEARTBEAT_DEADLINE_SECONDS)
            try:
                reply = cast("cluster_pb2.HeartbeatReply", await _answer(call))
            except Unreachable as e:
                misses += 1
                log.info("heartbeat failed: %s", e.message)
                if misses == _MISSES:
                    raise
            except grpc.aio.AioRpcError as e:
                if e.code() is not grpc.StatusCode.NOT_FOUND:
                    raise status.error_of(e.code(), e.details() or "", self._coordinator) from e
                log.info("the coordinator does not know us (any more): registering again")
                interval = await self._register(fleet)
            else:
                misses, self._heard_at = 0, loop.time()
                self._member.fence(reply.epoch)
            next_at = max(next_at + interval, loop.time())
            await asyncio.sleep(next_at - loop.time())

    async def _register(self, fleet: cluster_pb2_grpc.FleetAsyncStub) -> float:
        """Becomes known, again or for the first time; seconds between heartbeats."""
        loop = asyncio.get_running_loop()
        is_first = not self._member.name
        if not is_first:
            await self._member.forget(epochs=True)
        give_up_at = loop.time() + NAME_TAKEN_SECONDS
        reply: cluster_pb2.RegisterReply | None = None
        while reply is None:
            request = cluster_pb2.RegisterRequest(
                hello=hello(),
                worker=self._name,
                address=self._address,
                resources=await self._member.resources(),
                instance=self._instance,
            )
            call = fleet.Register(request, timeout=options.REGISTER_SECONDS)
            try:
                reply = cast("cluster_pb2.RegisterReply", await _answer(call))
            except grpc.aio.AioRpcError as e:
                is_taken = e.code() is grpc.StatusCode.ALREADY_EXISTS
                if not is_taken or loop.time() > give_up_at:
                    raise status.error_of(e.code(), e.details() or "", self._coordinator) from e
                log.info("%s; trying again", (e.details() or "").partition("\n")[0])
                await asyncio.sleep(BACK_OFF_SECONDS[-1])
        self._member.name = self._name = reply.worker
        self._heard_at = loop.time()
        log.info("registered as worker %s with %s", reply.worker, self._coordinator)
        if is_first:
            self._on_registered()
        return max(0.05, reply.heartbeat_seconds or options.HEARTBEAT_SECONDS)

    async def _lease(self) -> None:
        """Frees the sessions when nobody has asked for them for LEASE_SECONDS."""
        loop = asyncio.get_running_loop()
        while True:
            left = self._heard_at + LEASE_SECONDS - loop.time()
            if left <= 0:
                log.info("no coordinator for %g s: freeing all sessions", LEASE_SECONDS)
                await self._member.forget(epochs=False)
                self._heard_at, left = loop.time(), LEASE_SECONDS
            await asyncio.sleep(left)


@asynccontextmanager
async def _dialled(address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(address, options=options.client_options()) as channel:
        yield channel


async def _answer(call: Any) -> Any:
    """A call's reply. Raises Unreachable if nobody gives one, AioRpcError for a refusal."""
    try:
        return await finished(call)
    except grpc.aio.AioRpcError as e:
        if e.code() not in _AWAY:
            raise
        # Its words on a refused connection are a paragraph; the log of a worker needs none of it.
        raise Unreachable(f"the coordinator does not answer ({e.code().name})") from e
