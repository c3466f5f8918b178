"""The doors for workers: Join on the public port, Fleet on its own. They decide nothing."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

from coordinator import messages
from coordinator.engine import Engine
from coordinator.pipeline import Pipeline
from potluck.plan import WorkerId
from potluck.rpc import options
from potluck.rpc.hello import check_hello, hello
from potluck.rpc.measured import layer_shape_message
from potluck.rpc.v1 import cluster_pb2, cluster_pb2_grpc

log = logging.getLogger(__name__)


class Cluster(cluster_pb2_grpc.ClusterServicer):
    """How a worker finds the fleet's door."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Join(
        self, request: cluster_pb2.JoinRequest, context: object
    ) -> cluster_pb2.JoinReply:
        """Where to register. On loopback no token is needed; elsewhere nothing is served yet."""
        check_hello(request.hello, "the worker", "coordinator")
        return cluster_pb2.JoinReply(
            hello=hello(),
            fleet_address=self._engine.fleet_address,
            model=self._engine.model.name,
            shape=layer_shape_message(self._engine.model.layer_shape),
        )


class Fleet(cluster_pb2_grpc.FleetServicer):
    """Registration, heartbeats, results."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Register(
        self, request: cluster_pb2.RegisterRequest, context: object
    ) -> cluster_pb2.RegisterReply:
        """A worker that is ready to be planned."""
        check_hello(request.hello, f"worker {request.worker}".rstrip(), "coordinator")
        info = messages.worker_info(request, self._engine.model.layer_shape.layer_bytes)
        worker = self._engine.membership.register(request.worker, info, request.instance)
        if request.resources.HasField("layer_times") and info.times is None:
            log.warning("worker %s timed other layers than it was asked for: not taken", worker)
        return cluster_pb2.RegisterReply(
            worker=worker,
            heartbeat_seconds=options.HEARTBEAT_SECONDS,
            hello=hello(),
        )

    async def Heartbeat(
        self, request: cluster_pb2.HeartbeatRequest, context: object
    ) -> cluster_pb2.HeartbeatReply:
        """A sign of life, with figures."""
        self._engine.membership.hear(
            WorkerId(request.worker), request.instance, messages.heartbeat_of(request)
        )
        return cluster_pb2.HeartbeatReply(epoch=self._engine.epoch)

    async def Leave(
        self, request: cluster_pb2.LeaveRequest, context: object
    ) -> cluster_pb2.LeaveReply:
        """A worker is about to stop."""
        self._engine.membership.leave(WorkerId(request.worker), request.instance)
        return cluster_pb2.LeaveReply()

    async def Results(
        self, request_iterator: AsyncIterator[cluster_pb2.StepResult], context: object
    ) -> AsyncIterator[cluster_pb2.ResultAck]:
        """The last stage's link. Results of an epoch that is over are acknowledged and dropped."""
        link: Pipeline | None = None
        if (pipeline := self._engine.pipeline) is not None:
            pipeline.results_dialled()
        try:
            async for result in request_iterator:
                received_at = self._engine.clock()
                pipeline = self._engine.pipeline
                if pipeline is not None and pipeline.epoch == result.epoch:
                    if pipeline is not link:
                        link = pipeline
                        link.results_opened()
                    pipeline.accept(result)
                yield cluster_pb2.ResultAck(
                    epoch=result.epoch,
                    step=result.step,
                    held_seconds=self._engine.clock() - received_at,
                )
        finally:
            if link is not None:
                link.results_closed()
