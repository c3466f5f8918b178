"""The door where other workers get tensors that are here: delivered ones, and those of own files.

Only by sha256: no path and no name leads anywhere. Files are read in threads, a few messages a
stream at a time, and a bounded number of streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc

from potluck.errors import Full, PotluckError, UnknownModel, UsageError
from potluck.manifest import Manifest
from potluck.rpc import options, status
from potluck.rpc.hello import check_hello
from potluck.rpc.parts import parts
from potluck.rpc.v1 import weights_pb2, weights_pb2_grpc
from potluck.tensor_store import TensorStore

Read = Callable[[int, int], bytes]  # offset, size; blocks


class OwnFiles:
    """GGUF files of this machine that turned out to hold tensors of a served model."""

    def __init__(self) -> None:
        self._manifests: dict[str, Manifest] = {}  # by header

    def add(self, header_sha256: str, manifest: Manifest) -> None:
        """In place of an earlier one with the same header."""
        self._manifests[header_sha256] = manifest

    def find(self, sha256: bytes) -> tuple[Read, int] | None:
        """How to read a tensor, and its size; None: in none of them."""
        for manifest in self._manifests.values():
            if (tensor := manifest.tensor_of(sha256)) is not None:
                start = tensor.offset_bytes

                def read(offset: int, size: int, m: Manifest = manifest, at: int = start) -> bytes:
                    return m.read(at + offset, size)

                return read, tensor.size_bytes
        return None


class Weights(weights_pb2_grpc.WeightsServicer):
    """Belongs to the event loop."""

    def __init__(self, store: TensorStore, own_files: OwnFiles) -> None:
        self._store = store
        self._own_files = own_files
        self._n_streams = 0

    async def Manifest(
        self, request: weights_pb2.ManifestRequest, context: Any
    ) -> AsyncIterator[weights_pb2.TensorDigest]:
        """Not here: a worker never says what a model consists of."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask the coordinator")
        yield weights_pb2.TensorDigest()

    async def Find(self, request: weights_pb2.FindRequest, context: Any) -> weights_pb2.FindReply:
        """Which of these are here."""
        try:
            check_hello(request.hello, "the caller", "worker")
        except PotluckError as e:
            await context.abort(status.code_of(e), status.details_of(e))
        sums = [s for s in request.sha256 if len(s) == 32]
        if len(sums) < len(request.sha256):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "sha256: 32 bytes each")
        here = await asyncio.to_thread(lambda: [self._is_here(s) for s in sums])
        return weights_pb2.FindReply(is_here=here)

    async def Fetch(
        self, request: weights_pb2.FetchRequest, context: Any
    ) -> AsyncIterator[weights_pb2.FetchPart]:
        """A tensor, from an offset on."""
        try:
            async with contextlib.AsyncExitStack() as stack:
                check_hello(request.hello, "the caller", "worker")
                stack.enter_context(self._stream())
                read, size = await asyncio.to_thread(self._open, request.sha256, stack)
                stream = parts(read, size, request.offset_bytes)
                async for part in await stack.enter_async_context(contextlib.aclosing(stream)):
                    yield part
        except PotluckError as e:
            await context.abort(status.code_of(e), status.details_of(e))

    def _is_here(self, sha256: bytes) -> bool:
        return self._store.path_of(sha256).is_file() or self._own_files.find(sha256) is not None

    def _open(self, sha256: bytes, stack: contextlib.AsyncExitStack) -> tuple[Read, int]:
        """How to read a tensor, and its size. Raises UsageError, UnknownModel."""
        if len(sha256) != 32:
            raise UsageError("sha256: 32 bytes of a tensor; headers are the coordinator's")
        path = self._store.path_of(sha256)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            if (found := self._own_files.find(sha256)) is None:
                raise UnknownModel(
                    f"no tensor with sha256 {sha256.hex()[:12]}... is here"
                ) from None
            return found
        stack.callback(os.close, descriptor)

        def read(offset: int, size: int) -> bytes:
            try:
                data = os.pread(descriptor, size, offset)
            except OSError as e:
                raise UnknownModel(f"{path} can't be read: {e.strerror}") from e
            if len(data) != size:
                raise UnknownModel(f"{path} was cut short")
            return data

        return read, os.fstat(descriptor).st_size

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
