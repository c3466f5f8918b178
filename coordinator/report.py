"""What `status` says: the engine as it is now, as messages. Translates and decides nothing."""

from __future__ import annotations

from coordinator.drift import compute_seconds
from coordinator.engine import Engine
from coordinator.fleet import LinkFigures, WorkerRecord
from coordinator.pipeline import Pipeline
from coordinator.planner import Planned
from potluck import __version__
from potluck.plan import Plan
from potluck.rpc import PROTOCOL
from potluck.rpc.measured import disk_message, layer_times_message
from potluck.rpc.v1 import cluster_pb2, inference_pb2, types_pb2

COORDINATOR = "coordinator"  # as an end of a link


def status_of(engine: Engine) -> inference_pb2.StatusReply:
    """Plan, workers, links and figures."""
    sessions, queue = engine.load_counts()
    now = engine.clock()
    workers = engine.membership.fleet.workers()
    return inference_pb2.StatusReply(
        model=engine.model.name,
        state=engine.state.value,
        detail=engine.detail(),
        epoch=engine.pipeline.epoch if engine.pipeline else engine.epoch,
        plan=_stages(engine, engine.plan) if engine.plan else (),
        workers=[_worker(record, now) for record in workers],
        links=_links(engine.pipeline, workers) if engine.pipeline else (),
        sessions=sessions,
        queue=queue,
        figures=_figures(engine, now),
        potluck_version=__version__,
        protocol=PROTOCOL,
        context_tokens=engine.model.context_tokens,
        expected_workers=engine.settings.workers,
        kv_type=engine.settings.kv_type.value,
        wire=engine.settings.wire,
        forecast=_forecast(engine, engine.planned) if engine.planned else None,
        measured_links=_measured_links(engine),
        kv_bytes_per_token=engine.model.sizes.kv_layer_bytes * engine.model.sizes.n_layers,
    )


def model_info(engine: Engine) -> inference_pb2.ModelInfo:
    """The served model."""
    model = engine.model
    return inference_pb2.ModelInfo(
        name=model.name,
        architecture=model.config.architecture,
        n_layers=model.config.n_layers,
        context_tokens=model.context_tokens,
        size_bytes=model.reference.size_bytes,
        header_sha256=model.reference.header_sha256,
        vocab=model.config.vocab,
        has_chat_template=model.tokenizer.chat_template is not None,
    )


def _stages(engine: Engine, plan: Plan) -> list[inference_pb2.StageStatus]:
    stages = []
    predicted = engine.planned.forecast.stages if engine.planned else ()
    for i, stage in enumerate(plan.stages):
        seconds = engine.figures.stage_seconds(i)
        stages.append(
            inference_pb2.StageStatus(
                stage=i,
                worker=stage.worker,
                span=types_pb2.Span(start=stage.span.start, stop=stage.span.stop),
                memory_bytes=stage.memory_bytes,
                shard_bytes=engine.pipeline.shard_bytes.get(stage.worker, 0)
                if engine.pipeline
                else 0,
                compute_seconds=seconds.compute,
                serialise_seconds=seconds.serialise,
                wire_seconds=seconds.wire,
                wait_seconds=seconds.wait,
                predicted_seconds=compute_seconds(predicted[i], rows=1) if predicted else 0.0,
            )
        )
    return stages


def _worker(record: WorkerRecord, now: float) -> inference_pb2.WorkerStatus:
    info, beat = record.info, record.heartbeat
    return inference_pb2.WorkerStatus(
        id=info.id,
        address=info.address,
        state=cluster_pb2.WorkerState.Value(f"WORKER_STATE_{record.state.name}"),
        isa=info.isa,
        threads=info.threads,
        memory_bytes=info.memory_bytes,
        memory_free_bytes=beat.memory_free_bytes or info.memory_free_bytes,
        seen_seconds=max(0.0, now - record.last_heard),
        resident_bytes=beat.resident_bytes,
        read_bytes_per_second=info.read_bytes_per_second,
        load_done_bytes=record.load.done_bytes,
        load_total_bytes=record.load.total_bytes,
        machine=info.machine,
        load_bytes_per_second=record.load_bytes_per_second(now),
        load_seconds_left=record.load_seconds_left(now),
        fetched_bytes=record.load.fetched_bytes,
        fetch_total_bytes=record.load.fetch_total_bytes,
        offered_bytes=info.memory_free_bytes,
        room_bytes=info.room_bytes,
        layer_times=layer_times_message(info.times) if info.times is not None else None,
        disk=disk_message(info.disk) if info.disk is not None else None,
    )


def _forecast(engine: Engine, planned: Planned) -> inference_pb2.ForecastStatus:
    forecast, n_stages = planned.forecast, len(planned.plan.stages)
    return inference_pb2.ForecastStatus(
        tokens_per_second=forecast.tokens_per_second(),
        total_tokens_per_second=forecast.tokens_per_second(n_stages),
        most_tokens_per_second=forecast.tokens_per_second(2 * n_stages),
        first_token_seconds=forecast.first_token_seconds(),
        load_seconds=forecast.whole_load_seconds,
        advice=engine.advice(),
        spares=engine.spares(),
    )


def _measured_links(engine: Engine) -> list[inference_pb2.MeasuredLinkStatus]:
    found = []
    for (start, end), figures in engine.links.between.items():
        link = inference_pb2.MeasuredLinkStatus(
            to=end or COORDINATOR,
            rtt_seconds=figures.rtt_seconds,
            bytes_per_second=figures.bytes_per_second,
        )
        setattr(link, "from", start or COORDINATOR)  # a word of Python's
        found.append(link)
    return found


def _links(pipeline: Pipeline, workers: list[WorkerRecord]) -> list[inference_pb2.LinkStatus]:
    """The link to the first stage as it is counted here, the others as workers count them."""
    traffic = pipeline.traffic
    links = [
        _link(
            COORDINATOR,
            LinkFigures(
                to=pipeline.plan.stages[0].worker,
                rtt_seconds=pipeline.rtt_seconds,
                sent_bytes=traffic.sent_bytes,
                activation_bytes=traffic.activation_bytes,
            ),
        )
    ]
    staged = {stage.worker for stage in pipeline.plan.stages}
    for record in workers:
        figures = record.heartbeat.link
        if figures is not None and record.info.id in staged:
            links.append(_link(record.info.id, figures, record.link_bytes_per_second))
    return links


def _link(
    start: str, figures: LinkFigures, bytes_per_second: float = 0.0
) -> inference_pb2.LinkStatus:
    link = inference_pb2.LinkStatus(
        to=figures.to or COORDINATOR,
        rtt_seconds=figures.rtt_seconds,
        bytes_per_second=bytes_per_second,
        sent_bytes=figures.sent_bytes,
        activation_bytes=figures.activation_bytes,
    )
    setattr(link, "from", start)  # a word of Python's
    return link


def _figures(engine: Engine, now: float) -> inference_pb2.Figures:
    figures, traffic = engine.figures, engine.traffic
    return inference_pb2.Figures(
        answer_tokens=figures.answer_tokens,
        prompt_tokens=figures.prompt_tokens,
        tokens_per_second=figures.tokens_per_second(now),
        steps=figures.steps,
        coordinator_sent_bytes=traffic.sent_bytes,
        coordinator_received_bytes=traffic.received_bytes,
        coordinator_activation_bytes=traffic.activation_bytes,
    )
