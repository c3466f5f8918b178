"""Who can send weights to this worker: the coordinator, and other workers that have some of them.

Asks for sums, headers and for what is where, and chooses whom to ask for a tensor. Belongs to the
event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import grpc.aio

from potluck.errors import DamagedTensor, ModelError, PotluckError, Unreachable
from potluck.gguf import HEADER_BYTES_LIMIT, TensorInfo
from potluck.rpc import options
from potluck.rpc.calls import finished
from potluck.rpc.hello import hello
from potluck.rpc.v1 import weights_pb2, weights_pb2_grpc, worker_pb2

log = logging.getLogger(__name__)

MOST_WRONG = 2  # tensors that another worker sent wrong, after which it is not asked any more
# Not a refusal: nobody is there, it stops, it has no stream left, it met a defect.
_AWAY = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
}


class Away(PotluckError):
    """A source does not answer, or not now. Another one may, or the same one later."""


class Busy(Away):
    """The coordinator is there and serves others first."""


class NotHere(PotluckError):
    """A source has not got it (any more), or gives nothing out."""


@dataclass(eq=False)
class Source:
    """Somebody who serves Weights. `name` is for people: "the coordinator", "worker w2"."""

    name: str
    address: str
    stub: weights_pb2_grpc.WeightsAsyncStub
    has_all: bool  # the coordinator has the whole model
    sums: set[bytes] = field(default_factory=set)  # of tensors that it is known to have
    n_streams: int = 0
    n_wrong: int = 0
    n_away: int = 0  # times in a row
    rests_until: float = 0.0  # on the loop's clock

    def has(self, sha256: bytes) -> bool:
        """Whether it is worth asking."""
        return self.has_all or (sha256 in self.sums and self.n_wrong < MOST_WRONG)

    def rest(self, now: float) -> None:
        """It did not answer: a pause, longer each time."""
        if now < self.rests_until:
            return  # another stream has said so
        pauses = options.FETCH_PAUSES_SECONDS
        self.rests_until = now + pauses[min(self.n_away, len(pauses) - 1)]
        self.n_away += 1

    def fetch(self, **what: Any) -> Any:
        """A Fetch call; `what` are fields of FetchRequest."""
        return self.stub.Fetch(weights_pb2.FetchRequest(hello=hello(), **what))


class Sources:
    """The sources of one load."""

    def __init__(self, coordinator: Source, workers: Sequence[Source], header_sha256: str) -> None:
        self.coordinator = coordinator
        self._workers = list(workers)
        self.header_sha256 = header_sha256

    @property
    def names(self) -> str:
        """For people, with addresses."""
        return ", ".join(f"{s.name} at {s.address}" for s in (self.coordinator, *self._workers))

    def choose(self, sha256: bytes, blamed: Counter[str], now: float) -> Source | None:
        """Whom to ask for a tensor: not who sent it wrong before, and who has least to do.

        None: all that have it rest.
        """
        able = [s for s in self._having(sha256) if s.rests_until <= now]
        return min(able, key=lambda s: (blamed[s.name], s.n_streams, s.has_all), default=None)

    def next_at(self, sha256: bytes) -> float:
        """When the first of those that have a tensor has rested."""
        return min(source.rests_until for source in self._having(sha256))

    async def find(self, sums: Sequence[bytes]) -> None:
        """Asks other workers which of these they have. Who does not answer has none."""
        request = weights_pb2.FindRequest(hello=hello(), sha256=sums)

        async def ask(source: Source) -> None:
            call = source.stub.Find(request, timeout=options.FIND_SECONDS)
            try:
                reply = cast("weights_pb2.FindReply", await answered(source, call))
            except (Away, NotHere, ModelError) as e:
                log.info("%s is not asked for weights: %s", source.name, e.message)
                return
            source.sums.update(
                s for s, is_here in zip(sums, reply.is_here, strict=False) if is_here
            )

        await asyncio.gather(*(ask(source) for source in self._workers if source.n_away == 0))

    async def digests(self, tensors: Sequence[TensorInfo]) -> list[bytes]:
        """The sums of these tensors in the coordinator's file. Raises Away, NotHere, ModelError."""
        request = weights_pb2.ManifestRequest(
            hello=hello(), header_sha256=self.header_sha256, tensors=[t.name for t in tensors]
        )
        call = self.coordinator.stub.Manifest(request)
        found: dict[str, weights_pb2.TensorDigest] = {}
        async with aclosing(messages(self.coordinator, call)) as digests:
            async for digest in digests:
                found[digest.tensor] = digest
                if len(found) == len(tensors):
                    break
        return [_sum_of(tensor, found) for tensor in tensors]

    async def header(self, size_bytes: int) -> bytes:
        """The model's header, compared by its sum; the file has `size_bytes`.

        Raises Away, NotHere, ModelError; DamagedTensor: it is not what was announced.
        """
        source = self.coordinator
        call = source.fetch(header_sha256=self.header_sha256)
        data = bytearray()
        async with aclosing(messages(source, call)) as parts:
            async for part in parts:
                data += part.data
                if len(data) > min(size_bytes, HEADER_BYTES_LIMIT):
                    break
        if hashlib.sha256(data).hexdigest() != self.header_sha256:
            raise DamagedTensor(
                f"{source.name} at {source.address} sent {len(data):,} bytes that are not the"
                f" header with sha256 {self.header_sha256[:12]}..."
            )
        return bytes(data)

    def _having(self, sha256: bytes) -> list[Source]:
        return [s for s in (*self._workers, self.coordinator) if s.has(sha256)]


@asynccontextmanager
async def open_sources(request: worker_pb2.LoadRequest, own_name: str) -> AsyncIterator[Sources]:
    """The coordinator's door and the other workers' that a load names; dialled when first asked."""
    async with AsyncExitStack() as stack:

        async def source(name: str, address: str, *, has_all: bool = False) -> Source:
            channel = grpc.aio.insecure_channel(address, options=options.bulk_options())
            await stack.enter_async_context(channel)
            return Source(name, address, weights_pb2_grpc.WeightsStub(channel), has_all)

        coordinator = await source("the coordinator", request.weights_address, has_all=True)
        workers = [
            await source(f"worker {target.worker}", target.address)
            for target in request.neighbours
            if target.address and target.worker != own_name
        ]
        yield Sources(coordinator, workers, request.model.header_sha256)


async def messages(source: Source, call: Any) -> AsyncGenerator[Any, None]:
    """What a stream brings, each within FETCH_STALL_SECONDS. Raises like `next_message`."""
    loop = asyncio.get_running_loop()
    try:
        while True:
            stop_at = loop.time() + options.FETCH_STALL_SECONDS
            if (message := await next_message(source, call, stop_at)) is None:
                return
            yield message
    finally:
        call.cancel()


async def next_message(source: Source, call: Any, stop_at: float) -> Any:
    """The next message of a stream; None: there is none. `stop_at` is on the loop's clock.

    Raises Away, NotHere, and what the coordinator refuses as ModelError with its words.
    """
    try:
        async with asyncio.timeout_at(stop_at):
            message = await answered(source, call.read())
    except TimeoutError as e:
        stall = options.FETCH_STALL_SECONDS
        raise Away(f"{source.name} sent nothing, or next to nothing, for {stall:g} s") from e
    return None if message is grpc.aio.EOF else message


async def answered(source: Source, operation: Any) -> Any:
    """The result of one operation of a call. Raises like `next_message`."""
    try:
        return await finished(operation)
    except Unreachable as e:
        raise Away(f"{source.name}: {e.message}") from e
    except grpc.aio.AioRpcError as e:
        words, _, remedy = (e.details() or e.code().name).partition("\n")
        if e.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and source.has_all:
            raise Busy(f"{source.name}: {words}") from e
        if e.code() in _AWAY:
            raise Away(f"{source.name} does not answer ({e.code().name})") from e
        if source.has_all:
            raise ModelError(f"{source.name}: {words}", remedy=remedy) from e
        raise NotHere(f"{source.name}: {words}") from e


def _sum_of(tensor: TensorInfo, found: Mapping[str, weights_pb2.TensorDigest]) -> bytes:
    digest = found.get(tensor.name)
    if digest is None:
        raise Away(f"the coordinator did not tell the sha256 of {tensor.name}")
    if len(digest.sha256) != 32 or digest.size_bytes != tensor.size_bytes:
        raise ModelError(
            f"{tensor.name}: the coordinator has {digest.size_bytes:,} bytes of it, by its header"
            f" there are {tensor.size_bytes:,}"
        )
    return digest.sha256
