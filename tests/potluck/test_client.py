"""Client against a real gRPC server of a few lines: events, errors, deadlines, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import grpc.aio
import pytest

import potluck
from potluck.client import Client
from potluck.errors import (
    ContextExceeded,
    Full,
    PotluckError,
    Unreachable,
    UsageError,
)
from potluck.replies import AnswerOptions, Done, FinishReason, Message, Piece, Prefill, Token
from potluck.rpc import messages, options
from potluck.rpc.v1 import cluster_pb2, inference_pb2, inference_pb2_grpc

Reply = inference_pb2.GenerateReply
Script = Callable[["grpc.aio.ServicerContext[Any, Any]"], AsyncIterator[Reply]]


async def short_answer(context: object) -> AsyncIterator[Reply]:
    yield Reply(prefill=inference_pb2.Prefill(done_tokens=3, total_tokens=9, queue=0))
    token = inference_pb2.TokenInfo(token_id=7, logprob=-0.25)
    token.top.append(cluster_pb2.TokenLogprob(token_id=7, logprob=-0.25))
    yield Reply(tokens=[token])
    yield Reply(text="né", tokens=[inference_pb2.TokenInfo(token_id=8)])
    yield Reply(
        done=inference_pb2.Done(
            finish_reason=inference_pb2.FINISH_REASON_STOP,
            prompt_tokens=9,
            answer_tokens=2,
            prefill_seconds=0.5,
            decode_seconds=0.25,
            seed=3,
        )
    )


@dataclass
class Service:
    """Plays `script` for every answer; keeps what it was asked. Async, which the stubs' is not."""

    script: Script = short_answer
    asked: list[object] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def _play(
        self, request: object, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Reply]:
        self.asked.append(request)
        try:
            async for reply in self.script(context):
                yield reply
        finally:
            self.ended.set()

    Generate = _play
    Chat = _play

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: object) -> object:
        self.asked.append(request)
        return inference_pb2.TokenizeReply(ids=[1, 2])

    async def Detokenize(self, request: inference_pb2.DetokenizeRequest, context: object) -> object:
        return inference_pb2.DetokenizeReply(text="".join(chr(i) for i in request.ids))

    async def ListModels(self, request: object, context: object) -> object:
        return inference_pb2.ListModelsReply(models=[inference_pb2.ModelInfo(name="tiny")])

    async def Status(self, request: object, context: object) -> object:
        return inference_pb2.StatusReply(
            state="loading",
            workers=[inference_pb2.WorkerStatus(id="w1", state=cluster_pb2.WORKER_STATE_LOADING)],
        )


@pytest.fixture
async def service() -> AsyncIterator[tuple[Service, str]]:
    server = grpc.aio.server(options=options.server_options())
    fake = Service()
    inference_pb2_grpc.add_InferenceServicer_to_server(cast(Any, fake), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield fake, address
    await server.stop(None)


async def test_an_answer_is_its_events_in_order(service: tuple[Service, str]) -> None:
    _, address = service
    async with Client(address) as client:
        events = [event async for event in client.generate("x")]
    prefill, first, second, done = events
    assert prefill == Prefill(done_tokens=3, total_tokens=9, queue=0)
    assert isinstance(first, Piece)
    assert (first.text, first.tokens[0].id, first.tokens[0].logprob) == ("", 7, -0.25)
    assert second == Piece("né", (Token(8),))
    assert isinstance(done, Done)
    assert done.finish_reason is FinishReason.STOP
    assert done.tokens_per_second == 4.0  # one token after the first, in a quarter of a second
    assert done.prompt_tokens_per_second == 18.0


async def test_a_prompt_may_be_text_or_token_ids(service: tuple[Service, str]) -> None:
    fake, address = service
    async with Client(address) as client:
        async for _ in client.generate("text", AnswerOptions(temperature=0.0, stop=("a", "b"))):
            pass
        async for _ in client.generate([5, 6]):
            pass
        async for _ in client.chat([Message("user", "hi")]):
            pass
    text, ids, chat = fake.asked
    assert isinstance(text, inference_pb2.GenerateRequest)
    assert isinstance(ids, inference_pb2.GenerateRequest)
    assert isinstance(chat, inference_pb2.ChatRequest)
    assert (text.text, list(text.options.stop)) == ("text", ["a", "b"])
    assert text.options.HasField("temperature")
    assert list(ids.tokens.ids) == [5, 6]
    assert not ids.options.HasField("temperature")
    assert (chat.messages[0].role, chat.messages[0].content) == ("user", "hi")


async def test_small_calls_return_plain_values(service: tuple[Service, str]) -> None:
    fake, address = service
    async with Client(address) as client:
        assert await client.tokenize("hi", without_start=True) == [1, 2]
        assert await client.detokenize([104, 105]) == "hi"
        assert [model.name for model in await client.models()] == ["tiny"]
        report = await client.status()
    request = fake.asked[0]
    assert isinstance(request, inference_pb2.TokenizeRequest)
    assert request.without_start
    assert (report.state, report.is_serving) == ("loading", False)
    assert [(w.id, w.state) for w in report.workers] == [("w1", "loading")]


async def forever(context: object) -> AsyncIterator[Reply]:
    yield Reply(text="on")
    await asyncio.sleep(60)


async def test_an_answer_that_is_left_is_cancelled_at_the_service(
    service: tuple[Service, str],
) -> None:
    fake, address = service
    fake.script = forever
    async with Client(address) as client:
        async with aclosing(client.generate("x")) as events:
            assert await anext(events) == Piece("on")
        await asyncio.wait_for(fake.ended.wait(), 5)


async def test_closing_the_client_cancels_what_still_runs(service: tuple[Service, str]) -> None:
    fake, address = service
    fake.script = forever
    client = Client(address)
    events = client.generate("x")
    await anext(events)
    await client.aclose()
    await asyncio.wait_for(fake.ended.wait(), 5)
    with pytest.raises((PotluckError, asyncio.CancelledError)):
        await anext(events)
    await client.aclose()  # twice is no error


async def test_a_silent_service_is_given_up(
    service: tuple[Service, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, address = service
    fake.script = forever
    monkeypatch.setattr(options, "IDLE_MESSAGE_SECONDS", 0.2)
    async with Client(address) as client:
        events = client.generate("x")
        await anext(events)
        with pytest.raises(Unreachable, match=r"silent for 0\.2 s"):
            await anext(events)
        await asyncio.wait_for(fake.ended.wait(), 5)


async def test_an_answer_without_an_end_is_an_error(service: tuple[Service, str]) -> None:
    async def cut(context: object) -> AsyncIterator[Reply]:
        yield Reply(text="on")

    fake, address = service
    fake.script = cut
    async with Client(address) as client:
        with pytest.raises(Unreachable, match="ended early"):
            async for _ in client.generate("x"):
                pass


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, UsageError),
        (grpc.StatusCode.OUT_OF_RANGE, ContextExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Full),
        (grpc.StatusCode.UNAVAILABLE, Unreachable),
        (grpc.StatusCode.INTERNAL, PotluckError),
    ],
)
async def test_a_refusal_is_our_error_with_its_remedy(
    code: grpc.StatusCode, kind: type[PotluckError], service: tuple[Service, str]
) -> None:
    async def refuse(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Reply]:
        yield Reply(prefill=inference_pb2.Prefill())
        await context.abort(code, "layers [0, 8) are unserved\ntry again")

    fake, address = service
    fake.script = refuse
    async with Client(address) as client:
        with pytest.raises(kind) as raised:
            async for _ in client.generate("x"):
                pass
    assert raised.value.message.endswith("layers [0, 8) are unserved")
    assert raised.value.remedy == "try again"


async def test_a_service_that_goes_away_is_named_in_words(service: tuple[Service, str]) -> None:
    server = grpc.aio.server(options=options.server_options())
    inference_pb2_grpc.add_InferenceServicer_to_server(cast(Any, Service(forever)), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with Client(address) as client:
        events = client.generate("x")
        await anext(events)
        await server.stop(None)
        with pytest.raises(PotluckError) as raised:
            await anext(events)
        assert "Socket closed" not in raised.value.message
        with pytest.raises(Unreachable) as nobody:
            await client.status()
    assert nobody.value.message == f"nobody answers at {address}"
    assert "potluck serve" in nobody.value.remedy


@pytest.mark.parametrize(
    ("details", "words"),
    [
        ("Socket closed", "the service at pi1:7685 went away"),
        ("ping timeout", "the service at pi1:7685 does not answer any more"),
        ("DNS resolution failed for pi1:7685: no such host", "no such address: pi1:7685"),
        ("layers [0, 8) are unserved", "pi1:7685: layers [0, 8) are unserved"),
    ],
)
def test_what_the_transport_says_becomes_words(details: str, words: str) -> None:
    from potluck.client import _error_of

    error = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details
    )
    assert _error_of(error, "pi1:7685").message == words


def test_an_unknown_worker_state_of_a_newer_protocol_is_a_word() -> None:
    assert messages.state_word(cluster_pb2.WORKER_STATE_QUARANTINED) == "quarantined"
    assert messages.state_word(99) == "unknown"


def test_people_import_it_from_the_top() -> None:
    assert potluck.Client is Client
