"""Between the coordinator's nouns and the messages of worker.proto and cluster.proto. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.figures import StageSeconds
from coordinator.fleet import Heartbeat, LinkFigures, LoadNews, WorkerState
from coordinator.scheduler import Batch, BatchRows, Room
from coordinator.session import SessionId
from potluck import sampling
from potluck.errors import PlanError, PotluckError, UsageError
from potluck.plan import LayerTimes, WorkerId, WorkerInfo
from potluck.rpc.measured import disk_of, layer_times_of, rate_of
from potluck.rpc.status import error_of_failure
from potluck.rpc.v1 import cluster_pb2, types_pb2, worker_pb2

# After one of these a stage answers no step of the epoch any more: the pipeline is broken.
BREAKING = frozenset(
    {
        types_pb2.FAILURE_CODE_GAP,
        types_pb2.FAILURE_CODE_LINK_LOST,
        types_pb2.FAILURE_CODE_NOT_LOADED,
    }
)


_MOST_TIMED_ROWS = 64  # that a worker says times for; ours time 5


@dataclass(frozen=True, slots=True)
class Picked:
    """A token that the last stage picked for `position` of a session."""

    session: SessionId
    position: int
    pick: sampling.Pick


@dataclass(frozen=True, slots=True)
class RowsFailure:
    """Rows that no stage computed. `session` 0: the whole step."""

    session: SessionId
    error: PotluckError


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step brought back.

    `breaking`: why the pipeline can go on no longer, and who says so.
    """

    step: int
    picks: tuple[Picked, ...] = ()
    failures: tuple[RowsFailure, ...] = ()
    timings: tuple[StageSeconds, ...] = ()
    breaking: types_pb2.Failure | None = None


def step_message(epoch: int, step: int, batch: Batch) -> worker_pb2.Step:
    """The step that carries `batch`: closes, opens, then rows."""
    commands = [
        *(_close(session) for session in batch.closes),
        *(_open(room) for room in batch.opens),
    ]
    return worker_pb2.Step(
        epoch=epoch, step=step, commands=commands, rows=[_rows(rows) for rows in batch.rows]
    )


def outcome_of(result: cluster_pb2.StepResult) -> Outcome:
    """What a StepResult says."""
    picks = tuple(
        Picked(
            SessionId(rows.session),
            pick.position,
            sampling.Pick(
                token=pick.token_id,
                logprob=pick.logprob if pick.HasField("logprob") else None,
                top=tuple((top.token_id, top.logprob) for top in pick.top),
            ),
        )
        for rows in result.rows
        for pick in rows.picks
    )
    failures = tuple(
        RowsFailure(SessionId(failure.session), error_of_failure(failure))
        for failure in result.failures
    )
    timings = tuple(
        StageSeconds(
            wait=timing.wait_seconds,
            compute=timing.compute_seconds,
            serialise=timing.serialise_seconds,
            wire=timing.wire_seconds,
        )
        for timing in result.timings
    )
    breaking = next((f for f in result.failures if f.session == 0 and f.code in BREAKING), None)
    return Outcome(result.step, picks, failures, timings, breaking)


def worker_info(request: cluster_pb2.RegisterRequest, layer_bytes: int) -> WorkerInfo:
    """What a worker says of itself; its id is given later. Raises UsageError for no address.

    Figures that can't be true are not taken, as if nothing had been measured: so is what it says of
    layers that are not of `layer_bytes`, the one that it was asked to time.
    """
    host, colon, port = request.address.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise UsageError(f"worker address {request.address!r} is not host:port")
    r = request.resources
    return WorkerInfo(
        id=WorkerId(request.worker),
        address=request.address,
        isa=r.isa,
        threads=r.threads,
        memory_bytes=r.memory_bytes,
        memory_free_bytes=r.memory_free_bytes,
        read_bytes_per_second=rate_of(r.read_bytes_per_second),
        machine=r.machine,
        room_bytes=r.room_bytes if r.HasField("room_bytes") else None,
        times=_times(r.layer_times, layer_bytes) if r.HasField("layer_times") else None,
        disk=disk_of(r.disk) if r.HasField("disk") else None,
    )


def _times(message: types_pb2.LayerTimes, layer_bytes: int) -> LayerTimes | None:
    if message.layer_bytes != layer_bytes or len(message.rows) > _MOST_TIMED_ROWS:
        return None
    try:
        return layer_times_of(message)
    except PlanError:
        return None


def heartbeat_of(request: cluster_pb2.HeartbeatRequest) -> Heartbeat:
    """A heartbeat. What only the coordinator may say (lost, quarantined) counts as joining."""
    link = request.link
    return Heartbeat(
        state=_REPORTED.get(request.state, WorkerState.JOINING),
        epoch=request.epoch,
        progress=request.progress,
        memory_free_bytes=request.memory_free_bytes,
        resident_bytes=request.resident_bytes,
        kv_used_bytes=request.kv_used_bytes,
        sessions=request.sessions,
        link=LinkFigures(link.to, link.rtt_seconds, link.sent_bytes, link.activation_bytes)
        if request.HasField("link")
        else None,
    )


def load_news_of(progress: worker_pb2.LoadProgress) -> LoadNews:
    """How far a load is."""
    return LoadNews(
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
        fetched_bytes=progress.fetched_bytes,
        fetch_total_bytes=progress.fetch_total_bytes,
    )


_REPORTED = {
    cluster_pb2.WORKER_STATE_PROBING: WorkerState.PROBING,
    cluster_pb2.WORKER_STATE_FETCHING: WorkerState.FETCHING,
    cluster_pb2.WORKER_STATE_LOADING: WorkerState.LOADING,
    cluster_pb2.WORKER_STATE_READY: WorkerState.READY,
    cluster_pb2.WORKER_STATE_DRAINING: WorkerState.DRAINING,
}


def _rows(rows: BatchRows) -> types_pb2.Rows:
    """Sampling goes along only where a pick is wanted."""
    return types_pb2.Rows(
        session=rows.session,
        start_position=rows.start,
        token_ids=rows.tokens,
        want_logits=rows.want_logits,
        sampling=sampling.to_message(rows.sampling) if rows.want_logits else None,
        scored_ids=rows.scored_ids,
    )


def _open(room: Room) -> types_pb2.KvCommand:
    open = types_pb2.KvCommand.Open(session=room.session, max_tokens=room.max_tokens)
    return types_pb2.KvCommand(open=open)


def _close(session: SessionId) -> types_pb2.KvCommand:
    return types_pb2.KvCommand(close=types_pb2.KvCommand.Close(session=session))
