"""Workers that compute nothing, over real gRPC: what the coordinator's tests run against."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest

from coordinator.config import Settings, Use
from coordinator.engine import Engine, ServiceState
from coordinator.grpc_server import Addresses, open_doors
from coordinator.limits import PlanLimits
from coordinator.loading import open_pipeline
from coordinator.served import ServedModel, open_model
from coordinator.templates import Conversations
from potluck.client import Client
from potluck.replies import (
    AnswerEvent,
    AnswerOptions,
    Done,
    Piece,
    Prefill,
    PromptTokens,
    Token,
)
from potluck.rpc import PROTOCOL, options
from potluck.rpc.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    types_pb2,
    worker_pb2,
    worker_pb2_grpc,
)
from potluck.testing import TinyShape, write_tiny

NextToken = Callable[[list[int]], int]
FIRST_LETTER = 3 + ord("a")  # byte-level letters stand behind three special tokens
END = 2


def letters(tokens: list[int]) -> int:
    """The fake model: a letter that depends on every token before it."""
    return FIRST_LETTER + (sum(tokens) * 7 + len(tokens)) % 26


def answer_to(prompt: list[int], n_tokens: int) -> list[int]:
    """What the fake model says."""
    tokens = list(prompt)
    for _ in range(n_tokens):
        tokens.append(letters(tokens))
    return tokens[len(prompt) :]


async def until(claim: Callable[[], bool], what: str = "", seconds: float = 10.0) -> None:
    """Waits until `claim` is true; fails after `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            while not claim():  # noqa: ASYNC110  what is waited for knows of no test
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"never came true: {what or claim}") from None


@dataclass
class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """Speaks the protocol, keeps token ids for KV, picks `next_token` if it has the head."""

    fleet_address: str
    name: str = ""
    next_token: NextToken = letters
    refuse: tuple[grpc.StatusCode, str] | None = None  # what Load answers
    fail_session: int = 0  # whose rows fail here
    full_for: int = 0  # the session that finds no room here
    is_old: bool = False  # as a release that knows nothing of scored tokens
    may_load: asyncio.Event = field(default_factory=asyncio.Event)  # cleared: loads wait here
    may_pass: asyncio.Event = field(default_factory=asyncio.Event)  # cleared: steps wait here
    loads: list[worker_pb2.LoadRequest] = field(default_factory=list)
    steps: list[worker_pb2.Step] = field(default_factory=list)
    measure_links: Any = None  # what MeasureLinks does instead, given its context
    asked_links: list[list[str]] = field(default_factory=list)
    kv: dict[int, dict[int, int]] = field(default_factory=dict)  # open sessions: position -> token
    address: str = ""
    instance: int = 0
    heart: asyncio.Task[None] | None = None
    registered: asyncio.Event = field(default_factory=asyncio.Event)
    server: Any = None
    _sent: dict[int, Any] = field(default_factory=dict)  # by step: repeats are answered from here
    _run: Any = None  # context of the stream from the stage before
    _channel: Any = None
    _next: Any = None
    _acks: asyncio.Queue[worker_pb2.StepAck] = field(default_factory=asyncio.Queue)

    async def start(self, port: int = 0) -> None:
        self.may_pass.set()
        self.may_load.set()
        self.instance = id(self) % 2**32
        self.server = grpc.aio.server(options=options.server_options())
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self.server.start()
        self.heart = asyncio.create_task(self._beat())

    async def die(self) -> None:
        """As kill -9: no more heartbeats, every stream breaks."""
        if self.heart is not None:
            self.heart.cancel()
            await asyncio.gather(self.heart, return_exceptions=True)
            self.heart = None
        self._next = None  # its end is nobody's fault
        await self.server.stop(None)
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def _beat(self) -> None:
        async with grpc.aio.insecure_channel(self.fleet_address) as channel:
            fleet = cluster_pb2_grpc.FleetStub(channel)
            while True:
                reply = await fleet.Register(self._introduction(), timeout=5)
                self.name = reply.worker
                self.registered.set()
                with contextlib.suppress(grpc.aio.AioRpcError):
                    while True:
                        await fleet.Heartbeat(self._heartbeat(), timeout=5)
                        await asyncio.sleep(0.1)

    def _introduction(self) -> cluster_pb2.RegisterRequest:
        return cluster_pb2.RegisterRequest(
            hello=types_pb2.Hello(protocol=PROTOCOL),
            worker=self.name,
            address=self.address,
            instance=self.instance,
            resources=types_pb2.Resources(
                machine="test",
                isa="fake",
                threads=1,
                memory_bytes=2**32,
                memory_free_bytes=2**31,
                read_bytes_per_second=1e10,
            ),
        )

    def _heartbeat(self) -> cluster_pb2.HeartbeatRequest:
        beat = cluster_pb2.HeartbeatRequest(
            worker=self.name, instance=self.instance, progress=len(self.steps)
        )
        beat.state = cluster_pb2.WORKER_STATE_READY
        return beat

    async def Load(self, request: worker_pb2.LoadRequest, context: Any) -> AsyncIterator[Any]:
        if self.refuse is not None:
            await context.abort(*self.refuse)
        self.loads.append(request)
        self.kv.clear()
        self._sent.clear()
        self._next = None
        yield worker_pb2.LoadProgress(done_bytes=50, total_bytes=100)
        await self.may_load.wait()
        ready = worker_pb2.LoadedShard(epoch=request.epoch, span=request.span, shard_bytes=1234)
        yield worker_pb2.LoadProgress(done_bytes=100, total_bytes=100, ready=ready)

    async def Echo(self, request: worker_pb2.EchoRequest, context: Any) -> Any:
        if self.is_old:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
        return worker_pb2.EchoReply(size_bytes=len(request.payload))

    async def MeasureLinks(self, request: worker_pb2.MeasureLinksRequest, context: Any) -> Any:
        self.asked_links.append([target.worker for target in request.targets])
        if self.measure_links is not None:
            return await self.measure_links(context)
        links = [
            worker_pb2.MeasuredLink(worker=t.worker, rtt_seconds=0.001, bytes_per_second=1e8)
            for t in request.targets
        ]
        return worker_pb2.MeasureLinksReply(links=links)

    async def Describe(self, request: worker_pb2.DescribeRequest, context: Any) -> Any:
        return worker_pb2.DescribeReply(worker=self.name)

    async def Cancel(self, request: worker_pb2.CancelRequest, context: Any) -> Any:
        return worker_pb2.CancelReply()

    async def Run(  # type: ignore[override]  # it writes by itself
        self, request_iterator: AsyncIterator[worker_pb2.Step], context: Any
    ) -> None:
        async def send_acks() -> None:
            while True:
                await context.write(await self._acks.get())

        sending = asyncio.create_task(send_acks())
        self._run = context
        try:
            async for step in request_iterator:
                self._acks.put_nowait(worker_pb2.StepAck(epoch=step.epoch, step=step.step))
                if step.step in self._sent:
                    await self._send(self._sent[step.step])
                    continue
                self.steps.append(step)
                await self.may_pass.wait()
                await self._pass_on(step)
        finally:
            sending.cancel()

    async def break_link(self) -> None:
        """The stream from the stage before ends, once; the worker lives on."""
        with contextlib.suppress(grpc.aio.AbortError):
            await self._run.abort(grpc.StatusCode.UNAVAILABLE, "the link broke")

    async def _pass_on(self, step: worker_pb2.Step) -> None:
        load = self.loads[-1]
        failures = [*step.failures, *self._command(step)]
        rows = []
        for entry in step.rows:
            failure = types_pb2.Failure(worker=self.name, session=entry.session)
            if entry.session == self.fail_session:
                failure.code = types_pb2.FAILURE_CODE_NOT_FINITE
                failure.message = "NaN in layer 1"
            elif entry.session not in self.kv:
                failure.code = types_pb2.FAILURE_CODE_UNKNOWN_SESSION
            if failure.code:
                failures.append(failure)
                continue
            known = self.kv[entry.session]
            assert entry.start_position <= len(known), "a gap"
            for i, token in enumerate(entry.token_ids):
                known[entry.start_position + i] = token
            rows.append(entry)
        timings = [*step.timings, types_pb2.StageTiming(worker=self.name, compute_seconds=0.001)]
        if load.has_head:
            message: Any = cluster_pb2.StepResult(
                epoch=step.epoch,
                step=step.step,
                rows=[self._picks(entry) for entry in rows],
                failures=failures,
                timings=timings,
            )
        else:
            n_rows = sum(len(entry.token_ids) for entry in rows)
            message = worker_pb2.Step(
                epoch=step.epoch,
                step=step.step,
                commands=step.commands,
                rows=rows,
                failures=failures,
                timings=timings,
                activation=types_pb2.Activation(
                    type=types_pb2.ACTIVATION_TYPE_F32, rows=n_rows, dim=1, values=bytes(4 * n_rows)
                ),
            )
        self._sent[step.step] = message
        await self._send(message)

    def _command(self, step: worker_pb2.Step) -> list[types_pb2.Failure]:
        failures = []
        for command in step.commands:
            if command.HasField("open") and command.open.session == self.full_for:
                failure = types_pb2.Failure(worker=self.name, session=self.full_for)
                failure.code = types_pb2.FAILURE_CODE_FULL
                failure.message = "no pages are left"
                failures.append(failure)
            elif command.HasField("open"):
                assert command.open.session not in self.kv
                self.kv[command.open.session] = {}
            elif command.HasField("close"):
                self.kv.pop(command.close.session, None)
        return failures

    def _picks(self, entry: types_pb2.Rows) -> cluster_pb2.RowsResult:
        result = cluster_pb2.RowsResult(session=entry.session)
        if entry.want_logits:
            known = self.kv[entry.session]
            end = entry.start_position + len(entry.token_ids)
            for i, token in enumerate(entry.scored_ids if not self.is_old else ()):
                scored = result.picks.add(token_id=token)
                scored.position = end - entry.want_logits + 1 + i
                scored.logprob = -scored.position / 8
                for n in range(entry.sampling.prompt_logprobs):
                    scored.top.add(token_id=n, logprob=-1.0)
            if len(result.picks) == entry.want_logits:
                return result
            pick = result.picks.add(position=end)
            pick.token_id = self.next_token([known[i] for i in range(end)])
            if entry.sampling.HasField("logprobs"):
                pick.logprob = -0.5
                pick.top.add(token_id=pick.token_id, logprob=-0.5)
        return result

    async def _send(self, message: Any) -> None:
        to = self.loads[-1].next
        try:
            if self._next is None:
                self._channel = grpc.aio.insecure_channel(
                    to.address, options=options.client_options()
                )
                self._next = (
                    worker_pb2_grpc.WorkerStub(self._channel).Run()
                    if to.worker
                    else cluster_pb2_grpc.FleetStub(self._channel).Results()
                )
                self._watch(self._next)
            await self._next.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self._tell_lost()

    def _watch(self, call: Any) -> None:
        """A broken link is told to the stage before, also while nothing is sent."""
        call.add_done_callback(lambda _: self._tell_lost() if self._next is call else None)

        async def drain() -> None:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                while (ack := await call.read()) is not grpc.aio.EOF:
                    if isinstance(ack, worker_pb2.StepAck) and ack.HasField("failure"):
                        self._acks.put_nowait(ack)  # relayed to the stage before

        self._draining = asyncio.create_task(drain())

    def _tell_lost(self) -> None:
        failure = types_pb2.Failure(
            code=types_pb2.FAILURE_CODE_LINK_LOST, worker=self.name, message="socket closed"
        )
        self._acks.put_nowait(worker_pb2.StepAck(epoch=self.loads[-1].epoch, failure=failure))


@dataclass
class Answer:
    """An answer's events, put together."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt: list[Token] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    done: Done | None = None

    def note(self, event: AnswerEvent) -> None:
        if isinstance(event, Piece):
            self.text += event.text
            self.tokens += event.tokens
        elif isinstance(event, PromptTokens):
            self.prompt += event.tokens
        elif isinstance(event, Prefill):
            self.prefills.append(event)
        else:
            self.done = event

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


@dataclass
class Service:
    """A coordinator in this process, and its fake workers."""

    engine: Engine
    addresses: Addresses
    client: Client
    running: asyncio.Task[None]  # engine.run
    workers: list[FakeWorker] = field(default_factory=list)

    async def add(self, name: str = "", *, port: int = 0, **fields: Any) -> FakeWorker:
        worker = FakeWorker(self.addresses.fleet, name, **fields)
        await worker.start(port)
        self.workers.append(worker)
        return worker

    async def serving(self) -> None:
        await until(lambda: self.engine.state is ServiceState.SERVING, "serving")

    async def ask(self, prompt: Any, options: AnswerOptions) -> Answer:
        """A whole answer."""
        answer = Answer()
        async for event in self.client.generate(prompt, options):
            answer.note(event)
        return answer

    @property
    def open_sessions(self) -> int:
        """Sessions with KV, over all workers."""
        return sum(len(worker.kv) for worker in self.workers)


StartService = Callable[..., Awaitable[Service]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return open_model(str(write_tiny(path, TinyShape(n_layers=6))), 64)


@pytest.fixture
async def start_service(model: ServedModel) -> AsyncIterator[StartService]:
    """start_service(workers=2, wait=True, worker fields..., settings={...}): a running Service."""
    async with contextlib.AsyncExitStack() as stack:
        running: list[Service] = []

        async def start(
            workers: int = 2,
            *,
            wait: bool = True,
            settings: dict[str, Any] | None = None,
            limits: PlanLimits | None = None,
            **fields: Any,
        ) -> Service:
            given: dict[str, Any] = {"workers": workers, "grpc_port": 0, "fleet_port": 0}
            given |= {"use": Use.ALL, **(settings or {})}
            chosen = Settings(model="tiny", **given)
            engine = Engine(model, chosen, open_pipeline, limits=limits)
            conversations = Conversations(model.tokenizer, model.name)
            stack.push_async_callback(conversations.close)
            addresses = await stack.enter_async_context(open_doors(engine, conversations, chosen))
            engine.fleet_address = addresses.fleet
            tasks = [asyncio.create_task(work) for work in (engine.run(), engine.watch())]
            for task in tasks:
                stack.push_async_callback(_cancel, task)
            client = await stack.enter_async_context(Client(addresses.public))
            service = Service(engine, addresses, client, tasks[0])
            running.append(service)
            for i in range(workers if wait else 0):
                worker = await service.add(f"w{i + 1}", **fields)
                await worker.registered.wait()
            if wait:
                await service.serving()
            return service

        yield start
        for service in running:
            for worker in service.workers:
                await worker.die()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def fake() -> SimpleNamespace:
    """The fake model's words, for tests: importlib mode lets them import no conftest."""
    return SimpleNamespace(
        answer_to=answer_to, letters=letters, until=until, first_letter=FIRST_LETTER, end=END
    )
