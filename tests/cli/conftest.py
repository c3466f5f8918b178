"""A coordinator of scripted answers on a real port: commands meet real gRPC and no model."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from potluck.rpc.options import server_options
from potluck.rpc.v1 import cluster_pb2, inference_pb2, inference_pb2_grpc, types_pb2

Reply = inference_pb2.GenerateReply


@dataclass
class FakeService(inference_pb2_grpc.InferenceServicer):
    """Says `words`, one token each; what it was asked stays in `asked`."""

    address: str = ""
    words: list[str] = field(default_factory=lambda: ["Paris", " is", " a", " city", "."])
    refuse: tuple[grpc.StatusCode, str] | None = None
    refuse_after: int = 0  # words
    pause_seconds: float = 0.0  # before each word
    state: str = "serving"
    context_tokens: int = 2048
    scores: bool = True  # tokens of the prompt, if asked: -1/8 at position 1 and so on
    report: inference_pb2.StatusReply | None = None  # instead of its own
    asked: list[inference_pb2.GenerateRequest | inference_pb2.ChatRequest] = field(
        default_factory=list
    )
    cancelled: threading.Event = field(default_factory=threading.Event)

    def _answer(
        self, options: inference_pb2.Options, context: grpc.ServicerContext
    ) -> Iterator[Reply]:
        finished = False

        def ended() -> None:
            if not finished:
                self.cancelled.set()

        context.add_callback(ended)
        if options.max_tokens > self.context_tokens:
            text = f"max_tokens is {options.max_tokens}; the context is {self.context_tokens}"
            context.abort(grpc.StatusCode.OUT_OF_RANGE, text)
        yield Reply(prefill=inference_pb2.Prefill(done_tokens=2, total_tokens=4))
        for i, word in enumerate(self.words):
            if self.refuse is not None and i == self.refuse_after:
                context.abort(*self.refuse)
            time.sleep(self.pause_seconds)
            token = inference_pb2.TokenInfo(token_id=i + 10)
            if options.HasField("logprobs"):
                token.logprob = -0.5 * (i + 1)
                top = [cluster_pb2.TokenLogprob(token_id=i + 10, logprob=-0.5 * (i + 1))]
                token.top.extend(top * options.logprobs)
            yield Reply(text=word, tokens=[token])
        done = inference_pb2.Done(
            finish_reason=inference_pb2.FINISH_REASON_LENGTH,
            prompt_tokens=4,
            answer_tokens=len(self.words),
            prefill_seconds=0.5,
            decode_seconds=2.0,
            seed=options.seed or 7,
        )
        finished = True
        yield Reply(done=done)

    def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[Reply]:
        self.asked.append(request)
        options = request.options
        if self.scores and options.HasField("prompt_logprobs"):
            start = max(1, options.prompt_logprobs_start)
            ids = list(enumerate(request.tokens.ids))[start:]
            known = [inference_pb2.TokenInfo(token_id=id, logprob=-i / 8) for i, id in ids]
            yield Reply(prompt_tokens=known)
        yield from self._answer(options, context)

    def Chat(
        self, request: inference_pb2.ChatRequest, context: grpc.ServicerContext
    ) -> Iterator[Reply]:
        self.asked.append(request)
        return self._answer(request.options, context)

    def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> inference_pb2.TokenizeReply:
        start = [] if request.without_start else [1]
        return inference_pb2.TokenizeReply(ids=[*start, *request.text.encode()])

    def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: grpc.ServicerContext
    ) -> inference_pb2.DetokenizeReply:
        return inference_pb2.DetokenizeReply(text=bytes(request.ids).decode())

    def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> inference_pb2.ListModelsReply:
        return inference_pb2.ListModelsReply(models=[inference_pb2.ModelInfo(name="tiny", vocab=9)])

    def Status(
        self, request: inference_pb2.StatusRequest, context: grpc.ServicerContext
    ) -> inference_pb2.StatusReply:
        if self.report is not None:
            return self.report
        return inference_pb2.StatusReply(
            model="tiny",
            state=self.state,
            epoch=3,
            plan=[
                inference_pb2.StageStatus(
                    stage=0,
                    worker="w1",
                    span=types_pb2.Span(start=0, stop=11),
                    memory_bytes=3 * 2**20,
                    compute_seconds=0.00234,
                    predicted_seconds=0.0021,
                )
            ],
            workers=[
                inference_pb2.WorkerStatus(
                    id="w1",
                    address="127.0.0.1:7690",
                    state=cluster_pb2.WORKER_STATE_READY,
                    isa="avx2",
                    threads=2,
                    memory_bytes=2**33,
                    memory_free_bytes=2**32,
                )
            ],
            links=[_link()],
            forecast=inference_pb2.ForecastStatus(
                tokens_per_second=80.0,
                total_tokens_per_second=80.0,
                most_tokens_per_second=120.0,
                first_token_seconds=1.5,
                advice=["w1 alone is faster"],
                spares=["w2", "w3"],
            ),
            figures=inference_pb2.Figures(answer_tokens=5, tokens_per_second=12.5),
            context_tokens=self.context_tokens,
            expected_workers=1,
            kv_type="f16",
            kv_bytes_per_token=23_040,
        )


def _link() -> inference_pb2.LinkStatus:
    link = inference_pb2.LinkStatus(to="w1", rtt_seconds=0.0003)
    setattr(link, "from", "coordinator")  # a keyword of Python
    return link


@pytest.fixture
def service() -> Iterator[FakeService]:
    """A fake service that runs; its address is in `.address`."""
    server = grpc.server(ThreadPoolExecutor(8), options=server_options())
    fake = FakeService()
    inference_pb2_grpc.add_InferenceServicer_to_server(fake, server)
    fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield fake
    server.stop(grace=None).wait()


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State and cache of the test alone, and no setting of the person who runs it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path / "cache"))
    for name in ("CONNECT", "THREADS", "ISA", "OFFLINE"):
        monkeypatch.delenv(f"POTLUCK_{name}", raising=False)
    return tmp_path


@pytest.fixture
def potluck() -> list[str]:
    """The command line as a process, whether its script is installed or not."""
    return [sys.executable, "-c", "import sys, potluck.cli; sys.exit(potluck.cli.main())"]
