"""Real clusters for tests: coordinator and workers as processes on loopback, on free ports."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from potluck.client import Client
from potluck.replies import AnswerOptions, Done, Piece, PromptTokens, ServiceReport, Token

START_SECONDS = 60.0


@dataclass(frozen=True)
class Answer:
    """A whole answer, as its events told it."""

    text: str
    tokens: tuple[Token, ...]
    done: Done
    prompt: tuple[Token, ...] = ()  # with prompt_logprobs

    @property
    def bits(self) -> tuple[tuple[int, str], ...]:
        """Token ids with the bits of their log-probabilities."""
        return tuple((t.id, float(t.logprob or 0.0).hex()) for t in self.tokens)


async def collect(client: Client, prompt: str | list[int], options: AnswerOptions) -> Answer:
    text: list[str] = []
    tokens: list[Token] = []
    scored: list[Token] = []
    done: Done | None = None
    async for event in client.generate(prompt, options):
        if isinstance(event, Piece):
            text.append(event.text)
            tokens.extend(event.tokens)
        elif isinstance(event, PromptTokens):
            scored.extend(event.tokens)
        elif isinstance(event, Done):
            done = event
    assert done is not None
    return Answer("".join(text), tuple(tokens), done, tuple(scored))


@dataclass
class Cluster:
    """Running programs. `workers` are in the order they were started; names are w0, w1, ..."""

    address: str
    coordinator: subprocess.Popen[str]
    logs: Path
    workers: list[subprocess.Popen[str]] = field(default_factory=list)
    commands: list[tuple[str, ...]] = field(default_factory=list)  # of the workers

    def status(self) -> ServiceReport:
        async def ask() -> ServiceReport:
            async with Client(self.address) as client:
                return await client.status()

        return asyncio.run(ask())

    def wait_until(self, claim: Callable[[ServiceReport], bool], what: str) -> ServiceReport:
        """The first status of which `claim` is true; fails after START_SECONDS."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            report = self.status()
            if claim(report):
                return report
            time.sleep(0.05)
        raise AssertionError(f"no {what} within {START_SECONDS:g} s: {self.status()}")

    def answers(self, prompts: list[str], options: AnswerOptions) -> list[Answer]:
        """All prompts at once, so that their rows share steps."""

        async def ask() -> list[Answer]:
            async with Client(self.address) as client:
                return await asyncio.gather(*(collect(client, p, options) for p in prompts))

        return asyncio.run(ask())

    def answer(self, prompt: str, options: AnswerOptions) -> Answer:
        return self.answers([prompt], options)[0]

    def start_worker(self, *command: str) -> None:
        log = self.logs / f"{self.address.replace(':', '-')}-w{len(self.workers)}.log"
        worker, _ = start_program(log, *command)
        self.workers.append(worker)
        self.commands.append(command)

    def restart_worker(self, number: int) -> None:
        """Starts a worker again that has ended, with the same command."""
        log = self.logs / f"{self.address.replace(':', '-')}-w{number}-again.log"
        self.workers[number], _ = start_program(log, *self.commands[number])

    def stop(self) -> None:
        for process in [self.coordinator, *self.workers]:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in [self.coordinator, *self.workers]:
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise AssertionError(f"{process.args!r} did not stop") from None


def program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def start_program(log: Path, *command: str) -> tuple[subprocess.Popen[str], dict[str, object]]:
    """A program and the one line it prints when it is bound; its log goes to `log`."""
    with log.open("w") as err:
        process = subprocess.Popen(
            [*command, "--stop-with-stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "default"},
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(f"{command} ended with {process.wait()}: {log.read_text()}")
    announced: dict[str, object] = json.loads(line)
    return process, announced


StartCluster = Callable[..., Cluster]


@pytest.fixture
def start_cluster(tmp_path: Path) -> Iterator[StartCluster]:
    """start_cluster(model, workers=3, threads=1, chunk=64, options=(), worker_options=())."""
    running: list[Cluster] = []

    def start(
        model: Path,
        *,
        workers: int = 3,
        threads: int = 1,
        chunk: int = 64,
        options: tuple[str, ...] = (),
        worker_options: tuple[str, ...] = (),
        wait: bool = True,
    ) -> Cluster:
        number = len(running)
        coordinator, said = start_program(
            tmp_path / f"coordinator-{number}.log",
            program("potluck-coordinator"),
            str(model),
            *("--grpc-port", "0", "--fleet-port", "0", "--workers", str(workers)),
            *("--prefill-chunk", str(chunk), "--use", "all", *options),
        )
        cluster = Cluster(str(said["grpc"]), coordinator, tmp_path)
        running.append(cluster)
        for i in range(workers):
            cluster.start_worker(
                program("potluck-worker"),
                *("--coordinator", cluster.address, "--name", f"w{i}", "--port", "0"),
                *("--threads", str(threads), *worker_options),
            )
        if wait:
            cluster.wait_until(lambda report: report.is_serving, "service")
        return cluster

    yield start
    for cluster in running:
        cluster.stop()
