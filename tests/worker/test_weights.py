"""The door where a worker gives tensors to others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from potluck import gguf
from potluck.manifest import Manifest
from potluck.rpc import PROTOCOL, options
from potluck.rpc.v1 import types_pb2, weights_pb2, weights_pb2_grpc
from potluck.tensor_store import TensorStore
from potluck.testing import write_tiny
from worker.weights import OwnFiles, Weights

HELLO = types_pb2.Hello(protocol=PROTOCOL)
Code = grpc.StatusCode
DATA = bytes(range(256)) * 5000  # three messages
SUM = hashlib.sha256(DATA).digest()


@asynccontextmanager
async def served(store: TensorStore, own: OwnFiles | None = None) -> AsyncIterator[Any]:
    server = grpc.aio.server()
    weights_pb2_grpc.add_WeightsServicer_to_server(Weights(store, own or OwnFiles()), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield weights_pb2_grpc.WeightsStub(channel)
    finally:
        await server.stop(None)


@pytest.fixture
def store(tmp_path: Path) -> TensorStore:
    store = TensorStore(tmp_path / "tensors")
    with store.writer(SUM, len(DATA)) as writer:
        writer.write(DATA)
        writer.finish()
    return store


async def refused(call: Any) -> Code:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in call:
            pass
    return error.value.code()


def fetch(sha256: bytes, offset: int = 0) -> weights_pb2.FetchRequest:
    return weights_pb2.FetchRequest(hello=HELLO, sha256=sha256, offset_bytes=offset)


async def test_what_is_in_the_store_is_found_and_given_from_any_byte(store: TensorStore) -> None:
    async with served(store) as stub:
        request = weights_pb2.FindRequest(hello=HELLO, sha256=[b"\0" * 32, SUM])
        assert list((await stub.Find(request)).is_here) == [False, True]
        for offset in (0, 7, options.PART_BYTES, len(DATA)):
            parts = [part.data async for part in stub.Fetch(fetch(SUM, offset))]
            assert b"".join(parts) == DATA[offset:]
            assert all(len(part) <= 2 * 2**20 for part in parts)


async def test_what_a_verified_file_holds_is_given_too(store: TensorStore, tmp_path: Path) -> None:
    file = gguf.read(write_tiny(tmp_path / "m.gguf"))
    manifest = Manifest(file, tmp_path / "sums")
    tensor = file.tensors["blk.1.ffn_up.weight"]
    sha256 = manifest.sha256(tensor)
    own = OwnFiles()
    async with served(store, own) as stub:
        assert await refused(stub.Fetch(fetch(sha256))) is Code.NOT_FOUND
        own.add(file.header_sha256, manifest)
        request = weights_pb2.FindRequest(hello=HELLO, sha256=[sha256])
        assert list((await stub.Find(request)).is_here) == [True]
        data = b"".join([part.data async for part in stub.Fetch(fetch(sha256, 3))])
        assert data == manifest.read(tensor.offset_bytes, tensor.size_bytes)[3:]


async def test_nothing_else_is_given_out(
    store: TensorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = store.path_of(b"\2" * 32)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(__file__)
    part = store.path_of(b"\3" * 32)
    part.parent.mkdir(parents=True, exist_ok=True)
    part.with_name(part.name + ".part").write_bytes(b"half")
    async with served(store) as stub:
        for sha256, code in (
            (b"\1" * 32, Code.NOT_FOUND),
            (b"\2" * 32, Code.NOT_FOUND),
            (b"\3" * 32, Code.NOT_FOUND),
            (b"../../x", Code.INVALID_ARGUMENT),
            (b"", Code.INVALID_ARGUMENT),
        ):
            assert await refused(stub.Fetch(fetch(sha256))) is code
        assert await refused(stub.Fetch(fetch(SUM, len(DATA) + 1))) is Code.OUT_OF_RANGE
        assert await refused(stub.Fetch(weights_pb2.FetchRequest())) is Code.INVALID_ARGUMENT
        assert await refused(stub.Manifest(weights_pb2.ManifestRequest())) is Code.UNIMPLEMENTED
        for request in (
            weights_pb2.FindRequest(hello=HELLO, sha256=[b"short"]),
            weights_pb2.FindRequest(sha256=[SUM]),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Find(request)
            assert error.value.code() is Code.INVALID_ARGUMENT
        monkeypatch.setattr(options, "SERVED_STREAMS", 0)
        assert await refused(stub.Fetch(fetch(SUM))) is Code.RESOURCE_EXHAUSTED


async def test_a_tensor_that_shrank_ends_the_stream(
    store: TensorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        return read(descriptor, size, offset)[: size - (offset > 0)]

    async with served(store) as stub:
        monkeypatch.setattr(os, "pread", pread)
        assert await refused(stub.Fetch(fetch(SUM))) is Code.NOT_FOUND
