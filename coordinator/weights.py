"""The door where workers get the served model: sums of its tensors, their bytes, its header.

It gives out what the served file holds and nothing else: no path and no name leads anywhere. Files
are read in threads, a few messages a stream at a time, and a bounded number of streams; who comes
on top is put off and asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from coordinator.served import ServedModel
from potluck import manifest
from potluck.cursor import shown
from potluck.errors import Full, UnknownModel
from potluck.gguf import TensorInfo
from potluck.rpc import options
from potluck.rpc.hello import check_hello
from potluck.rpc.parts import parts
from potluck.rpc.v1 import types_pb2, weights_pb2, weights_pb2_grpc

HASHERS = 2  # tensors that are hashed at a time; a core hashes 1.6 GB/s


class Weights(weights_pb2_grpc.WeightsServicer):
    """Serves one model. Belongs to the event loop."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._hashers = ThreadPoolExecutor(HASHERS, thread_name_prefix="sha256")
        self._n_streams = 0

    async def Manifest(
        self, request: weights_pb2.ManifestRequest, context: object
    ) -> AsyncIterator[weights_pb2.TensorDigest]:
        """Sums in the order asked for; the next ones are made while one is on its way."""
        sums = self._manifest(request.hello, request.header_sha256)
        tensors = self._tensors(request.tensors)
        loop = asyncio.get_running_loop()
        with self._stream():
            coming: deque[tuple[TensorInfo, asyncio.Future[bytes]]] = deque()
            try:
                while tensors or coming:
                    while tensors and len(coming) < 2 * HASHERS:
                        tensor = tensors.popleft()
                        making = loop.run_in_executor(self._hashers, sums.sha256, tensor)
                        coming.append((tensor, making))
                    tensor, making = coming.popleft()
                    yield weights_pb2.TensorDigest(
                        tensor=tensor.name, sha256=await making, size_bytes=tensor.size_bytes
                    )
            finally:
                for _, making in coming:  # nobody waits for it; an error of it is not news
                    making.cancel()
                await asyncio.gather(*(making for _, making in coming), return_exceptions=True)

    async def Find(
        self, request: weights_pb2.FindRequest, context: object
    ) -> weights_pb2.FindReply:
        """Which are here, of those whose sums are known."""
        sums = self._manifest(request.hello, self._model.reference.header_sha256)
        here = (sums.tensor_of(sha256) is not None for sha256 in request.sha256)
        return weights_pb2.FindReply(is_here=here)

    async def Fetch(
        self, request: weights_pb2.FetchRequest, context: object
    ) -> AsyncIterator[weights_pb2.FetchPart]:
        """A tensor by its sum, which Manifest has given; or the model's header."""
        header = request.header_sha256 or self._model.reference.header_sha256
        sums = self._manifest(request.hello, header)
        start, size = 0, self._model.file.data_offset_bytes
        if not request.header_sha256:
            tensor = sums.tensor_of(request.sha256)
            if tensor is None:
                raise UnknownModel(f"no tensor with sha256 {request.sha256.hex()[:12]}... is here")
            start, size = tensor.offset_bytes, tensor.size_bytes

        def read(offset: int, n_bytes: int) -> bytes:
            return sums.read(start + offset, n_bytes)

        with self._stream():
            stream = parts(read, size, request.offset_bytes)
            async with contextlib.aclosing(stream) as messages_:
                async for part in messages_:
                    yield part

    def _manifest(self, hello: types_pb2.Hello, header_sha256: str) -> manifest.Manifest:
        """Raises UsageError: another protocol; UnknownModel: another model, or one without file."""
        check_hello(hello, "the worker", "coordinator")
        reference = self._model.reference
        if self._model.manifest is None:
            raise UnknownModel(f"{reference.name} has no file: workers make its weights")
        if header_sha256 != reference.header_sha256:
            raise UnknownModel(
                f"{reference.name} is served, not the model with header sha256"
                f" {header_sha256[:12]}..."
            )
        return self._model.manifest

    def _tensors(self, names: Sequence[str]) -> deque[TensorInfo]:
        """Of these names, each once; of none: all. Raises UnknownModel."""
        tensors = self._model.file.tensors
        for name in names:
            if name not in tensors:
                raise UnknownModel(f"{self._model.name} has no tensor {shown(name)}")
        return deque(tensors[name] for name in dict.fromkeys(names or tensors))

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """Raises Full instead of being one stream too many."""
        if self._n_streams == options.SERVED_STREAMS:
            raise Full(f"{self._n_streams} streams of weights are open", remedy="try again")
        self._n_streams += 1
        try:
            yield
        finally:
            self._n_streams -= 1
