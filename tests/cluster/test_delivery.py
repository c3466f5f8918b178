"""Weights that come over the network, with real programs: what is sent, kept, resumed, refused.

Workers are to stand for other machines, so the model's path must lead nowhere for them: the
coordinator opens the file by a link, which is then removed. A removed file can still be read by who
has it open, and a second start of the coordinator gets the link again.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from potluck import gguf, model
from potluck.client import Client
from potluck.plan import Span
from potluck.replies import AnswerOptions, Piece, ServiceReport, WorkerReport
from potluck.tensor_store import TensorStore
from potluck.testing import TinyShape, write_tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

SMALL = TinyShape(n_layers=6, context_tokens=256)
# 0.2 GB: long enough on the way to be caught there.
LARGE = TinyShape(weight_type="f16", dim=1024, n_layers=8, n_heads=16, ffn_dim=2816, head_dim=64)
ROOM_BYTES = 200 * 1024 * 1024  # beyond the shard
GREEDY = AnswerOptions(max_tokens=12, temperature=0.0, logprobs=0)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "small.gguf", SMALL)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "large.gguf", LARGE)


def span_bytes(path: Path, start: int, stop: int, held: tuple[int, int] | None = None) -> int:
    """Of the span's tensors, those that are equal counted once, without those of `held`."""
    found = tensors_of(path, start, stop)
    others = tensors_of(path, *held) if held else {}
    return sum(size for data, size in found.items() if data not in others)


def tensors_of(path: Path, start: int, stop: int) -> dict[bytes, int]:
    """A span's tensors and their sizes."""
    file = gguf.read(path)
    config = model.config_of(file)
    ends = {"embeds": start == 0, "has_head": stop == config.n_layers}
    with path.open("rb") as opened:
        found: dict[bytes, int] = {}
        for tensor in model.span_tensors(file, config, Span(start, stop), **ends):
            opened.seek(tensor.offset_bytes)
            found[opened.read(tensor.size_bytes)] = tensor.size_bytes
    return found


def layer_bytes(path: Path, layers: Collection[int]) -> int:
    """Of these layers' tensors."""
    found = [t for t in gguf.read(path).tensors.values() if t.name.startswith("blk.")]
    return sum(t.size_bytes for t in found if int(t.name.split(".")[1]) in layers)


@dataclass
class Machines:
    """A coordinator that has the model, and workers on machines that have not."""

    source: Path  # the file, where nobody looks
    path: Path  # where the coordinator finds it while it starts
    folder: Path  # of logs and caches
    n_workers: int
    coordinator: subprocess.Popen[str] | None = None
    workers: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    ports: tuple[str, str] = ("0", "0")
    n_logs: int = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports[0]}"

    def start_coordinator(self, *options: str) -> None:
        if not self.path.exists():
            os.link(self.source, self.path)
        grpc, fleet = self.ports
        self.coordinator, said = self._start(
            "coordinator",
            "potluck-coordinator",
            str(self.path),
            *("--grpc-port", grpc, "--fleet-port", fleet, "--workers", str(self.n_workers)),
            *("--context", "128", "--use", "all", *options),
        )
        grpc, fleet = (str(said[door]).rpartition(":")[2] for door in ("grpc", "fleet"))
        self.ports = (grpc, fleet)
        self.path.unlink()

    def start_worker(self, name: str, *options: str, cache: str = "") -> None:
        """`cache` "": one of its own."""
        self.workers[name], _ = self._start(
            cache or name,
            "potluck-worker",
            *("--coordinator", self.address, "--name", name, "--port", "0", "--threads", "1"),
            *options,
        )

    def store(self, cache: str) -> TensorStore:
        return TensorStore(self.folder / cache / "tensors")

    def status(self) -> ServiceReport:
        async def ask() -> ServiceReport:
            async with Client(self.address) as client:
                return await client.status()

        return asyncio.run(ask())

    def until_serving(self) -> dict[str, WorkerReport]:
        """Workers by name, once the service serves."""
        deadline = time.monotonic() + 90
        while not (report := self.status()).is_serving:
            for process in (self.coordinator, *self.workers.values()):
                assert process is not None
                assert process.poll() is None, self.said()
            assert time.monotonic() < deadline, (report, self.said())
            time.sleep(0.02)
        return {worker.id: worker for worker in report.workers}

    def until_planned(self, *names: str) -> dict[str, tuple[int, int]]:
        """Spans of a plan of exactly these workers, once it is served."""
        deadline = time.monotonic() + 60
        while True:
            self.until_serving()
            spans = {s.worker: s.span for s in self.status().plan}
            if set(spans) == set(names) and self.status().is_serving:
                return spans
            assert time.monotonic() < deadline, (spans, self.said())
            time.sleep(0.05)

    def fetched(self) -> dict[str, int]:
        """Bytes that each worker got from others in its newest load, once the service serves."""
        return {name: worker.fetched_bytes for name, worker in self.until_serving().items()}

    def bits(self) -> object:
        """An answer, with the bits of its log-probabilities."""

        async def ask() -> list[object]:
            async with Client(self.address) as client:
                events = [event async for event in client.generate("once upon", GREEDY)]
                tokens = [t for e in events if isinstance(e, Piece) for t in e.tokens]
                return [(t.id, float(t.logprob or 0.0).hex()) for t in tokens]

        return asyncio.run(ask())

    def said(self) -> str:
        return "\n".join(log.read_text() for log in sorted(self.folder.glob("*.log")))

    def shard_bytes(self) -> int:
        """Of the first stage."""
        return self.status().plan[0].shard_bytes

    def kill(self, process: subprocess.Popen[str] | None) -> None:
        assert process is not None
        process.kill()
        process.communicate()

    def stop(self, *names: str) -> None:
        """These workers, or (none named) all programs."""
        ended = [self.workers.pop(name) for name in names or list(self.workers)]
        if not names and self.coordinator is not None:
            ended.append(self.coordinator)
            self.coordinator = None
        for process in ended:
            process.send_signal(signal.SIGTERM)
        for process in ended:
            process.communicate(timeout=30)

    def _start(
        self, cache: str, program: str, *command: str
    ) -> tuple[subprocess.Popen[str], dict[str, object]]:
        self.n_logs += 1
        with (self.folder / f"{self.n_logs:02}-{cache}.log").open("w") as err:
            process = subprocess.Popen(
                [str(Path(sys.executable).parent / program), *command, "--stop-with-stdin"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                env={**os.environ, "POTLUCK_CACHE": str(self.folder / cache)},
            )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, self.said()
        announced: dict[str, object] = json.loads(line)
        return process, announced


Machine = Callable[..., Machines]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machine]:
    """machines(model, n_workers=1): a coordinator runs, workers are to be started."""
    made: list[Machines] = []

    def make(source: Path, n_workers: int = 1) -> Machines:
        folder = tmp_path / f"{len(made)}"
        folder.mkdir()
        made.append(Machines(source, folder / "model.gguf", folder, n_workers))
        made[-1].start_coordinator()
        return made[-1]

    yield make
    for each in made:
        try:
            each.stop()
        finally:
            for process in (each.coordinator, *each.workers.values()):
                if process is not None and process.poll() is None:
                    each.kill(process)


def test_a_worker_without_the_file_answers_like_one_with_it(
    machines: Machine, small: Path, start_cluster: Any
) -> None:
    here = start_cluster(small, workers=1, options=("--context", "128"))
    expected = here.answer("once upon", GREEDY).bits
    away = machines(small)
    away.start_worker("w1")
    away.until_serving()
    assert tuple(away.bits()) == expected  # type: ignore[arg-type]  # a list of pairs


def test_only_the_tensors_of_a_span_are_sent_and_only_once(machines: Machine, small: Path) -> None:
    away = machines(small, n_workers=2)
    for name in ("w1", "w2"):
        away.start_worker(name)
    fetched = away.fetched()
    spans = {stage.worker: stage.span for stage in away.status().plan}
    assert len(spans) == 2
    for name, span in spans.items():
        assert fetched[name] == span_bytes(small, *span)
        header_bytes = gguf.read(small).data_offset_bytes
        assert away.store(name).total_bytes() == fetched[name] + header_bytes
    away.stop()
    away.start_coordinator()
    for name in spans:
        away.start_worker(name)
    assert set(away.fetched().values()) == {0}


def peak_resident_bytes(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def wait_for_bytes(away: Machines, cache: str, n_bytes: int) -> None:
    deadline = time.monotonic() + 60
    while away.store(cache).total_bytes() < n_bytes:
        assert time.monotonic() < deadline, away.said()
        time.sleep(0.002)


def test_a_coordinator_killed_in_mid_delivery_goes_on_where_it_was(
    machines: Machine, large: Path
) -> None:
    size = span_bytes(large, 0, LARGE.n_layers)
    away = machines(large)
    away.start_worker("w1")
    wait_for_bytes(away, "w1", 6 * size // 10)
    away.kill(away.coordinator)
    away.start_coordinator()
    fetched = away.fetched()["w1"]
    assert 0 < fetched <= 4 * size // 10
    assert away.bits()


def test_a_worker_killed_in_mid_delivery_goes_on_where_it_was(
    machines: Machine, large: Path
) -> None:
    size = span_bytes(large, 0, LARGE.n_layers)
    away = machines(large)
    away.start_worker("w1")
    wait_for_bytes(away, "w1", 6 * size // 10)
    away.kill(away.workers["w1"])
    kept = away.store("w1").total_bytes() - gguf.read(large).data_offset_bytes
    away.start_worker("w1")
    assert away.fetched()["w1"] == size - kept
    assert kept < size
    assert peak_resident_bytes(away.workers["w1"].pid) < away.shard_bytes() + ROOM_BYTES


def test_only_a_damaged_tensor_is_fetched_again(machines: Machine, small: Path) -> None:
    away = machines(small)
    away.start_worker("w1")
    away.until_serving()
    before = away.bits()
    largest = max(away.store("w1").root.rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    away.stop("w1")
    away.start_worker("w1")
    assert away.fetched()["w1"] == len(data)
    assert away.bits() == before
    assert "is damaged: its sha256 is" in away.said()
    largest.unlink()
    away.stop("w1")
    away.start_worker("w1")
    assert away.fetched()["w1"] == len(data)
    assert away.bits() == before


def test_a_worker_whose_packs_are_there_needs_no_tensors(machines: Machine, small: Path) -> None:
    away = machines(small)
    away.start_worker("w1", "--weights", "mmap")
    assert away.fetched() == {"w1": span_bytes(small, 0, SMALL.n_layers)}
    before = away.bits()
    away.stop("w1")
    away.store("w1").remove()
    away.start_worker("w1", "--weights", "mmap")
    assert away.fetched() == {"w1": 0}
    assert away.bits() == before
    assert away.store("w1").total_bytes() == gguf.read(small).data_offset_bytes
    away.stop("w1")
    (pack,) = (away.folder / "w1" / "packs").rglob("layer-2.*.pack")
    pack.unlink()
    away.start_worker("w1", "--weights", "mmap")
    assert away.fetched() == {"w1": layer_bytes(small, {2})}
    assert away.bits() == before


def test_another_worker_serves_what_it_has(machines: Machine, large: Path) -> None:
    one = machines(large)
    one.start_worker("w1")
    one.until_serving()
    one.stop()
    one.n_workers = 2
    one.start_coordinator()
    one.start_worker("w1")
    one.start_worker("w2")
    fetched = one.fetched()
    spans = {stage.worker: stage.span for stage in one.status().plan}
    assert fetched == {"w1": 0, "w2": span_bytes(large, *spans["w2"])}
    assert " from worker w1" in one.said()


def test_a_new_plan_fetches_only_layers_that_are_new(machines: Machine, small: Path) -> None:
    away = machines(small, n_workers=2)
    away.start_worker("w1")
    away.start_worker("w2")
    first = away.fetched()
    spans = {stage.worker: stage.span for stage in away.status().plan}
    away.stop()
    away.n_workers = 1
    away.start_coordinator()
    away.start_worker("w1")
    rest = span_bytes(small, 0, SMALL.n_layers) - span_bytes(small, *spans["w1"])
    assert away.fetched() == {"w1": rest}
    assert first["w2"] == span_bytes(small, *spans["w2"])


def test_only_layers_that_change_their_worker_are_fetched(machines: Machine, small: Path) -> None:
    away = machines(small, n_workers=3)
    for name in ("w1", "w2", "w3"):
        away.start_worker(name)
    held = away.until_planned("w1", "w2", "w3")
    away.start_worker("w4")  # a spare
    before = away.bits()
    away.kill(away.workers.pop("w2"))
    spans = away.until_planned("w1", "w3", "w4")
    fetched = away.fetched()
    for name, span in spans.items():
        assert fetched[name] == span_bytes(small, *span, held.get(name)), (name, spans, held)
    assert away.bits() == before
    away.start_worker("w2")
    away.kill(away.workers.pop("w4"))
    again, fetched = away.until_planned("w1", "w2", "w3"), away.fetched()
    assert set(again) == set(held)
    for name, span in again.items():  # w2's speed was measured anew: spans may differ from before
        if span == held[name]:
            assert fetched[name] == 0
    assert away.bits() == before


def test_a_copy_under_another_name_is_verified_once_and_nothing_is_sent(
    machines: Machine, small: Path
) -> None:
    away = machines(small)
    folder = away.folder / "w1" / "models" / "model"
    folder.mkdir(parents=True)
    copy = Path(shutil.copy(small, folder / "copy.gguf"))
    away.start_worker("w1")
    assert away.fetched() == {"w1": 0}
    before = away.bits()
    (record,) = (away.folder / "w1" / "manifests").iterdir()
    assert len(record.read_text().splitlines()) == len(gguf.read(small).tensors)
    away.stop("w1")
    file = gguf.read(copy)
    with copy.open("r+b") as opened:  # the same header, other weights
        opened.seek(file.tensors["blk.2.ffn_up.weight"].offset_bytes)
        opened.write(b"\x01\x02\x03")
    away.start_worker("w1")
    changed = file.tensors["blk.2.ffn_up.weight"]
    assert away.fetched() == {"w1": changed.size_bytes}  # the others are copied
    assert away.bits() == before
    assert "blk.2.ffn_up.weight of " in away.said()
    assert "is not the coordinator's" in away.said()


def test_a_store_without_room_ends_the_start_with_figures(machines: Machine, small: Path) -> None:
    away = machines(small)
    away.start_worker("w1", "--tensor-space", "20000")
    assert away.coordinator is not None
    assert away.coordinator.wait(60) == 1
    assert "delivered tensors may take 20,000 bytes" in away.said()
    assert "--tensor-space" in away.said()
    assert not list(away.store("w1").root.rglob("??/*[0-9a-f].part"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_ends_the_start_with_figures(machines: Machine, small: Path) -> None:
    away = machines(small)
    cache = away.folder / "w1"
    cache.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(cache)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no mounts here: {mounted.stderr!r}")
    try:
        away.start_worker("w1")
        assert away.coordinator is not None
        assert away.coordinator.wait(60) == 1
        assert "bytes of the disk are free" in away.said()
        away.stop()
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_a_file_that_is_changed_under_the_coordinator_is_served_no_more(
    machines: Machine, small: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copy(small, tmp_path / "own.gguf"))
    away = machines(own)
    with own.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"!")
    away.start_worker("w1")
    assert away.coordinator is not None
    assert away.coordinator.wait(60) == 1
    assert "was changed since it was opened" in away.said()


def test_nothing_is_sent_of_a_synthetic_model(start_cluster: Any) -> None:
    cluster = start_cluster("synthetic:tiny-q4_0", workers=2, options=("--context", "128"))
    workers = cluster.status().workers
    assert [(w.fetched_bytes, w.fetch_total_bytes) for w in workers] == [(0, 0)] * 2
