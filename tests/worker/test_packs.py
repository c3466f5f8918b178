"""A worker with mapped weights: the same answers, damage repaired under a step, memory told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from potluck.errors import DamagedPack
from potluck.packs import PackFolder
from potluck.rpc.v1 import types_pb2
from worker.probe import Memory, MemoryNow

Command = types_pb2.KvCommand
OPEN = Command(open=Command.Open(session=1, max_tokens=64))
SAMPLING = types_pb2.Sampling(logprobs=5)
ROWS = types_pb2.Rows(session=1, token_ids=[1, 2, 3], want_logits=1, sampling=SAMPLING)


def map_weights(r: Any, folder: Path, memory: Memory | None = None) -> None:
    for worker in r.workers:
        worker._packs = PackFolder(folder)
        worker.memory = memory or Memory(maps_weights=True)


def packs_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.pack"))


async def test_mapped_weights_answer_as_weights_in_memory_do(
    rig: Callable[[int], Any], tmp_path: Path
) -> None:
    async with rig(2) as r:
        await r.load((2,))
        expected = (await r.run(OPEN, ROWS)).rows
        map_weights(r, tmp_path)
        for _ in range(2):
            await r.load((1,))
            assert (await r.run(OPEN, ROWS)).rows == expected
        assert len(packs_of(tmp_path)) == 6


async def test_damage_is_repaired_and_the_answer_is_the_same(
    rig: Callable[[int], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(1) as r:
        map_weights(r, tmp_path)
        await r.load()
        expected = (await r.run(OPEN, ROWS)).rows
    for path in packs_of(tmp_path):
        data = bytearray(path.read_bytes())
        data[64 * 1024 + 7] ^= 1
        path.unlink()
        path.write_bytes(data)
    async with rig(1) as r:
        map_weights(r, tmp_path)
        await r.load()
        assert (await r.run(OPEN, ROWS)).rows == expected
        assert caplog.text.count("was damaged and is made again") == 6


async def test_damage_that_can_not_be_repaired_fails_the_step_and_not_the_worker(
    rig: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(1) as r:
        map_weights(r, tmp_path)
        await r.load()
        path = next(p for p in packs_of(tmp_path) if "layer-2" in p.name)
        data = bytearray(path.read_bytes())
        data[64 * 1024 + 7] ^= 1
        with path.open("r+b") as file:
            file.write(data)
        monkeypatch.setattr(PackFolder, "make_room", lambda *_: "the disk is full")
        result = await r.run(OPEN, ROWS)
        assert not result.rows
        assert "is damaged and can't be made again: the disk is full" in result.failures[0].message
        monkeypatch.undo()
        assert (await r.run(ROWS)).rows


async def test_rows_that_went_stale_during_a_repair_are_not_run(
    rig: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(1) as r:
        map_weights(r, tmp_path)
        await r.load()
        stage = r.workers[0]._stage
        await r.run(OPEN)

        def damaged(*_: Any) -> None:
            raise DamagedPack("a pack")

        def repair() -> None:
            stage.flush(2, ())
            monkeypatch.undo()

        monkeypatch.setattr(stage.shard, "_forward", damaged)
        monkeypatch.setattr(stage.shard._mapped, "repair", repair)
        result = await r.run(ROWS)
        assert (len(result.rows), len(result.failures)) == (0, 0)
        assert stage.shard._loaded.length(1) == 0


async def test_a_shard_may_be_larger_than_memory_but_kv_and_two_layers_must_fit(
    rig: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.shard.SCRATCH_BYTES", 2000)
    async with rig(1) as r:
        map_weights(r, tmp_path)
        weights = 0
        for progress in await r.load_one(0, r.load_request(0, (0, 4), 1)):
            weights = progress.total_bytes
        free = weights + 2**20
        monkeypatch.setattr(Memory, "now", lambda *_: MemoryNow(free, free, 2**20 + 72_000, 5))
        await r.load_one(0, r.load_request(0, (0, 4), 2, context_tokens=64))
        assert r.workers[0]._stage.shard._loaded.n_streamed > 0
        monkeypatch.setattr(Memory, "now", lambda *_: MemoryNow(free, free, 2**20 + 3000, 5))
        said = r"too little for KV .*, buffers \(0\.000 GiB\) and two layers"
        with pytest.raises(grpc.aio.AioRpcError, match=said):
            await r.load_one(0, r.load_request(0, (0, 4), 3))


async def test_only_a_worker_that_maps_tells_what_memory_has_room_for(
    rig: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(1) as r:
        monkeypatch.setattr(Memory, "now", lambda *_: MemoryNow(9000, 7000, 5000, 5))
        assert not (await r.workers[0].resources()).HasField("room_bytes")
        map_weights(r, tmp_path)
        told = await r.workers[0].resources()
        assert (told.memory_free_bytes, told.room_bytes) == (7000, 5000)


async def test_weights_that_are_in_memory_are_not_counted_as_mapped(
    rig: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(1) as r:
        map_weights(r, tmp_path)
        (worker,) = r.workers
        await r.load()
        assert worker._stage.shard.mapped_bytes == worker.loaded().shard_bytes
        monkeypatch.setattr(PackFolder, "make_room", lambda *_: "the disk is full")
        for path in packs_of(tmp_path):
            if "layer" in path.name:
                path.unlink()
        await r.load_one(0, r.load_request(0, (0, 4), 2, context_tokens=64))
        held, mapped = worker.loaded().shard_bytes, worker._stage.shard.mapped_bytes
        assert 0 < mapped < held

        def now(_self: Memory, mapped_bytes: int) -> MemoryNow:
            assert mapped_bytes == mapped
            return MemoryNow(9000, 7000, 5000, 5)

        monkeypatch.setattr(Memory, "now", now)
        told = await worker.resources()
        assert told.memory_free_bytes == 7000 + held
        assert told.room_bytes == 5000 + held - mapped
        assert (await worker.heartbeat(1)).memory_free_bytes == 7000


async def test_a_given_up_load_leaves_a_worker_that_loads_again(
    rig: Callable[[int], Any], tmp_path: Path
) -> None:
    async with rig(1) as r:
        map_weights(r, tmp_path)
        call = r.stub(0).Load(r.load_request(0, (0, 4), 1))
        await call.read()
        call.cancel()
        await asyncio.sleep(0)
        await r.load()
        assert (await r.run(OPEN, ROWS)).rows
