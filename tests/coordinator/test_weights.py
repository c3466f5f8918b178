"""The door where workers get the served model's weights."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from potluck.rpc import PROTOCOL, options
from potluck.rpc.v1 import types_pb2, weights_pb2, weights_pb2_grpc

HELLO = types_pb2.Hello(protocol=PROTOCOL)
Code = grpc.StatusCode


@asynccontextmanager
async def door_of(start_service: Any) -> AsyncIterator[tuple[Any, Any]]:
    """A stub of the fleet's door, and the served model."""
    service = await start_service(workers=1, wait=False)
    async with grpc.aio.insecure_channel(service.addresses.fleet) as channel:
        yield weights_pb2_grpc.WeightsStub(channel), service.engine.model


async def refused(call: Any) -> tuple[Code, str]:
    is_stream = isinstance(call, grpc.aio.UnaryStreamCall)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await (taken(call) if is_stream else call)
    return error.value.code(), error.value.details() or ""


async def taken(call: Any) -> bytes:
    return b"".join([getattr(message, "data", b"") async for message in call])


async def test_sums_bytes_and_header_are_those_of_the_file(start_service: Any) -> None:
    async with door_of(start_service) as (stub, model):
        data = model.file.path.read_bytes()
        header = model.reference.header_sha256
        asked = weights_pb2.ManifestRequest(hello=HELLO, header_sha256=header)
        digests = [digest async for digest in stub.Manifest(asked)]
        assert [d.tensor for d in digests] == list(model.file.tensors)
        for digest in digests:
            tensor = model.file.tensors[digest.tensor]
            found = data[tensor.offset_bytes :][: tensor.size_bytes]
            assert (digest.sha256, digest.size_bytes) == (
                hashlib.sha256(found).digest(),
                len(found),
            )
            for offset in (0, 1, len(found)):
                request = weights_pb2.FetchRequest(
                    hello=HELLO, sha256=digest.sha256, offset_bytes=offset
                )
                assert await taken(stub.Fetch(request)) == found[offset:]
        request = weights_pb2.FetchRequest(hello=HELLO, header_sha256=header)
        assert await taken(stub.Fetch(request)) == data[: model.file.data_offset_bytes]
        sums = [digests[0].sha256, b"\0" * 32, b""]
        reply = await stub.Find(weights_pb2.FindRequest(hello=HELLO, sha256=sums))
        assert list(reply.is_here) == [True, False, False]


async def test_asked_tensors_come_in_the_order_asked_each_once(start_service: Any) -> None:
    async with door_of(start_service) as (stub, model):
        names = [*reversed(model.file.tensors), "token_embd.weight"]
        asked = weights_pb2.ManifestRequest(
            hello=HELLO, header_sha256=model.reference.header_sha256, tensors=names
        )
        digests = [digest.tensor async for digest in stub.Manifest(asked)]
        assert digests == names[:-1]


async def test_nothing_but_the_served_model_is_given_out(start_service: Any) -> None:
    async with door_of(start_service) as (stub, model):
        header = model.reference.header_sha256
        manifest, fetch = weights_pb2.ManifestRequest, weights_pb2.FetchRequest
        for asked in (
            manifest(hello=HELLO, header_sha256="0" * 64),
            manifest(hello=HELLO, header_sha256=header, tensors=["../../etc/passwd"]),
        ):
            code, words = await refused(stub.Manifest(asked))
            assert code is Code.NOT_FOUND
            assert "tensor" in words or "is served, not the model" in words
        for request in (
            fetch(hello=HELLO, sha256=b"\1" * 32),
            fetch(hello=HELLO, sha256=b"short"),
            fetch(hello=HELLO, header_sha256="f" * 64),
            fetch(hello=HELLO),
        ):
            assert (await refused(stub.Fetch(request)))[0] is Code.NOT_FOUND
        late = fetch(hello=HELLO, header_sha256=header, offset_bytes=2**40)
        assert (await refused(stub.Fetch(late)))[0] is Code.OUT_OF_RANGE
        other = types_pb2.Hello(protocol=PROTOCOL + 7)
        assert (await refused(stub.Fetch(fetch(hello=other))))[0] is Code.INVALID_ARGUMENT
        assert (await refused(stub.Find(weights_pb2.FindRequest())))[0] is Code.INVALID_ARGUMENT


async def test_one_stream_too_many_is_put_off(
    start_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "SERVED_STREAMS", 0)
    async with door_of(start_service) as (stub, model):
        header = model.reference.header_sha256
        request = weights_pb2.FetchRequest(hello=HELLO, header_sha256=header)
        code, words = await refused(stub.Fetch(request))
        assert (code, "streams of weights are open" in words) == (Code.RESOURCE_EXHAUSTED, True)


async def test_a_file_changed_in_place_is_said(start_service: Any) -> None:
    async with door_of(start_service) as (stub, model):
        header = model.reference.header_sha256
        with model.file.path.open("ab") as opened:
            opened.write(b"more")
        request = weights_pb2.FetchRequest(hello=HELLO, header_sha256=header)
        code, words = await refused(stub.Fetch(request))
        assert (code, "was changed since it was opened" in words) == (
            Code.FAILED_PRECONDITION,
            True,
        )
