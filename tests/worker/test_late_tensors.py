"""Packs that are made of delivered tensors: what is fetched for them, and when, and if nobody is
there.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from potluck import gguf, packs
from potluck.packs import PackFolder
from potluck.rpc import options
from potluck.rpc.v1 import types_pb2, weights_pb2, weights_pb2_grpc
from potluck.tensor_store import TensorStore
from tests.worker.test_fetching import Sender, until
from worker import late_tensors
from worker.probe import Memory

Command = types_pb2.KvCommand
OPEN = Command(open=Command.Open(session=1, max_tokens=64))
ROWS = types_pb2.Rows(
    session=1, token_ids=[1, 2, 3], want_logits=1, sampling=types_pb2.Sampling(logprobs=5)
)


class Coordinator(Sender):
    """Sends headers too, and tensors only as long as `gate` is set."""

    def __init__(self, model: Path) -> None:
        super().__init__(gguf.read(model))
        self.gate = asyncio.Event()
        self.gate.set()
        self.n_waiting = 0

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if request.header_sha256:
            yield weights_pb2.FetchPart(data=self.data[: self.file.data_offset_bytes])
            return
        self.n_waiting += 1
        await self.gate.wait()
        self.n_waiting -= 1
        async for part in super().Fetch(request, context):
            yield part

    @property
    def sent_layers(self) -> set[str]:
        """Of which tensors have been sent, as `blk.2`; then forgotten."""
        names = {".".join(name.split(".")[:2]) for name in self.sent}
        self.sent.clear()
        return names


@dataclass
class Away:
    """One worker that maps weights and has no file."""

    rig: Any
    coordinator: Coordinator
    server: Any
    address: str
    folder: PackFolder
    store: TensorStore
    epoch: int = 0

    def request(self, span: tuple[int, int] = (0, 4), **more: Any) -> Any:
        self.epoch += 1
        self.rig.epoch, self.rig.step = self.epoch, 0
        file = self.coordinator.file
        model = types_pb2.ModelReference(
            name="tiny",
            path="/nowhere/m.gguf",
            header_sha256=file.header_sha256,
            size_bytes=file.size_bytes,
        )
        fields = {"model": model, "weights_address": self.address, **more}
        return self.rig.load_request(0, span, self.epoch, **fields)

    async def load(self, **more: Any) -> Any:
        """The last message."""
        said = await self.rig.load_one(0, self.request(**more))
        await self.rig.dial()
        return said[-1]

    def damage(self, part: str) -> None:
        path = self.folder.path_of(self.coordinator.file, part)
        data = bytearray(path.read_bytes())
        data[64 * 1024 + 7] ^= 1
        with path.open("r+b") as file:
            file.write(data)

    async def serve(self) -> None:
        """The coordinator is there, at a port of its own."""
        self.server = grpc.aio.server()
        weights_pb2_grpc.add_WeightsServicer_to_server(self.coordinator, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()


@pytest.fixture
def away(
    rig: Callable[[int], Any], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Any]:
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path / "cache"))

    @asynccontextmanager
    async def make() -> AsyncIterator[Away]:
        async with rig(1) as r:
            (worker,) = r.workers
            worker.store = TensorStore(tmp_path / "tensors")
            worker._packs = PackFolder(tmp_path / "packs", tensors=worker.store)
            worker.memory = Memory(maps_weights=True)
            made = Away(r, Coordinator(tiny_model), None, "", worker._packs, worker.store)
            await made.serve()
            try:
                yield made
            finally:
                await made.server.stop(None)

    return make


async def test_only_tensors_of_missing_packs_are_fetched(away: Callable[[], Any]) -> None:
    async with away() as a:
        first = await a.load()
        expected = (await a.rig.run(OPEN, ROWS)).rows
        size = sum(len(a.coordinator.bytes_of(t)) for t in a.coordinator.sums.values())
        assert first.fetched_bytes == first.fetch_total_bytes == size
        a.coordinator.sent.clear()
        a.store.remove()
        again = await a.load(context_tokens=64)
        assert again.fetched_bytes == again.fetch_total_bytes == 0
        assert a.coordinator.sent_layers == set()
        assert (await a.rig.run(OPEN, ROWS)).rows == expected
        a.folder.path_of(a.coordinator.file, "layer-2").unlink()
        await a.load(context_tokens=128)
        assert a.coordinator.sent_layers == {"blk.2"}
        assert (await a.rig.run(OPEN, ROWS)).rows == expected


async def test_a_damaged_pack_is_made_of_tensors_that_come_in_the_middle_of_the_step(
    away: Callable[[], Any],
) -> None:
    async with away() as a:
        await a.load()
        expected = (await a.rig.run(OPEN, ROWS)).rows
        await a.load(context_tokens=64)  # another shard: it has not looked at the packs yet
        a.coordinator.sent.clear()
        a.store.remove()
        a.damage("layer-1")
        assert (await a.rig.run(OPEN, ROWS)).rows == expected
        assert a.coordinator.sent_layers == {"blk.1"}
        path = next(p for p in a.store.root.rglob("*") if len(p.name) == 64)
        assert a.store.removable_bytes() >= path.stat().st_size  # nothing stays claimed


async def test_without_anybody_to_ask_the_step_fails_and_the_next_load_repairs(
    away: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late_tensors, "STEP_AWAY_SECONDS", 0.3)
    monkeypatch.setattr(options, "FETCH_PAUSES_SECONDS", (0.05,))
    async with away() as a:
        await a.load()
        expected = (await a.rig.run(OPEN, ROWS)).rows
        await a.load(context_tokens=64)
        a.store.remove()
        await a.server.stop(None)
        a.damage("layer-1")
        result = await a.rig.run(OPEN, ROWS)
        assert not result.rows
        said = result.failures[0].message
        assert "is damaged and can't be made again: " in said
        assert f"nothing has come for 0 s from the coordinator at {a.address}" in said
        await a.serve()
        await a.load(context_tokens=64)  # the same shard, for a coordinator at another address
        assert (await a.rig.run(OPEN, ROWS)).rows == expected


async def test_a_load_that_is_given_up_while_tensors_come_ends_at_once(
    away: Callable[[], Any],
) -> None:
    async with away() as a:
        a.coordinator.gate.clear()
        call = a.rig.stub(0).Load(a.request())
        await until(lambda: a.coordinator.n_waiting > 0)
        said = await call.read()
        while not said.fetch_total_bytes:
            said = await call.read()
        assert said.fetched_bytes < said.fetch_total_bytes
        (worker,) = a.rig.workers
        assert worker.is_fetching
        call.cancel()
        await until(lambda: not worker.is_loading)
        assert not worker.is_fetching
        a.coordinator.gate.set()
        await a.load()
        assert (await a.rig.run(OPEN, ROWS)).rows


async def test_a_new_plan_does_not_wait_for_a_step_that_waits_for_tensors(
    away: Callable[[], Any],
) -> None:
    async with away() as a:
        await a.load()
        a.store.remove()
        a.damage("layer-1")
        a.coordinator.gate.clear()
        await a.rig.send(OPEN, ROWS)
        await until(lambda: a.coordinator.n_waiting > 0)
        async with asyncio.timeout(late_tensors.STEP_AWAY_SECONDS / 2):
            await a.load(max_sessions=2)
        a.coordinator.gate.set()
        assert (await a.rig.run(OPEN, ROWS)).rows


async def test_tensors_make_way_for_the_packs_that_are_made_of_them(
    away: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")

    def used(folder: Path) -> int:
        return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

    async with away() as a:
        await a.load()
        n_bytes, raw_bytes = used(a.folder.root), a.store.total_bytes()
        shutil.rmtree(a.folder.root)
        room = packs.RESERVE_BYTES + n_bytes + raw_bytes // 2
        monkeypatch.setattr(
            shutil,
            "disk_usage",
            lambda _: usage._replace(free=room - used(a.store.root) - used(a.folder.root)),
        )
        await a.load(context_tokens=64)
        assert a.rig.workers[0]._stage.shard.mapped_bytes == n_bytes
        assert 0 < a.store.total_bytes() <= raw_bytes // 2 + 1000
