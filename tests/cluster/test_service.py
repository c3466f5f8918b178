"""What a running cluster promises: where activations go, bounded memory, freed sessions."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from potluck.client import Client
from potluck.errors import PotluckError, Unreachable
from potluck.replies import AnswerOptions, Piece, ServiceReport
from potluck.testing import write_tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

GREEDY = AnswerOptions(max_tokens=64, temperature=0.0, ignore_end=True)
DIM_BYTES = 576 * 4  # one activation row of SmolLM2 in f32
ROOM_BYTES = 200 * 1024 * 1024  # interpreter, numpy, gRPC, scratch


def sockets_of(pid: int) -> int:
    """Bytes sent and received on all live TCP connections of a process, as the kernel counts."""
    listing = subprocess.run(
        ["ss", "-tinpH", "state", "established"], capture_output=True, text=True, check=True
    ).stdout
    total = 0
    for owner, figures in re.findall(r"^(\S.*)\n\s+(.*)$", listing, re.MULTILINE):
        if f"pid={pid}," in owner:
            counts = re.findall(r"bytes_(?:acked|received):(\d+)", figures)
            total += sum(int(n) for n in counts)
    return total


@pytest.mark.skipif(shutil.which("ss") is None, reason="needs ss (Debian: apt install iproute2)")
def test_activations_never_pass_through_the_coordinator(start_cluster: Any, smollm2: Path) -> None:
    cluster = start_cluster(smollm2, workers=3)
    prompt = "Tell me about rivers. " * 40
    before = cluster.status()
    counted_before = sockets_of(cluster.coordinator.pid)
    answer = cluster.answer(prompt, GREEDY)
    counted = sockets_of(cluster.coordinator.pid) - counted_before
    after = cluster.wait_until(lambda report: report.sessions == 0, "end of the session")

    tokens = answer.done.prompt_tokens + answer.done.answer_tokens
    assert answer.done.prompt_tokens > 100
    # All it said to workers, client and fleet, both ways, is below one activation row a token.
    assert counted < tokens * DIM_BYTES
    assert after.figures.coordinator_activation_bytes == 0
    sent = after.figures.coordinator_sent_bytes - before.figures.coordinator_sent_bytes
    received = after.figures.coordinator_received_bytes - before.figures.coordinator_received_bytes
    assert 0 < sent + received < tokens * DIM_BYTES / 2

    # And they did travel: every token's row but the last went over both links of workers.
    between = cluster.wait_until(
        lambda report: all(
            link.activation_bytes >= (tokens - 1) * DIM_BYTES
            for link in report.links
            if link.start != "coordinator" and link.end != "coordinator"
        ),
        "activation bytes on the links",
    )
    workers_links = [link for link in between.links if "coordinator" not in (link.start, link.end)]
    assert len(workers_links) == 2


def peak_resident_bytes(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_activations_travel_in_fewer_bytes_when_asked(start_cluster: Any, tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "tiny.gguf")  # rows of 64 values
    for name in ("f32", "f16", "q8"):
        cluster = start_cluster(model, workers=2, options=("--wire", name))
        answer = cluster.answer("the potluck", GREEDY)
        assert cluster.status().wire == name
        n_rows = answer.done.prompt_tokens + answer.done.answer_tokens - 1
        wanted = {"f32": 4 * 64, "f16": 2 * 64, "q8": 2 * 34}[name] * n_rows
        cluster.wait_until(lambda report, n=wanted: activation_bytes(report) >= n, "all rows")
        assert activation_bytes(cluster.status()) == wanted
        cluster.stop()


def activation_bytes(report: ServiceReport) -> int:
    """Sent between workers."""
    return sum(
        link.activation_bytes
        for link in report.links
        if "coordinator" not in (link.start, link.end)
    )


def test_a_workers_memory_is_its_shard_its_kv_and_a_fixed_margin(
    start_cluster: Any, smollm2: Path
) -> None:
    cluster = start_cluster(smollm2, workers=2, options=("--context", "2048"))
    cluster.answers(["A long story about a river. " * 60] * 4, GREEDY)
    stages = {stage.worker: stage for stage in cluster.status().plan}
    for number, process in enumerate(cluster.workers):
        stage = stages[f"w{number}"]
        assert stage.shard_bytes > 30e6
        assert peak_resident_bytes(process.pid) <= stage.memory_bytes + ROOM_BYTES


def test_a_client_that_goes_away_frees_its_session_everywhere(
    start_cluster: Any, smollm2: Path
) -> None:
    cluster = start_cluster(smollm2, workers=2)

    async def leave_early() -> None:
        async with Client(cluster.address) as client:
            stream = client.generate(
                "Count from one to a thousand:", AnswerOptions(ignore_end=True)
            )
            async for event in stream:
                if isinstance(event, Piece) and event.tokens:
                    break
            await stream.aclose()

    asyncio.run(leave_early())
    cluster.wait_until(lambda report: report.sessions == 0, "end of the session")
    steps = cluster.status().figures.steps
    cluster.answer("One more:", AnswerOptions(max_tokens=4, temperature=0.0, ignore_end=True))
    # Had the old session gone on, it would have stepped all the while.
    assert cluster.status().figures.steps - steps <= 4 + 4


def test_a_lost_worker_ends_streams_with_its_layers_named_and_service_comes_back(
    start_cluster: Any, smollm2: Path
) -> None:
    cluster = start_cluster(smollm2, workers=2)
    victim = cluster.workers[1]
    epoch = cluster.status().epoch

    async def lose() -> PotluckError:
        async with Client(cluster.address) as client:
            seen = 0
            try:
                async for event in client.generate("Go on:", AnswerOptions(ignore_end=True)):
                    seen += isinstance(event, Piece)
                    if seen == 3:
                        os.kill(victim.pid, signal.SIGKILL)
            except PotluckError as error:
                return error
        raise AssertionError("the stream went on without a worker")

    error = asyncio.run(lose())
    assert isinstance(error, Unreachable)
    assert "w1" in str(error)
    assert re.search(r"layers", str(error))
    report = cluster.wait_until(lambda r: r.state == "unserved", "word of the loss")
    assert "w1" in report.detail

    victim.communicate()
    cluster.restart_worker(1)
    after = cluster.wait_until(lambda r: r.is_serving, "service again")
    assert after.epoch > epoch
    assert cluster.answer("The capital of France is", GREEDY).done.answer_tokens == 64


def test_every_program_ends_cleanly_on_a_signal(start_cluster: Any, smollm2: Path) -> None:
    cluster = start_cluster(smollm2, workers=2)
    cluster.answer("Hello", GREEDY)
    for process in [*cluster.workers, cluster.coordinator]:
        process.send_signal(signal.SIGINT)
    codes = [process.wait(timeout=20) for process in [*cluster.workers, cluster.coordinator]]
    assert codes == [0, 0, 0]
    logs = {log.name: log.read_text() for log in cluster.logs.glob("*.log")}
    assert len(logs) == 3
    assert [name for name, text in logs.items() if "Traceback" in text or "defect" in text] == []


def test_a_coordinator_that_stops_before_its_workers_logs_no_defect(
    start_cluster: Any, smollm2: Path
) -> None:
    cluster = start_cluster(smollm2, workers=2)
    cluster.answer("Hello", GREEDY)
    cluster.coordinator.send_signal(signal.SIGTERM)
    assert cluster.coordinator.wait(timeout=20) == 0
    assert "Traceback" not in (cluster.logs / "coordinator-0.log").read_text()
