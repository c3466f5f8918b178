"""Loading a span: refused with one line, replaced, kept, given up; memory goes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from potluck import engine, gguf
from potluck.model import KvType, config_of, kv_bytes_per_token
from potluck.plan import Span
from potluck.rpc.v1 import types_pb2, worker_pb2
from potluck.testing import TinyShape, write_tiny
from worker.probe import Memory, MemoryNow

Command = types_pb2.KvCommand
OPEN = Command(open=Command.Open(session=1, max_tokens=64))
ROWS = types_pb2.Rows(session=1, token_ids=[1, 2, 3], want_logits=1)
INVALID, FAILED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION


async def refusal(r: Any, i: int, request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await r.load_one(i, request)
    return refused.value.code(), refused.value.details() or ""


async def test_progress_rises_to_the_whole_and_ends_with_what_is_loaded(
    rig: Callable[[int], Any],
) -> None:
    async with rig(1) as r:
        news = await r.load_one(0, r.load_request(0, (0, 4), 1))
        done = [x.done_bytes for x in news]
        assert done == sorted(done)
        assert done[-1] == news[-1].total_bytes
        assert news[0].matrix == "token_embd.weight"
        ready = news[-1].ready
        assert (ready.epoch, ready.span.stop, ready.embeds, ready.has_head) == (1, 4, True, True)
        assert 0 < ready.kv_bytes <= 2**20
        assert ready.shard_bytes > 0
        assert [x.HasField("ready") for x in news[:-1]] == [False] * (len(news) - 1)


async def test_bytes_for_keys_and_values_leave_room_for_more_positions(
    rig: Callable[[int], Any],
) -> None:
    async with rig(1) as r:
        news = await r.load_one(0, r.load_request(0, (0, 4), 1, kv_type=worker_pb2.KV_TYPE_Q8))
        page_bytes = 16 * kv_bytes_per_token(config_of(gguf.read(r.model)), Span(0, 4), KvType.Q8)
        assert news[-1].ready.kv_bytes == 2**20 // page_bytes * page_bytes
        # The same layers in f16 are another shard: kept from the last plan they would be wrong.
        news = await r.load_one(0, r.load_request(0, (0, 4), 2))
        page_bytes = 16 * kv_bytes_per_token(config_of(gguf.read(r.model)), Span(0, 4))
        assert news[-1].ready.kv_bytes == 2**20 // page_bytes * page_bytes


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"span": types_pb2.Span(start=70, stop=90)}, INVALID, "the model has 4 layers"),
        ({"span": types_pb2.Span(start=2, stop=2)}, INVALID, "[2, 2) holds no layer"),
        ({"span": types_pb2.Span(start=3, stop=1)}, INVALID, "holds no layer"),
        ({"embeds": False}, INVALID, "only the first embeds"),
        ({"has_head": False}, INVALID, "only the last has the head"),
        ({"epoch": 0}, INVALID, "epoch"),
        ({"kv_type": 0}, INVALID, "kv_type"),
        ({"kv_type": 3}, INVALID, "kv_type 3: f16 or q8"),
        ({"wire": 0}, INVALID, "wire 0"),
        ({"wire": 77}, INVALID, "wire 77"),
        ({"next": worker_pb2.NextStage()}, INVALID, "next.address"),
        ({"hello": types_pb2.Hello()}, INVALID, "protocol 0"),
        ({"hello": types_pb2.Hello(protocol=9)}, INVALID, "protocol 9"),
        ({"context_tokens": 0}, INVALID, "context_tokens: 1 to 256, not 0"),
        ({"context_tokens": 257}, INVALID, "context_tokens: 1 to 256, not 257"),
        ({"kv_bytes": 100}, INVALID, "kv_bytes: at least"),
    ],
)
async def test_an_order_that_no_plan_has_is_refused(
    rig: Callable[[int], Any], change: dict[str, Any], code: grpc.StatusCode, text: str
) -> None:
    async with rig(1) as r:
        request = r.load_request(0, (0, 4), 1, **change)
        got, details = await refusal(r, 0, request)
        assert (got, text in details) == (code, True), details
        assert len(details.splitlines()) <= 2
        await r.load()
        await r.run(OPEN)


async def test_another_file_is_not_the_model(rig: Callable[[int], Any], tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.gguf", TinyShape(n_layers=4, context_tokens=128))
    async with rig(1) as r:
        request = r.load_request(0, (0, 4), 1)
        request.model.path = str(other)
        code, details = await refusal(r, 0, request)
        assert code is FAILED
        assert "is not the coordinator's model: header sha256" in details


async def test_a_missing_file_is_named_with_what_to_do(
    rig: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path))
    async with rig(1) as r:
        request = r.load_request(0, (0, 4), 1)
        request.model.path = "/no/such/file.gguf"
        code, details = await refusal(r, 0, request)
        assert code is FAILED
        assert "tiny is not on this worker's machine: neither /no/such/file.gguf" in details
        assert "potluck pull tiny" in details


async def test_the_model_is_found_in_the_cache_by_name(
    rig: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path))
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "m.gguf").symlink_to(tiny_model)
    async with rig(1) as r:
        request = r.load_request(0, (0, 4), 1)
        request.model.path = "/no/such/file.gguf"
        assert (await r.load_one(0, request))[-1].ready.epoch == 1


async def test_too_little_memory_is_said_in_numbers(
    rig: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Memory, "now", lambda *_: MemoryNow(2**30, 2**18, 2**18, 2**20))
    async with rig(1) as r:
        code, details = await refusal(r, 0, r.load_request(0, (0, 4), 1))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "layers [0, 4) need 0.001 GiB (weights 0.000, KV 0.001), 0.000 GiB are free" in (
            details
        )
        assert "--memory" in details


async def test_the_same_load_twice_changes_nothing(rig: Callable[[int], Any]) -> None:
    async with rig(1) as r:
        await r.load()
        await r.run(OPEN, ROWS)
        shard = r.workers[0]._stage.shard
        news = await r.load_one(0, r.load_request(0, (0, 4), 1))
        assert len(news) == 1
        assert (news[0].ready.sessions, r.workers[0]._stage.shard) == (1, shard)
        result = await r.run(types_pb2.Rows(session=1, start_position=3, token_ids=[4]))
        assert not result.failures


async def test_the_same_shard_is_kept_for_a_new_epoch_without_its_sessions(
    rig: Callable[[int], Any],
) -> None:
    async with rig(1) as r:
        await r.load()
        before = await r.run(OPEN, ROWS)
        shard = r.workers[0]._stage.shard
        await r.load()
        assert r.workers[0]._stage.shard is shard
        assert r.workers[0].loaded().sessions == 0
        after = await r.run(OPEN, ROWS)
        assert after.rows == before.rows


async def test_another_span_replaces_the_shard(rig: Callable[[int], Any]) -> None:
    async with rig(2) as r:
        await r.load()
        whole = await r.run(OPEN, ROWS)
        held = r.workers[0].loaded().shard_bytes
        await r.load((1,))
        assert r.workers[0].loaded().shard_bytes < held
        assert (await r.run(OPEN, ROWS)).rows == whole.rows


async def test_old_epochs_are_refused_until_the_worker_registers_anew(
    rig: Callable[[int], Any],
) -> None:
    async with rig(1) as r:
        r.epoch = 4
        await r.load()
        code, details = await refusal(r, 0, r.load_request(0, (0, 4), 3))
        assert (code, "epoch 3 is over; 5 is loaded" in details) == (FAILED, True)
        code, details = await refusal(r, 0, r.load_request(0, (0, 4), 5, context_tokens=64))
        assert (code, "another shard" in details) == (FAILED, True)
        await r.workers[0].forget(epochs=True)
        r.epoch = 0
        await r.load()
        await r.run(OPEN, ROWS)


async def test_a_refused_load_keeps_what_is_loaded(rig: Callable[[int], Any]) -> None:
    async with rig(1) as r:
        await r.load()
        await r.run(OPEN, ROWS)
        await refusal(r, 0, r.load_request(0, (0, 4), 2, context_tokens=999))
        result = await r.run(types_pb2.Rows(session=1, start_position=3, token_ids=[4]))
        assert not result.failures


async def test_a_load_that_nobody_waits_for_is_given_up(
    rig: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    started, gone = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    n_read = 0
    real = engine.load

    def slow(shard: Any, file: Any, tensors: Any, on_progress: Any) -> None:
        def wait(done: int) -> None:
            nonlocal n_read
            n_read += 1
            on_progress(done)
            if n_read == 2:
                loop.call_soon_threadsafe(started.set)
                asyncio.run_coroutine_threadsafe(gone.wait(), loop).result(10)

        real(shard, file, tensors, wait)

    async with rig(1) as r:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "load", slow)
            call = r.stub(0).Load(r.load_request(0, (0, 4), 1))
            await asyncio.wait_for(started.wait(), 10)
            call.cancel()
            while r.workers[0].is_loading and not gone.is_set():
                await asyncio.sleep(0.02)
                gone.set()
            async with asyncio.timeout(10):
                while r.workers[0].is_loading:  # noqa: ASYNC110  no event says so
                    await asyncio.sleep(0.005)
        assert n_read < 10
        assert r.workers[0].loaded() is None
        await r.load()
        await r.run(OPEN, ROWS)


async def test_a_load_that_goes_on_inside_one_matrix_says_so(
    rig: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potluck.rpc.options.LOAD_NEWS_SECONDS", 0.01)
    heard = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(shard: Any, file: Any, tensors: Any, _on_progress: Any) -> None:
        for t in tensors:
            place = (str(file.path), t.offset_bytes)
            shard.put_file(t.name, t.type_name, t.rows, t.cols, *place)
            asyncio.run_coroutine_threadsafe(heard.wait(), loop).result(10)
        shard.seal()

    async with rig(1) as r:
        monkeypatch.setattr(engine, "load", slow)
        call = r.stub(0).Load(r.load_request(0, (0, 4), 1))
        async with asyncio.timeout(10):
            news = await call.read()
            assert (news.done_bytes, news.total_bytes > 0) == (0, True)
            heard.set()
            while not news.HasField("ready"):
                news = await call.read()


async def test_describe_tells_what_is_here(rig: Callable[[int], Any]) -> None:
    async with rig(1) as r:
        request = worker_pb2.DescribeRequest(hello=types_pb2.Hello(protocol=1))
        reply = await r.stub(0).Describe(request)
        assert (reply.worker, reply.HasField("loaded")) == ("w0", False)
        assert reply.resources.memory_free_bytes > 0
        await r.load()
        await r.run(OPEN, ROWS)
        reply = await r.stub(0).Describe(request)
        assert (reply.loaded.sessions, reply.loaded.kv_used_bytes > 0) == (1, True)
        assert reply.progress > 0
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await r.stub(0).Describe(worker_pb2.DescribeRequest())
        assert refused.value.code() is INVALID


async def test_a_worker_alone_frees_sessions_and_keeps_its_shard(rig: Callable[[int], Any]) -> None:
    async with rig(1) as r:
        await r.load()
        await r.run(OPEN, ROWS)
        await r.workers[0].forget(epochs=False)
        loaded = r.workers[0].loaded()
        assert (loaded.sessions, loaded.kv_used_bytes, loaded.epoch) == (0, 0, 1)


async def test_sessions_of_an_epoch_that_is_over_are_freed_without_a_new_load(
    rig: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.server.UNUSED_SECONDS", 0.2)
    async with rig(1) as r:
        await r.load()
        await r.run(OPEN, ROWS)
        (worker,) = r.workers
        async with asyncio.timeout(10):
            while worker.loaded().sessions:
                worker.fence(2)  # as each heartbeat does
                await asyncio.sleep(0.01)
        assert worker.loaded().kv_used_bytes == 0
        await r.load()
        await r.run(OPEN, ROWS)  # the engine has freed it too: its id is free


async def test_sessions_live_on_in_an_epoch_that_has_steps(
    rig: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.server.UNUSED_SECONDS", 0.0)
    async with rig(1) as r:
        await r.load()
        await r.run(OPEN, ROWS)
        (worker,) = r.workers
        r.epoch, r.step = 2, 0  # a flush: the same plan under a new number
        await r.run()
        for epoch in (1, 2, 2, 2):
            worker.fence(epoch)
            await asyncio.sleep(0.01)
        assert worker.loaded().sessions == 1


async def test_a_load_that_the_system_fails_says_why(
    rig: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "/models/tiny.gguf")

    async with rig(1) as r:
        monkeypatch.setattr("worker.delivery.find", fail)
        code, words = await refusal(r, 0, r.load_request(0, (0, 4), 1))
        assert (code, "Permission denied: '/models/tiny.gguf'" in words) == (FAILED, True)
        monkeypatch.undo()
        await r.load()
