"""Fetching from sources that are honest, slow, silent, gone, or that lie."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from potluck import gguf, tensor_store
from potluck.errors import DamagedTensor, Full, ModelError
from potluck.gguf import GgufFile, TensorInfo
from potluck.rpc import options
from potluck.rpc.v1 import types_pb2, weights_pb2, weights_pb2_grpc, worker_pb2
from potluck.tensor_store import TensorStore
from potluck.testing import TinyShape, write_tiny
from worker import fetching
from worker.fetching import Fetching
from worker.sources import Sources, open_sources

PART = 1000
REFUSALS = {
    "refuses": (grpc.StatusCode.FAILED_PRECONDITION, "the file was changed"),
    "has lost it": (grpc.StatusCode.NOT_FOUND, "it is not here"),
    "busy": (grpc.StatusCode.RESOURCE_EXHAUSTED, "64 streams are open"),
}


class Sender(weights_pb2_grpc.WeightsServicer):
    """A source with all tensors. `way` is how it answers Fetch."""

    def __init__(self, file: GgufFile, way: str = "honest") -> None:
        self.file = file
        self.way = way
        self.data = file.path.read_bytes()
        self.sums = {self.sum_of(t): t for t in file.tensors.values()}
        self.n_fetches = 0
        self.sent: Counter[str] = Counter()  # bytes by tensor
        self.offsets: list[int] = []
        self.left = 10**12  # bytes that are sent before it hangs up
        self.has = set(self.sums)

    def bytes_of(self, tensor: TensorInfo) -> bytes:
        return self.data[tensor.offset_bytes :][: tensor.size_bytes]

    def sum_of(self, tensor: TensorInfo) -> bytes:
        return hashlib.sha256(self.bytes_of(tensor)).digest()

    async def Manifest(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for name in request.tensors:
            tensor = self.file.tensors[name]
            yield weights_pb2.TensorDigest(
                tensor=name, sha256=self.sum_of(tensor), size_bytes=tensor.size_bytes
            )

    async def Find(self, request: Any, context: Any) -> Any:
        if self.way == "finds nothing":
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "what?")
        return weights_pb2.FindReply(is_here=[s in self.has for s in request.sha256])

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.n_fetches += 1
        self.offsets.append(request.offset_bytes)
        tensor = self.sums[request.sha256]
        data = self.bytes_of(tensor)[request.offset_bytes :]
        if self.way in REFUSALS and (self.way != "busy" or self.n_fetches < 3):
            await context.abort(*REFUSALS[self.way])
        if self.way == "silent" and self.n_fetches > 1:
            await asyncio.sleep(60)
        async for part in self.parts(self.bent(data)):
            if self.left < len(part.data):
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut off")
            self.left -= len(part.data)
            self.sent[tensor.name] += len(part.data)
            yield part

    def bent(self, data: bytes) -> bytes:
        """What it sends in place of the rest of a tensor."""
        if self.way == "flips":
            return data[:-1] + bytes([data[-1] ^ 1])
        if self.way == "ends early":
            return data[: len(data) // 2]
        return data + bytes(10 * PART) if self.way == "endless" else data

    async def parts(self, data: bytes) -> AsyncIterator[Any]:
        for at in range(0, len(data), PART):
            part = data[at : at + PART]
            if self.way in ("stalls", "silent") and at:
                await asyncio.sleep(60)
            while self.way == "drips" and len(part) > 1:
                yield weights_pb2.FetchPart(data=part[:1])
                part = part[1:]
                await asyncio.sleep(0.05)
            yield weights_pb2.FetchPart(data=part)


@dataclass
class Place:
    """A coordinator and neighbours to fetch from, and the store."""

    file: GgufFile
    store: TensorStore
    stack: AsyncExitStack
    coordinator: Sender
    coordinator_server: Any = None
    neighbours: list[Sender] = field(default_factory=list)
    request: worker_pb2.LoadRequest = field(default_factory=worker_pb2.LoadRequest)

    @property
    def tensors(self) -> list[TensorInfo]:
        return list(self.file.tensors.values())

    async def serve(self, sender: Sender) -> tuple[Any, str]:
        server = grpc.aio.server()
        weights_pb2_grpc.add_WeightsServicer_to_server(sender, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self.stack.push_async_callback(server.stop, None)
        return server, f"127.0.0.1:{port}"

    async def add(self, way: str) -> Sender:
        sender = Sender(self.file, way)
        _, address = await self.serve(sender)
        name = f"w{len(self.neighbours) + 1}"
        self.request.neighbours.append(worker_pb2.LinkTarget(worker=name, address=address))
        self.neighbours.append(sender)
        return sender

    async def bring(self, tensors: list[TensorInfo] | None = None) -> Fetching:
        async with open_sources(self.request, "w0") as sources:
            return await self.bring_from(sources, tensors)

    async def bring_from(
        self, sources: Sources, tensors: list[TensorInfo] | None = None
    ) -> Fetching:
        wanted = self.tensors if tensors is None else tensors
        moving = Fetching(self.store, sources, self.stack)
        sums = await moving.bring(wanted)
        assert moving.left_bytes == 0
        for tensor in wanted:
            path = self.store.path_of(sums[tensor.name])
            assert path.read_bytes() == self.coordinator.bytes_of(tensor)
        return moving


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not claim():  # noqa: ASYNC110  no event says so
            await asyncio.sleep(0.01)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(options, "FETCH_STALL_SECONDS", 0.4)
    monkeypatch.setattr(options, "FETCH_LEAST_BYTES", 500)
    monkeypatch.setattr(options, "FETCH_AWAY_SECONDS", 1.5)
    monkeypatch.setattr(options, "FETCH_PAUSES_SECONDS", (0.02, 0.1))
    monkeypatch.setattr(tensor_store, "RESERVE_BYTES", 0)
    monkeypatch.setattr(fetching, "RESERVE_BYTES", 0)

    @asynccontextmanager
    async def make(way: str = "honest") -> AsyncIterator[Place]:
        file = gguf.read(write_tiny(tmp_path / "m.gguf", TinyShape(n_layers=3)))
        async with AsyncExitStack() as stack:
            place = Place(file, TensorStore(tmp_path / "tensors"), stack, Sender(file, way))
            place.coordinator_server, address = await place.serve(place.coordinator)
            place.request = worker_pb2.LoadRequest(
                weights_address=address,
                model=types_pb2.ModelReference(header_sha256=file.header_sha256),
            )
            yield place

    return make


async def test_each_tensor_comes_once_and_whole(place: Any) -> None:
    async with place() as p:
        moving = await p.bring()
        size = sum(len(p.coordinator.bytes_of(t)) for t in p.coordinator.sums.values())
        assert moving.fetched_bytes == sum(p.coordinator.sent.values()) == size
        again = await p.bring()
        assert again.fetched_bytes == 0
        assert sum(p.coordinator.sent.values()) == size


async def test_sources_share_the_work(place: Any) -> None:
    async with place() as p:
        for _ in range(2):
            await p.add("honest")
        moving = await p.bring()
        assert {"the coordinator", "worker w1", "worker w2"} >= set(moving.by_source)
        assert moving.by_source["worker w1"] > 0
        assert moving.by_source["worker w2"] > 0
        total = sum(p.coordinator.sent.values()) + sum(sum(n.sent.values()) for n in p.neighbours)
        assert moving.fetched_bytes == total


async def test_a_tensor_that_was_cut_off_goes_on_at_the_byte_where_it_was(place: Any) -> None:
    async with place() as p:
        (tensor,) = (t for t in p.tensors if t.name == "token_embd.weight")
        p.coordinator.left = 5 * PART
        waiting = asyncio.create_task(p.bring([tensor]))
        await until(lambda: p.coordinator.n_fetches > 1)
        p.coordinator.left = 10**12
        await waiting
        assert p.coordinator.offsets[0] == 0
        assert p.coordinator.offsets[-1] == 5 * PART
        assert p.coordinator.sent[tensor.name] == tensor.size_bytes


@pytest.mark.parametrize("way", ["flips", "endless", "ends early"])
async def test_a_neighbour_that_sends_wrong_bytes_is_named_and_not_believed(
    place: Any, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with place() as p:
        liar = await p.add(way)
        with caplog.at_level(logging.WARNING):
            await p.bring()
        # Parallel streams may have begun before it was found out; after that nobody asks it.
        assert 1 <= liar.n_fetches <= 2 + options.FETCH_STREAMS
        assert "from worker w1: " in caplog.text


@pytest.mark.parametrize("way", ["stalls", "drips", "has lost it", "refuses", "busy"])
async def test_a_neighbour_that_does_not_deliver_is_replaced(place: Any, way: str) -> None:
    async with place() as p:
        await p.add(way)
        await p.bring()
        assert sum(p.coordinator.sent.values()) > 0


async def test_a_neighbour_that_can_not_be_asked_is_left_alone(place: Any) -> None:
    async with place() as p:
        odd = await p.add("finds nothing")
        gone = worker_pb2.LinkTarget(worker="w9", address="127.0.0.1:1")
        p.request.neighbours.append(gone)
        await p.bring()
        assert odd.n_fetches == 0


@pytest.mark.parametrize("way", ["flips", "endless", "ends early"])
async def test_a_coordinator_that_sends_wrong_bytes_three_times_is_refused_by_name(
    place: Any, way: str
) -> None:
    async with place(way) as p:
        (tensor,) = (t for t in p.tensors if t.name == "token_embd.weight")
        with pytest.raises(
            DamagedTensor, match=r"token_embd\.weight came wrong 3 times"
        ) as refused:
            await p.bring([tensor])
        assert "the coordinator" in refused.value.message
        assert p.coordinator.n_fetches == 3
        assert not p.store.has(p.coordinator.sum_of(tensor), tensor.size_bytes)


async def test_the_bytes_of_a_liar_are_not_laid_on_whoever_goes_on(
    place: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of a tensor is wrong and from an earlier start: who sends the rest is not to blame."""
    async with place() as p:
        (tensor,) = (t for t in p.tensors if t.name == "token_embd.weight")
        sha256 = p.coordinator.sum_of(tensor)
        with p.store.writer(sha256, tensor.size_bytes) as writer:
            writer.write(b"\1" * 3000)
        moving = await p.bring([tensor])
        assert p.coordinator.offsets == [3000, 0]
        assert moving.fetched_bytes == 2 * tensor.size_bytes - 3000
        assert "from an earlier start, the coordinator: " in caplog.text


async def test_a_silent_coordinator_is_waited_for_and_then_what_is_missing_is_said(
    place: Any,
) -> None:
    async with place("silent") as p:
        (tensor,) = (t for t in p.tensors if t.name == "token_embd.weight")
        with pytest.raises(ModelError, match="GB of weights are missing, and nothing has") as e:
            await p.bring([tensor])
        assert p.request.weights_address in e.value.message
        assert "what has come is kept" in e.value.remedy
        assert p.store.partial_bytes(p.coordinator.sum_of(tensor)) >= PART


async def test_a_coordinator_that_is_gone_is_waited_for_and_goes_on(place: Any) -> None:
    async with place() as p:
        (tensor,) = (t for t in p.tensors if t.name == "token_embd.weight")
        port = int(p.request.weights_address.rpartition(":")[2])
        p.coordinator.left = 3 * PART
        waiting = asyncio.create_task(p.bring([tensor]))
        await until(lambda: p.coordinator.n_fetches > 1)
        await p.coordinator_server.stop(None)
        await asyncio.sleep(0.3)
        p.coordinator.left = 10**12
        server = grpc.aio.server()
        weights_pb2_grpc.add_WeightsServicer_to_server(p.coordinator, server)
        assert server.add_insecure_port(f"127.0.0.1:{port}") == port
        await server.start()
        p.stack.push_async_callback(server.stop, None)
        await waiting
        assert p.coordinator.sent[tensor.name] == tensor.size_bytes


async def test_what_the_coordinator_refuses_is_refused_with_its_words(place: Any) -> None:
    async with place("refuses") as p:
        with pytest.raises(ModelError, match="the coordinator: the file was changed"):
            await p.bring()


async def test_a_fetch_that_is_given_up_stops_at_once_and_keeps_what_came(place: Any) -> None:
    async with place("stalls") as p:
        (tensor,) = (t for t in p.tensors if t.name == "token_embd.weight")
        waiting = asyncio.create_task(p.bring([tensor]))
        sha256 = p.coordinator.sum_of(tensor)
        await until(lambda: p.store.partial_bytes(sha256) >= PART)
        waiting.cancel()
        started = asyncio.get_running_loop().time()
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled()
        assert asyncio.get_running_loop().time() - started < 0.3
        p.coordinator.way = "honest"
        moving = await p.bring([tensor])  # nobody holds its lock any more
        assert moving.fetched_bytes == tensor.size_bytes - PART


async def test_a_store_without_room_is_said_before_anything_is_sent(place: Any) -> None:
    async with place() as p:
        p.store = TensorStore(p.store.root, space_bytes=1000)
        with pytest.raises(Full, match="delivered tensors may take 1,000 bytes") as refused:
            await p.bring()
        assert "--tensor-space" in refused.value.remedy
        assert p.coordinator.n_fetches == 0


async def test_a_store_makes_room_of_what_is_not_wanted(place: Any) -> None:
    async with place() as p:
        size = sum(len(p.coordinator.bytes_of(t)) for t in p.coordinator.sums.values())
        old = b"old" * 3000
        with p.store.writer(hashlib.sha256(old).digest(), len(old)) as writer:
            writer.write(old)
            writer.finish()
        p.store = TensorStore(p.store.root, space_bytes=size + 10)
        await p.bring()
        assert not p.store.path_of(hashlib.sha256(old).digest()).exists()
        assert (await p.bring()).fetched_bytes == 0


async def test_the_header_of_a_model_is_not_removed_for_its_tensors(place: Any) -> None:
    """It is older than other models' tensors, and read again when all of this one's are here."""
    async with place() as p:
        size = sum(len(p.coordinator.bytes_of(t)) for t in p.coordinator.sums.values())
        header = p.coordinator.data[: p.file.data_offset_bytes]
        path = p.store.put_header(p.file.header_sha256, header)
        os.utime(path, (1, 1))
        old = b"old" * 3000
        with p.store.writer(hashlib.sha256(old).digest(), len(old)) as writer:
            writer.write(old)
            writer.finish()
        p.store = TensorStore(p.store.root, space_bytes=size + len(header) + 10)
        await p.bring()
        assert path.read_bytes() == header
        (claim,) = (p.store.root / "claims").iterdir()
        assert p.file.header_sha256 in claim.read_text().split()


async def test_a_disk_that_fills_up_meanwhile_is_said_and_leaves_no_whole_name(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, n_written = os.pwrite, 0

    def full(descriptor: int, data: Any, at: int) -> int:
        nonlocal n_written
        n_written += len(data)
        if n_written > 20 * PART:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, at)

    async with place() as p:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(ModelError, match="No space left on device"):
                await p.bring()
        assert (await p.bring()).fetched_bytes > 0  # goes on


async def test_a_fetch_that_ends_while_it_opens_a_file_leaves_no_lock(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, opened = TensorStore.writer, threading.Event()

    def slow(*arguments: Any) -> Any:
        writer = real(*arguments)
        opened.set()
        time.sleep(0.5)  # a part of hundreds of megabytes is hashed
        return writer

    async with place() as p:
        with monkeypatch.context() as patch:
            patch.setattr(TensorStore, "writer", slow)
            ended = asyncio.create_task(p.bring())
            await until(opened.is_set)
            ended.cancel()
            started = asyncio.get_running_loop().time()
            await asyncio.sleep(0.05)
            assert asyncio.get_running_loop().time() - started < 0.3  # the loop goes on
            await asyncio.gather(ended, return_exceptions=True)
        await p.bring()


async def test_two_workers_with_one_store_fetch_each_tensor_once(place: Any) -> None:
    async with place() as p:
        first, second = await asyncio.gather(p.bring(), p.bring())
        size = sum(len(p.coordinator.bytes_of(t)) for t in p.coordinator.sums.values())
        assert first.fetched_bytes + second.fetched_bytes == size


async def test_a_header_is_compared_with_what_was_announced(place: Any) -> None:
    async with place() as p:
        header = p.coordinator.data[: p.file.data_offset_bytes]
        wrong = [header[:-1] + b"\1", header]

        async def fetch(request: Any, context: Any) -> AsyncIterator[Any]:
            data = wrong.pop(0)
            for at in range(0, len(data), PART):
                yield weights_pb2.FetchPart(data=data[at : at + PART])

        p.coordinator.Fetch = fetch
        p.coordinator_server, address = await p.serve(p.coordinator)
        p.request.weights_address = address
        async with open_sources(p.request, "w0") as sources:
            moving = Fetching(p.store, sources, p.stack)
            assert await moving.header(p.file.size_bytes) == header
            wrong += [header + b"more", header[:-1], b""]
            with pytest.raises(DamagedTensor, match="are not the header with sha256"):
                await moving.header(p.file.size_bytes)


async def test_all_that_a_load_uses_is_claimed_with_one_file(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 130 GB has a thousand slices, and a process often only as many files."""
    monkeypatch.setattr(fetching, "SLICE_BYTES", 1)
    async with place() as p:
        async with open_sources(p.request, "w0") as sources:
            moving = Fetching(p.store, sources, p.stack)
            await moving.bring(p.tensors[:2])
            await moving.bring(p.tensors[2:])
            (claim,) = (p.store.root / "claims").iterdir()
        assert {bytes.fromhex(s) for s in claim.read_text().split()} > set(p.coordinator.sums)
        await p.stack.aclose()
        assert not list((p.store.root / "claims").iterdir())


async def test_two_damaged_neighbours_do_not_fail_a_load_that_the_coordinator_can_do(
    place: Any,
) -> None:
    async with place() as p:
        (tensor,) = (t for t in p.tensors if t.name == "token_embd.weight")
        for _ in range(2):
            liar = await p.add("ends early")
            liar.data = bytes(b ^ 1 for b in liar.data)
        await p.bring([tensor])


async def test_a_coordinator_that_serves_others_first_is_waited_for(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With twenty workers on one slow line some get no stream for a minute or more."""
    async with place("busy") as p:
        monkeypatch.setattr(options, "FETCH_AWAY_SECONDS", 0.3)
        p.coordinator.n_fetches = -10  # it refuses thirteen times, for more than a second
        await p.bring(p.tensors[:1])
