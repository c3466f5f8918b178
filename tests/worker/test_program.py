"""potluck-worker as a process: its line, its exit codes, its memory."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from potluck import gguf
from potluck.rpc import PROTOCOL, options
from potluck.rpc.v1 import types_pb2, worker_pb2, worker_pb2_grpc
from potluck.testing import TinyShape, write_tiny

pytestmark = pytest.mark.cluster

PROGRAM = Path(sys.executable).parent / "potluck-worker"
MARGIN_BYTES = 150 * 10**6


@asynccontextmanager
async def program(*arguments: str, **more: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """A running worker; killed if the test leaves it alive."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        str(PROGRAM),
        *arguments,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        env={**os.environ, "PYTHONWARNINGS": "error", **more},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ended(process: asyncio.subprocess.Process) -> tuple[int, str]:
    """Exit code and standard error."""
    async with asyncio.timeout(20):
        _, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, err.decode()


async def announced(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    async with asyncio.timeout(20):
        line = await process.stdout.readline()
    announcement: dict[str, Any] = json.loads(line)
    return announcement


def options_for(f: Any, *more: str) -> tuple[str, ...]:
    return ("--coordinator", f.address, "--port", "0", "--threads", "1", *more)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "stdin"])
async def test_a_worker_says_who_it_is_and_stops_cleanly(
    fleet: Callable[..., Any], how: str
) -> None:
    async with fleet() as f:
        async with program(*options_for(f, "--name", "w1", "--stop-with-stdin")) as process:
            said = await announced(process)
            assert said["worker"] == "w1"
            assert said["pid"] == process.pid
            assert said["address"].startswith("127.0.0.1:")
            await f.beats.get()
            started = time.monotonic()
            if how == "stdin":
                assert process.stdin is not None
                process.stdin.close()
            else:
                process.send_signal(signal.Signals[how])
            code, err = await ended(process)
            assert (code, time.monotonic() - started < 2) == (0, True)
            assert "Traceback" not in err
        assert f.left == ["w1"]


async def test_a_worker_without_coordinator_keeps_trying_and_stops_when_told() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
        async with program("--coordinator", address, "--port", "0") as process:
            assert process.stderr is not None
            async with asyncio.timeout(20):
                while b"trying until it answers" not in (line := await process.stderr.readline()):
                    assert line, "it ended"
            process.send_signal(signal.SIGTERM)
            code, err = await ended(process)
            assert (code, "Traceback" in err) == (0, False)


async def test_a_port_in_use_is_one_line(fleet: Callable[..., Any]) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        async with (
            fleet() as f,
            program("--coordinator", f.address, "--port", str(port), "--threads", "1") as process,
        ):
            assert await ended(process) == (
                1,
                f"potluck-worker: error: port {port} on 127.0.0.1 is in use\n"
                "  choose another port with --port, or 0 for any free one\n",
            )


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ((), 2, "--coordinator"),
        (("--coordinator", "127.0.0.1:1", "--host", "0.0.0.0"), 2, "loopback only"),
        (("--coordinator", "127.0.0.1:1", "--isa", "nonsense"), 1, "nonsense"),
    ],
)
async def test_a_wrong_command_line_is_said(
    arguments: tuple[str, ...], code: int, text: str
) -> None:
    async with program(*arguments) as process:
        got, err = await ended(process)
    assert (got, text in err, "Traceback" in err) == (code, True, False), err


async def test_a_refused_worker_says_why(fleet: Callable[..., Any]) -> None:
    async with fleet() as f:
        f.refuses = grpc.StatusCode.PERMISSION_DENIED
        async with program(*options_for(f)) as process:
            code, err = await ended(process)
    assert code == 1
    assert err.endswith("potluck-worker: error: not you\n  be another\n")


def memory_of(pid: int, key: str) -> int:
    """Bytes of a line of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(key)


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """280 MB of weights: held twice, they would not fit the margin."""
    shape = TinyShape(
        "f32", dim=1024, n_layers=4, n_heads=8, n_kv_heads=8, head_dim=128, ffn_dim=4096
    )
    return write_tiny(tmp_path_factory.mktemp("models") / "large.gguf", shape)


def order(model: Path, span: tuple[int, int], epoch: int, f: Any) -> worker_pb2.LoadRequest:
    return worker_pb2.LoadRequest(
        hello=types_pb2.Hello(protocol=PROTOCOL),
        epoch=epoch,
        model=types_pb2.ModelReference(
            name="large", path=str(model), header_sha256=gguf.read(model).header_sha256
        ),
        span=types_pb2.Span(start=span[0], stop=span[1]),
        embeds=span[0] == 0,
        has_head=span[1] == 4,
        context_tokens=256,
        kv_bytes=32 * 2**20,
        kv_type=worker_pb2.KV_TYPE_F16,
        wire=types_pb2.ACTIVATION_TYPE_F32,
        next=worker_pb2.NextStage(address=f.address),
    )


@pytest.mark.parametrize("weights", ["arena", "mmap"])
async def test_resident_memory_stays_below_shard_and_kv_and_a_margin(
    fleet: Callable[..., Any],
    large_model: Path,
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path))
    async with fleet() as f, program(*options_for(f, "--weights", weights)) as process:
        address = (await announced(process))["address"]
        async with grpc.aio.insecure_channel(address, options=options.client_options()) as channel:
            stub: Any = worker_pb2_grpc.WorkerStub(channel)

            async def load(span: tuple[int, int], epoch: int) -> worker_pb2.LoadedShard:
                news = [x async for x in stub.Load(order(large_model, span, epoch, f))]
                return news[-1].ready  # type: ignore[no-any-return]  # of a stub without types

            whole = await load((0, 4), 1)
            assert whole.shard_bytes > 250 * 2**20
            most = whole.shard_bytes + whole.kv_bytes + MARGIN_BYTES
            await prefill(stub, f)
            assert memory_of(process.pid, "VmHWM") < most
            # The first shard is freed before the next one is read.
            part = await load((2, 4), 2)
            assert memory_of(process.pid, "VmHWM") < most
            assert memory_of(process.pid, "VmRSS") < part.shard_bytes + MARGIN_BYTES
            again = await load((0, 4), 3)
            assert again.shard_bytes == whole.shard_bytes
            assert memory_of(process.pid, "VmHWM") < most


async def test_a_worker_answers_while_its_engine_computes(
    fleet: Callable[..., Any], large_model: Path
) -> None:
    """Fails if the engine runs on the event loop, or holds the GIL."""
    async with fleet() as f, program(*options_for(f)) as process:
        address = (await announced(process))["address"]
        async with grpc.aio.insecure_channel(address, options=options.client_options()) as channel:
            stub: Any = worker_pb2_grpc.WorkerStub(channel)
            async for _ in stub.Load(order(large_model, (0, 4), 1, f)):
                pass
            running = asyncio.create_task(prefill(stub, f))
            seen: list[int] = []
            hello = types_pb2.Hello(protocol=PROTOCOL)
            while not running.done():
                reply = await stub.Describe(worker_pb2.DescribeRequest(hello=hello))
                seen.append(reply.progress)
            await running
    assert len(set(seen)) > 3  # the counter moved while we looked
    assert seen == sorted(seen)


async def test_cancel_stops_a_step_between_two_layers(
    fleet: Callable[..., Any], large_model: Path
) -> None:
    async with fleet() as f, program(*options_for(f)) as process:
        address = (await announced(process))["address"]
        async with grpc.aio.insecure_channel(address, options=options.client_options()) as channel:
            stub: Any = worker_pb2_grpc.WorkerStub(channel)
            async for _ in stub.Load(order(large_model, (0, 4), 1, f)):
                pass
            call = stub.Run()
            await call.write(prompt())
            assert not (await call.read()).HasField("failure")
            await stub.Cancel(worker_pb2.CancelRequest(epoch=2, sessions=[1]))
            async with asyncio.timeout(30):
                result = await f.results.get()
            assert (result.step, len(result.rows), len(result.failures)) == (1, 0, 0)
            call.cancel()


def prompt() -> worker_pb2.Step:
    """255 tokens in one step: some hundred milliseconds for the large model."""
    opened = types_pb2.KvCommand.Open(session=1, max_tokens=256)
    rows = types_pb2.Rows(session=1, token_ids=[i % 400 for i in range(255)], want_logits=1)
    return worker_pb2.Step(
        epoch=1, step=1, commands=[types_pb2.KvCommand(open=opened)], rows=[rows]
    )


async def prefill(stub: Any, f: Any) -> None:
    """A prompt, and its pick."""
    call = stub.Run()
    await call.write(prompt())
    async with asyncio.timeout(30):
        result = await f.results.get()
    assert len(result.rows[0].picks) == 1
    call.cancel()
