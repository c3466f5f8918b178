"""Messages of inference.proto to and from the nouns of potluck/replies.py. Pure."""

from __future__ import annotations

from potluck import replies
from potluck.rpc.measured import disk_of, layer_times_of
from potluck.rpc.v1 import cluster_pb2, inference_pb2


def options_message(options: replies.AnswerOptions | None) -> inference_pb2.Options:
    """The options as a message; None gives the defaults."""
    o = options or replies.AnswerOptions()
    return inference_pb2.Options(
        model=o.model,
        max_tokens=o.max_tokens,
        temperature=o.temperature,
        top_k=o.top_k,
        top_p=o.top_p,
        min_p=o.min_p,
        repetition_penalty=o.repetition_penalty,
        presence_penalty=o.presence_penalty,
        frequency_penalty=o.frequency_penalty,
        seed=o.seed,
        stop=o.stop,
        logprobs=o.logprobs,
        ignore_end=o.ignore_end,
        prompt_logprobs=o.prompt_logprobs,
        prompt_logprobs_start=o.prompt_logprobs_start,
    )


def events_of(message: inference_pb2.GenerateReply) -> list[replies.AnswerEvent]:
    """Zero or more events of one message: Prefill, PromptTokens, Piece, Done."""
    events: list[replies.AnswerEvent] = []
    if message.HasField("prefill"):
        p = message.prefill
        events.append(replies.Prefill(p.done_tokens, p.total_tokens, p.queue))
    if message.prompt_tokens:
        events.append(replies.PromptTokens(tuple(_token(t) for t in message.prompt_tokens)))
    if message.text or message.tokens:
        events.append(replies.Piece(message.text, tuple(_token(t) for t in message.tokens)))
    if message.HasField("done"):
        events.append(_done(message.done))
    return events


def _token(info: inference_pb2.TokenInfo) -> replies.Token:
    return replies.Token(
        id=info.token_id,
        logprob=info.logprob if info.HasField("logprob") else None,
        top=tuple(replies.TokenLogprob(t.token_id, t.logprob) for t in info.top),
    )


def _done(done: inference_pb2.Done) -> replies.Done:
    stopped = done.finish_reason == inference_pb2.FINISH_REASON_STOP
    return replies.Done(
        finish_reason=replies.FinishReason.STOP if stopped else replies.FinishReason.LENGTH,
        prompt_tokens=done.prompt_tokens,
        answer_tokens=done.answer_tokens,
        queue_seconds=done.queue_seconds,
        prefill_seconds=done.prefill_seconds,
        decode_seconds=done.decode_seconds,
        seed=done.seed,
    )


def model_of(info: inference_pb2.ModelInfo) -> replies.ServedModel:
    """One row of ListModels."""
    return replies.ServedModel(
        name=info.name,
        architecture=info.architecture,
        n_layers=info.n_layers,
        context_tokens=info.context_tokens,
        size_bytes=info.size_bytes,
        header_sha256=info.header_sha256,
        vocab=info.vocab,
        has_chat_template=info.has_chat_template,
    )


def service_of(reply: inference_pb2.StatusReply) -> replies.ServiceReport:
    """The answer to Status."""
    return replies.ServiceReport(
        model=reply.model,
        state=reply.state,
        detail=reply.detail,
        epoch=reply.epoch,
        plan=tuple(_stage(s) for s in reply.plan),
        workers=tuple(_worker(w) for w in reply.workers),
        links=tuple(_link(x) for x in reply.links),
        sessions=reply.sessions,
        queue=reply.queue,
        potluck_version=reply.potluck_version,
        protocol=reply.protocol,
        context_tokens=reply.context_tokens,
        expected_workers=reply.expected_workers,
        kv_type=reply.kv_type or "f16",
        wire=reply.wire or "f32",
        kv_bytes_per_token=reply.kv_bytes_per_token,
        figures=_figures(reply.figures),
        forecast=_forecast(reply.forecast) if reply.HasField("forecast") else None,
        measured_links=tuple(_measured_link(x) for x in reply.measured_links),
    )


def state_word(state: int) -> str:
    """A worker state as people read it: WORKER_STATE_READY is "ready"; others "unknown"."""
    known = cluster_pb2.WorkerState.DESCRIPTOR.values_by_number.get(state)
    return known.name.removeprefix("WORKER_STATE_").lower() if known else "unknown"


def _stage(stage: inference_pb2.StageStatus) -> replies.StageReport:
    return replies.StageReport(
        stage=stage.stage,
        worker=stage.worker,
        span=(stage.span.start, stage.span.stop),
        memory_bytes=stage.memory_bytes,
        shard_bytes=stage.shard_bytes,
        compute_seconds=stage.compute_seconds,
        serialise_seconds=stage.serialise_seconds,
        wire_seconds=stage.wire_seconds,
        wait_seconds=stage.wait_seconds,
        predicted_seconds=stage.predicted_seconds,
    )


def _worker(worker: inference_pb2.WorkerStatus) -> replies.WorkerReport:
    return replies.WorkerReport(
        id=worker.id,
        address=worker.address,
        state=state_word(worker.state),
        isa=worker.isa,
        threads=worker.threads,
        memory_bytes=worker.memory_bytes,
        memory_free_bytes=worker.memory_free_bytes,
        resident_bytes=worker.resident_bytes,
        seen_seconds=worker.seen_seconds,
        read_bytes_per_second=worker.read_bytes_per_second,
        load_done_bytes=worker.load_done_bytes,
        load_total_bytes=worker.load_total_bytes,
        machine=worker.machine,
        offered_bytes=worker.offered_bytes or worker.memory_free_bytes,
        room_bytes=worker.room_bytes if worker.HasField("room_bytes") else None,
        layer_times=layer_times_of(worker.layer_times) if worker.HasField("layer_times") else None,
        disk=disk_of(worker.disk) if worker.HasField("disk") else None,
        load_bytes_per_second=worker.load_bytes_per_second,
        load_seconds_left=worker.load_seconds_left,
        fetched_bytes=worker.fetched_bytes,
        fetch_total_bytes=worker.fetch_total_bytes,
    )


def _link(link: inference_pb2.LinkStatus) -> replies.LinkReport:
    return replies.LinkReport(
        start=getattr(link, "from"),  # a keyword of Python
        end=link.to,
        rtt_seconds=link.rtt_seconds,
        bytes_per_second=link.bytes_per_second,
        sent_bytes=link.sent_bytes,
        activation_bytes=link.activation_bytes,
    )


def _measured_link(link: inference_pb2.MeasuredLinkStatus) -> replies.MeasuredLinkReport:
    return replies.MeasuredLinkReport(
        start=getattr(link, "from"),  # a keyword of Python
        end=link.to,
        rtt_seconds=link.rtt_seconds,
        bytes_per_second=link.bytes_per_second,
    )


def _forecast(forecast: inference_pb2.ForecastStatus) -> replies.ForecastReport:
    return replies.ForecastReport(
        tokens_per_second=forecast.tokens_per_second,
        total_tokens_per_second=forecast.total_tokens_per_second,
        most_tokens_per_second=forecast.most_tokens_per_second,
        first_token_seconds=forecast.first_token_seconds,
        load_seconds=forecast.load_seconds,
        advice=tuple(forecast.advice),
        spares=tuple(forecast.spares),
    )


def _figures(figures: inference_pb2.Figures) -> replies.FiguresReport:
    return replies.FiguresReport(
        answer_tokens=figures.answer_tokens,
        prompt_tokens=figures.prompt_tokens,
        tokens_per_second=figures.tokens_per_second,
        steps=figures.steps,
        coordinator_sent_bytes=figures.coordinator_sent_bytes,
        coordinator_received_bytes=figures.coordinator_received_bytes,
        coordinator_activation_bytes=figures.coordinator_activation_bytes,
    )
