"""The door for people: Inference on the public port. Translates, decides nothing.

Errors leave as potluck.errors; grpc_server turns them into status codes by the one table.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Protocol

from coordinator import report
from coordinator.engine import Engine
from coordinator.request import (
    DEFAULT_MIN_P,
    DEFAULT_TEMPERATURE,
    DEFAULT_TOP_K,
    DEFAULT_TOP_P,
    Request,
    check_model,
    checked,
)
from coordinator.session import Ending
from coordinator.stream import AnswerStream, Update
from potluck.errors import UsageError
from potluck.rpc.v1 import cluster_pb2, inference_pb2, inference_pb2_grpc
from potluck.sampling import Pick, Sampling

Parts = Sequence[tuple[str, bool]]  # (text, whether the template wrote it)

_LONG_TEXT = 2048  # letters; a shorter text is encoded faster than a thread is asked


class Conversations(Protocol):
    """Messages to the parts of a prompt, by the model's chat template; templates fits."""

    async def parts(self, messages: Sequence[tuple[str, str]]) -> Parts:
        """(role, content), oldest first, rendered. Raises UsageError."""
        ...


class Inference(inference_pb2_grpc.InferenceServicer):
    """Generate, Chat and the small calls, over one engine."""

    def __init__(self, engine: Engine, conversations: Conversations) -> None:
        self._engine = engine
        self._conversations = conversations
        self._tokenizer = engine.model.tokenizer

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: object
    ) -> AsyncIterator[inference_pb2.GenerateReply]:
        """Continues a prompt."""
        check_model(request.options.model, self._engine.model.name)
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise UsageError("the prompt is missing: text or tokens")
        prompt = (
            await self._encode(request.text, add_start=True)
            if kind == "text"
            else list(request.tokens.ids)
        )
        if kind == "text" and not request.text:
            raise UsageError("the prompt is empty; it needs at least one token")
        asked = self._checked(prompt, request.options, continues=True)
        async with aclosing(self._answer(asked)) as replies:
            async for reply in replies:
                yield reply

    async def Chat(
        self, request: inference_pb2.ChatRequest, context: object
    ) -> AsyncIterator[inference_pb2.GenerateReply]:
        """Continues a conversation."""
        check_model(request.options.model, self._engine.model.name)
        messages = [(message.role, message.content) for message in request.messages]
        parts = await self._conversations.parts(messages)
        prompt = await asyncio.to_thread(self._tokenizer.encode_template, parts)
        asked = self._checked(prompt, request.options, continues=False)
        async with aclosing(self._answer(asked)) as replies:
            async for reply in replies:
                yield reply

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: object
    ) -> inference_pb2.TokenizeReply:
        """Text to tokens, special ones only at the start."""
        ids = await self._encode(request.text, add_start=not request.without_start)
        return inference_pb2.TokenizeReply(ids=ids)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: object
    ) -> inference_pb2.DetokenizeReply:
        """Tokens to text."""
        text = await asyncio.to_thread(self._tokenizer.decode, list(request.ids))
        return inference_pb2.DetokenizeReply(text=text)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: object
    ) -> inference_pb2.ListModelsReply:
        """The one that is served."""
        return inference_pb2.ListModelsReply(models=[report.model_info(self._engine)])

    async def Status(
        self, request: inference_pb2.StatusRequest, context: object
    ) -> inference_pb2.StatusReply:
        """Plan, workers, links, figures."""
        return report.status_of(self._engine)

    async def _answer(self, request: Request) -> AsyncGenerator[inference_pb2.GenerateReply, None]:
        """The replies of one request; whoever stops reading ends it."""
        stream = self._engine.submit(request)
        try:
            while True:
                update = await stream.next()
                yield self._reply(stream, update)
                if update.ended is not None:
                    return
        finally:
            self._engine.give_up(stream)

    async def _encode(self, text: str, *, add_start: bool) -> list[int]:
        if len(text) <= _LONG_TEXT:
            return self._tokenizer.encode(text, add_start=add_start)
        return await asyncio.to_thread(self._tokenizer.encode, text, add_start=add_start)

    def _checked(
        self, prompt: Sequence[int], asked: inference_pb2.Options, *, continues: bool
    ) -> Request:
        model = self._engine.model
        return checked(
            prompt,
            asked.max_tokens,
            sampling_of(asked, self._engine.model.config.vocab),
            asked.stop,
            ends_at=frozenset() if asked.ignore_end else self._tokenizer.end_ids,
            continues=continues,
            context_tokens=model.context_tokens,
            vocab=model.config.vocab,
            prompt_logprobs_start=asked.prompt_logprobs_start,
        )

    def _reply(self, stream: AnswerStream, update: Update) -> inference_pb2.GenerateReply:
        reply = inference_pb2.GenerateReply(
            text=update.text,
            tokens=[_token_info(pick) for pick in update.picks],
            prompt_tokens=[_token_info(pick) for pick in update.scores],
        )
        session = stream.session
        if session.is_reading and update.ended is None:
            reply.prefill.done_tokens = session.n_computed
            reply.prefill.total_tokens = session.n_prompt
            reply.prefill.queue = self._engine.queue_place(stream)
        if update.ended is not None:
            is_stop = update.ended.ending is Ending.STOP
            reply.done.finish_reason = (
                inference_pb2.FINISH_REASON_STOP if is_stop else inference_pb2.FINISH_REASON_LENGTH
            )
            reply.done.prompt_tokens = session.n_prompt
            reply.done.answer_tokens = session.n_answer
            reply.done.queue_seconds = update.ended.queue_seconds
            reply.done.prefill_seconds = update.ended.prefill_seconds
            reply.done.decode_seconds = update.ended.decode_seconds
            reply.done.seed = session.sampling.seed
        return reply


def sampling_of(asked: inference_pb2.Options, vocab: int) -> Sampling:
    """The asked-for settings with the service's defaults. Raises UsageError."""
    return Sampling(
        temperature=asked.temperature if asked.HasField("temperature") else DEFAULT_TEMPERATURE,
        top_k=asked.top_k if asked.HasField("top_k") else min(DEFAULT_TOP_K, vocab),
        top_p=(asked.top_p or 1.0) if asked.HasField("top_p") else DEFAULT_TOP_P,
        min_p=asked.min_p if asked.HasField("min_p") else DEFAULT_MIN_P,
        repetition_penalty=asked.repetition_penalty or 1.0,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        seed=asked.seed if asked.HasField("seed") else secrets.randbits(63),
        logprobs=asked.logprobs if asked.HasField("logprobs") else None,
        prompt_logprobs=asked.prompt_logprobs if asked.HasField("prompt_logprobs") else None,
    )


def _token_info(pick: Pick) -> inference_pb2.TokenInfo:
    return inference_pb2.TokenInfo(
        token_id=pick.token,
        logprob=pick.logprob,
        top=[cluster_pb2.TokenLogprob(token_id=id, logprob=value) for id, value in pick.top],
    )
