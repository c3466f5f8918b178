"""Client: asks a coordinator over gRPC. A door: it translates and decides nothing.

Async, one connection; a stream that is closed, cancelled or dropped ends its session on every
worker within a step. Every wait has a deadline (potluck/rpc/options.py), and what fails
raises potluck.errors.

    import asyncio
    from potluck import Client

    async def main() -> None:
        async with Client("127.0.0.1:7685") as client:
            async for event in client.generate("The capital of France is"):
                print(getattr(event, "text", ""), end="", flush=True)

    asyncio.run(main())
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
import grpc.aio

from potluck import replies
from potluck.errors import PotluckError, Unreachable
from potluck.rpc import messages
from potluck.rpc import options as rpc_options
from potluck.rpc import status as rpc_status
from potluck.rpc.calls import finished
from potluck.rpc.v1 import inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    Answers = grpc.aio.UnaryStreamCall[Any, inference_pb2.GenerateReply]

T = TypeVar("T")

_START = "start one with `potluck serve MODEL`, or name another with --connect HOST:PORT"
_LOOK = "look at `potluck status`; its own log says why"

# How gRPC words a transport that failed (grpcio 1.85.1), what people call it, what they can do.
# Met with: no listener, an unknown name, a killed service, a stopped one.
_TRANSPORT = {
    "failed to connect to all addresses": ("nobody answers at {}", _START),
    "dns resolution failed": ("no such address: {}", _START),
    "socket closed": ("the service at {} went away", _LOOK),
    "connection reset": ("the service at {} went away", _LOOK),
    "goaway": ("the service at {} went away", _LOOK),
    "ping timeout": ("the service at {} does not answer any more", _LOOK),
    "keepalive": ("the service at {} does not answer any more", _LOOK),
}


class Client:
    """A connection to the coordinator at `address` (host:port). For one event loop."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the connection; answers that still run are cancelled. Twice is no error."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def generate(
        self,
        prompt: str | Sequence[int],
        options: replies.AnswerOptions | None = None,
    ) -> AsyncGenerator[replies.AnswerEvent, None]:
        """Continues `prompt`: text, or token ids taken as they are. The last event is Done.

        Raises UsageError, ContextExceeded, UnknownModel, Full, Unreachable.
        """
        request = inference_pb2.GenerateRequest(options=messages.options_message(options))
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.tokens.ids.extend(prompt)
        async for event in self._answer(self._stub().Generate(request)):
            yield event

    async def chat(
        self,
        conversation: Iterable[replies.Message],
        options: replies.AnswerOptions | None = None,
    ) -> AsyncGenerator[replies.AnswerEvent, None]:
        """Answers a conversation, oldest message first, by the model's chat template."""
        request = inference_pb2.ChatRequest(
            messages=[inference_pb2.Message(role=m.role, content=m.content) for m in conversation],
            options=messages.options_message(options),
        )
        async for event in self._answer(self._stub().Chat(request)):
            yield event

    async def tokenize(self, text: str, *, without_start: bool = False) -> list[int]:
        """Token ids of `text`, with the model's start token unless `without_start`."""
        request = inference_pb2.TokenizeRequest(text=text, without_start=without_start)
        deadline = rpc_options.text_seconds(len(text))
        reply = await self._call(self._stub().Tokenize(request, timeout=deadline))
        return list(reply.ids)

    async def detokenize(self, ids: Iterable[int]) -> str:
        """The text of token ids."""
        request = inference_pb2.DetokenizeRequest(ids=list(ids))
        reply = await self._call(self._stub().Detokenize(request, timeout=rpc_options.CALL_SECONDS))
        return reply.text

    async def models(self) -> list[replies.ServedModel]:
        """The models that are served."""
        request = inference_pb2.ListModelsRequest()
        reply = await self._call(self._stub().ListModels(request, timeout=rpc_options.CALL_SECONDS))
        return [messages.model_of(m) for m in reply.models]

    async def status(self) -> replies.ServiceReport:
        """Plan, workers, links and figures as they are now."""
        request = inference_pb2.StatusRequest()
        reply = await self._call(self._stub().Status(request, timeout=rpc_options.CALL_SECONDS))
        return messages.service_of(reply)

    def _stub(self) -> inference_pb2_grpc.InferenceAsyncStub:
        if self._channel is None:  # here and not in __init__: a channel belongs to the running loop
            self._channel = grpc.aio.insecure_channel(
                self.address, options=rpc_options.client_options()
            )
        return inference_pb2_grpc.InferenceStub(self._channel)

    async def _call(self, call: Awaitable[T]) -> T:
        try:
            return await finished(call)
        except grpc.aio.AioRpcError as error:
            raise _error_of(error, self.address) from error

    async def _answer(self, call: Answers) -> AsyncGenerator[replies.AnswerEvent, None]:
        """Events of a stream. The coordinator speaks every few seconds: if silent, it is lost."""
        try:
            while True:
                async with asyncio.timeout(rpc_options.IDLE_MESSAGE_SECONDS):
                    message = await finished(call.read())
                if not isinstance(message, inference_pb2.GenerateReply):  # grpc.aio.EOF
                    raise Unreachable(f"{self.address}: the answer ended early")
                for event in messages.events_of(message):
                    yield event
                if message.HasField("done"):
                    return
        except grpc.aio.AioRpcError as error:
            raise _error_of(error, self.address) from error
        except TimeoutError as error:
            raise Unreachable(
                f"{self.address} was silent for {rpc_options.IDLE_MESSAGE_SECONDS:g} s",
                remedy="look at `potluck status`, then ask again",
            ) from error
        finally:
            call.cancel()


def _error_of(error: grpc.aio.AioRpcError, address: str) -> PotluckError:
    """What the service said, or in people's words what the transport said."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        for phrase, (words, remedy) in _TRANSPORT.items():
            if phrase in details.lower():
                return Unreachable(words.format(address), remedy=remedy)
    return rpc_status.error_of(code, details, address)
