"""THE loop: workers to a plan, sessions to steps, results to answers.

The only module that calls both scheduler and pipeline, and the only task that changes sessions.
Everything here belongs to the event loop; doors call the plain methods and await nothing of ours
but their own AnswerStream. Nothing is committed before its step has come back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from enum import Enum
from typing import Protocol

from coordinator import forecast, planner
from coordinator.answer import AnswerText
from coordinator.config import Settings, Use
from coordinator.drift import Drift
from coordinator.figures import Figures, Traffic
from coordinator.held import HeldLayers
from coordinator.limits import PlanLimits
from coordinator.links import MeasuredLinks
from coordinator.loading import LoadOrder, Progress
from coordinator.membership import Membership
from coordinator.messages import Outcome, Picked
from coordinator.pipeline import Pipeline
from coordinator.planner import Asked, Planned
from coordinator.request import Request
from coordinator.scheduler import Batch, BatchRows, Limits, Scheduler, picks_that_fit
from coordinator.served import ServedModel, stored_layers
from coordinator.session import Session, SessionId
from coordinator.stream import AnswerStream
from potluck.errors import PlanError, PotluckError, StageLost, StepError, Unreachable
from potluck.plan import LinkFigures, Links, Plan, WorkerId, WorkerInfo
from potluck.rpc import options

log = logging.getLogger(__name__)

# What links are taken for until they are measured: all is on loopback in this release.
LOOPBACK = Links(LinkFigures(rtt_seconds=0.2e-3, bytes_per_second=1e9))

DRAIN_SECONDS = 3.0  # running answers get so long after the first signal: a person waits for it


class ServiceState(Enum):
    """One word for what the service is doing."""

    WAITING = "waiting"  # for the first workers
    LOADING = "loading"
    SERVING = "serving"
    UNSERVED = "unserved"  # it has served, and layers are missing now


class OpenPipeline(Protocol):
    """Loads a plan and connects its stages; loading.open_pipeline fits, so does a fake."""

    def __call__(
        self, plan: Plan, order: LoadOrder, on_progress: Progress, on_change: Callable[[], None]
    ) -> AbstractAsyncContextManager[Pipeline]:
        """The pipeline, open until the context ends. Raises StageLost, PlanError."""
        ...


class Engine:
    """One served model on one fleet. Attributes without underscore may be read by doors."""

    def __init__(
        self,
        model: ServedModel,
        settings: Settings,
        open_pipeline: OpenPipeline,
        clock: Callable[[], float] = time.monotonic,
        limits: PlanLimits | None = None,
    ) -> None:
        self.model = model
        self.limits = limits or {}  # what people say that workers may be used for
        self.links = LOOPBACK  # those of the newest plan are measured
        self.settings = settings
        self.clock = clock
        self.membership = Membership(clock, self._break)
        self.figures = Figures()
        self.traffic = Traffic()  # since start
        self.fleet_address = ""  # set by the wiring once the port is bound
        self.state = ServiceState.WAITING
        self.epoch = 1  # of the plan that is served or comes next: what is older is stale
        self.planned: Planned | None = None  # the newest, also while it is unserved
        self.drift: Drift | None = None  # of the newest plan that was served
        self.pipeline: Pipeline | None = None  # while serving
        self._open_pipeline = open_pipeline
        self._meter = MeasuredLinks(LOOPBACK)
        self._scheduler: Scheduler | None = None  # while serving
        self._held = HeldLayers()
        self._answers: dict[SessionId, AnswerStream] = {}
        self._n_asked = 0
        self._missing = ""  # why there is no service, after a loss
        self._broken: set[WorkerId] = (
            set()
        )  # broke away since the plan was made, and are dealt with
        self._has_served = False
        self._is_stopping = False
        self._wake = asyncio.Event()  # a result, a request or a loss: the loop looks again
        self._state_changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self) -> None:
        """Waits for workers, serves, and begins again after a loss. Until cancelled.

        Raises PlanError if the first plan is impossible: people should see that and not wait.
        """
        while True:
            workers = await self.membership.enough(self._n_needed)
            n_changes = self.membership.n_changes  # who comes while a plan is made is in the next
            if self.settings.use is Use.BEST:  # the others are candidates too
                workers = self.membership.steady(self._n_needed)
            try:
                await self._serve_epoch(workers)
            except StageLost as lost:
                self._note_loss(lost)
            except PlanError as impossible:
                if not self._has_served:
                    raise
                self._missing = impossible.message
                log.error("%s", impossible.message)
                await self.membership.change(n_changes)

    @property
    def plan(self) -> Plan | None:
        """The newest, also while it is unserved."""
        return self.planned.plan if self.planned is not None else None

    async def watch(self) -> None:
        """Declares workers lost that are silent or stuck. Until cancelled."""
        while True:
            await asyncio.sleep(options.HEARTBEAT_SECONDS)
            self.membership.sweep()
            now = self.clock()
            if self.pipeline is not None and self.pipeline.is_overdue(now):
                ids = [stage.worker for stage in self.pipeline.plan.stages]
                stillest, moved_at = self.membership.fleet.stillest(ids)
                if now - moved_at > options.STILL_SECONDS:  # else it is slow, and slow is not dead
                    self.membership.lose(stillest, "a step is overdue and its engine stands still")

    async def _serve_epoch(self, workers: list[WorkerInfo]) -> None:
        """One plan, from its making to the loss of a stage, which it raises.

        Returns without one if the fleet changes while its links are measured.
        """
        model, settings = self.model, self.settings
        self._broken.clear()
        self.links = await self._meter.measure(workers)
        if any(worker.id in self._broken for worker in workers):
            return
        self.planned, self.drift = await self._make_plan(workers), None
        plan = self.planned.plan
        order = LoadOrder(
            epoch=self.epoch,
            model=model.reference,
            context_tokens=model.context_tokens,
            max_sessions=settings.max_sessions,
            kv_type=settings.kv_type,
            wire=settings.wire,
            # Also of those that take no part: they may have weights on their disks.
            addresses={w.id: w.address for w in (*workers, *self.membership.fleet.usable())},
            fleet_address=self.fleet_address,
            weights_address=self.fleet_address if model.manifest is not None else "",
        )
        log.info("epoch %s: %s", self.epoch, _shown(self.planned))
        for line in self.planned.advice:
            log.info("advice: %s", line)
        self._set_state(ServiceState.LOADING)
        try:
            async with self._open_pipeline(
                plan, order, self.membership.note_load, self._wake.set
            ) as pipeline:
                gone = [s.worker for s in plan.stages if s.worker in self._broken]
                if gone:
                    raise StageLost(f"worker {gone[0]} was lost while it loaded", worker=gone[0])
                self._held.note(plan, (*workers, *self.membership.fleet.usable()))
                await self._serve(pipeline, Scheduler(self._limits(self.planned)))
        finally:
            self.pipeline, self._scheduler = None, None
            self.epoch += 1  # the fence: what is left of this epoch is stale from now on
            self._set_state(ServiceState.UNSERVED if self._has_served else ServiceState.WAITING)

    async def _make_plan(self, workers: Sequence[WorkerInfo]) -> Planned:
        """Of these, or of all if they can't do it: who was lost before is better than no service.

        In a thread: a plan of hundreds of workers takes a second, and heartbeats go on. Raises
        PlanError.
        """
        try:
            return await asyncio.to_thread(self._planned, workers)
        except PlanError:
            everyone = self.membership.fleet.usable()
            if len(everyone) <= len(workers):
                raise
            return await asyncio.to_thread(self._planned, everyone)

    def _planned(self, workers: Sequence[WorkerInfo]) -> Planned:
        """The best plan of these workers. Raises PlanError."""
        settings = self.settings
        return planner.plan(
            self.model.sizes,
            workers,
            Asked(
                self.model.context_tokens,
                max_sessions=settings.max_sessions,
                sessions=settings.sessions,
                every_worker=settings.use is Use.ALL,
                one_pipeline=True,
            ),
            links=self.links,
            limits=self.limits,
            stored=stored_layers(self.model.file, self.model.config, workers)
            or self._held.of(workers),
        )

    @property
    def _n_needed(self) -> int:
        """Workers that a plan is made with: those asked for, then as many as had layers."""
        if self._has_served and self.plan is not None:
            return len(self.plan.stages)
        return self.settings.workers

    async def _serve(self, pipeline: Pipeline, scheduler: Scheduler) -> None:
        """Commit what has come back, fill the pipeline, sleep until something changes."""
        pipeline.traffic = self.traffic
        self.pipeline, self._scheduler = pipeline, scheduler
        self.figures.begin(len(pipeline.plan.stages))
        self.drift = Drift(self.planned.forecast) if self.planned is not None else None
        self.membership.fleet.note_ready([s.worker for s in pipeline.plan.stages], self.epoch)
        self._missing, self._has_served = "", True
        self._set_state(ServiceState.SERVING)
        while True:
            self._wake.clear()
            while (outcome := pipeline.take_result()) is not None:  # in the order of sending
                self._commit(scheduler.returned(), outcome)
            while pipeline.has_room and (batch := scheduler.next_batch()) is not None:
                self._start(batch)
                pipeline.send(batch)  # token ids go to the first stage; picks come from the last
            await self._wake.wait()

    def _start(self, batch: Batch) -> None:
        now = self.clock()
        for rows in batch.rows:
            self._answers[rows.session].start(now)

    def _commit(self, batch: Batch, outcome: Outcome) -> None:
        """Rows are done, picks are tokens, and a failure ends its own session only."""
        now = self.clock()
        errors = {failure.session: failure.error for failure in outcome.failures}
        picks: dict[SessionId, list[Picked]] = {}
        for picked in outcome.picks:
            picks.setdefault(picked.session, []).append(picked)
        whole_step = errors.pop(SessionId(0), None)
        n_tokens = 0
        for rows in batch.rows:
            stream = self._answers.get(rows.session)
            error = errors.pop(rows.session, whole_step)
            if stream is None:
                continue  # its person went away while the step was under way
            if error is None:
                try:
                    n_tokens += self._commit_rows(stream, rows, picks.get(rows.session, []), now)
                except PotluckError as wrong:
                    error = wrong
            if error is not None:
                self._end(stream, error)
        for session, error in errors.items():  # without rows in this step: their Open was refused
            if (stream := self._answers.get(session)) is not None:
                self._end(stream, error)
        self.figures.note_step(outcome.timings, is_decode=batch.is_decode)
        self.figures.note_answer(n_tokens, now)
        self._compare(batch, outcome)

    def _compare(self, batch: Batch, outcome: Outcome) -> None:
        """Measured with predicted; once there is a verdict, the log has it."""
        if self.drift is None or not batch.is_decode:
            return
        positions = sum(rows.start + len(rows.tokens) for rows in batch.rows)
        n_rows = sum(len(rows.tokens) for rows in batch.rows)
        if self.drift.note_step(outcome.timings, n_rows, positions):
            log.info("measured of predicted: %s", ", ".join(map(str, self.drift.verdict)))
            for line in self.drift.advice():
                log.warning("%s", line)

    def _commit_rows(
        self, stream: AnswerStream, rows: BatchRows, picks: Sequence[Picked], now: float
    ) -> int:
        """Commits rows of one session; how many tokens its answer grew by. Raises StepError."""
        session = stream.session
        session.advance(rows.start, len(rows.tokens))
        if rows.is_prompt:
            self.figures.prompt_tokens += len(rows.tokens)
            stream.note_prefill(now)
        if not rows.want_logits:
            return 0
        _check_picks(rows, picks, self.model.config.vocab)
        if n_scored := len(rows.scored_ids):
            stream.score([picked.pick for picked in picks[:n_scored]], now)
            if n_scored == len(picks):
                return 0
        n_before = session.n_answer
        stream.push(picks[-1].position, picks[-1].pick, now)
        if session.is_live:
            assert self._scheduler is not None, "only the serving loop commits"
            self._scheduler.make_ready(session.id)
        else:
            self._forget(session.id)
        return session.n_answer - n_before

    def submit(self, request: Request) -> AnswerStream:
        """Takes a request in. Raises Unreachable or StageLost without service, Full if refused."""
        if self._is_stopping:
            raise Unreachable("the coordinator is stopping")
        if self._scheduler is None:
            raise StageLost(self.detail(), remedy="`potluck status` shows what is missing")
        self._n_asked += 1
        session = Session(
            SessionId(self._n_asked),
            request.prompt,
            request.max_tokens,
            request.sampling,
            request.ends_at,
            request.scored_from,
        )
        decoder = self.model.tokenizer.decoder(continues=request.continues)
        text = AnswerText(decoder, request.stops)
        self._scheduler.add(session)
        stream = self._answers[session.id] = AnswerStream(session, text, self.clock())
        self._idle.clear()
        self._wake.set()
        return stream

    def give_up(self, stream: AnswerStream) -> None:
        """Its person is gone: freed in every stage by the next step. Twice is no error."""
        if stream.session.id in self._answers:
            self._end(stream, Unreachable("nobody waits for this answer"))

    def queue_place(self, stream: AnswerStream) -> int:
        """Place in the queue, from 1; 0: being served, or over."""
        return self._scheduler.queue_place(stream.session.id) if self._scheduler else 0

    def advice(self) -> tuple[str, ...]:
        """Lines for people about the newest plan: the planner's, then what was measured since."""
        planned = self.planned.advice if self.planned is not None else ()
        return (*planned, *(self.drift.advice() if self.drift is not None else ()))

    def spares(self) -> list[WorkerId]:
        """Workers that are here and hold nothing of the newest plan."""
        used = {stage.worker for stage in self.plan.stages} if self.plan is not None else set()
        return [worker.id for worker in self.membership.fleet.usable() if worker.id not in used]

    def load_counts(self) -> tuple[int, int]:
        """Sessions with a place, sessions in the queue."""
        s = self._scheduler
        return (s.n_sessions, s.n_waiting) if s else (0, 0)

    def detail(self) -> str:
        """One line for people: what is missing, or nothing."""
        if self.state is ServiceState.SERVING:
            return ""
        if self.state is ServiceState.LOADING:
            return "the workers are loading their layers"
        here = len(self.membership.fleet.usable())
        count = f"{here} of {self._n_needed} workers are here"
        return f"{self._missing}; {count}" if self._missing else count

    async def state_after(self, seen: ServiceState) -> ServiceState:
        """The state, as soon as it is another than `seen`."""
        while self.state is seen:
            await self._state_changed.wait()
        return self.state

    async def stop(self) -> None:
        """Refuses new requests, gives running ones a moment, then ends them with an error."""
        self._is_stopping = True
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._idle.wait()
        except TimeoutError:
            log.warning("ending %s running answers", len(self._answers))
        self._end_all(Unreachable("the coordinator is stopping"))

    def _limits(self, planned: Planned) -> Limits:
        n_stages = len(planned.plan.stages)
        chunk = self.settings.prefill_chunk or forecast.chunk_of(n_stages)
        return Limits(
            n_stages=n_stages,
            max_sessions=self.settings.max_sessions,
            queue=self.settings.queue,
            chunk_tokens=min(chunk, self.model.step_tokens),
            step_tokens=self.model.step_tokens,
            step_picks=picks_that_fit(self.model.config.vocab, options.LOGITS_BYTES),
            kv_tokens=planner.kv_tokens(planned.plan, self.model.sizes),
            spread=planned.forecast.spread(self.settings.max_sessions),
        )

    def _break(self, worker: WorkerId, why: str) -> None:
        """A worker broke away; if it is a stage, the pipeline is lost."""
        self._broken.add(worker)
        if self.pipeline is not None and self._span_of(worker):
            lost = StageLost(f"worker {worker} was lost: {why}", worker=worker)
            self.pipeline.lose(lost)

    def _note_loss(self, lost: StageLost) -> None:
        """Tells everyone whose answer is over, and has the worker register again."""
        worker = WorkerId(lost.worker)
        log.warning("%s", lost.message)
        self._missing = f"layers {self._span_of(worker)} are unserved: worker {worker} was lost"
        self._end_all(StageLost(self._missing, worker=worker, remedy="try again once it is back"))
        if worker not in self._broken:
            self.membership.lose(worker, lost.message)

    def _span_of(self, worker: WorkerId) -> str:
        """Its layers in the newest plan; empty if it has none."""
        stages = self.plan.stages if self.plan else ()
        return next((str(stage.span) for stage in stages if stage.worker == worker), "")

    def _end(self, stream: AnswerStream, error: PotluckError) -> None:
        log.info("session %s ended: %s", stream.session.id, error.message)
        stream.fail(error)
        self._forget(stream.session.id)

    def _end_all(self, error: PotluckError) -> None:
        for stream in list(self._answers.values()):
            self._end(stream, error)

    def _forget(self, session: SessionId) -> None:
        del self._answers[session]
        if self._scheduler is not None:
            self._scheduler.remove(session)
        if not self._answers:
            self._idle.set()
        self._wake.set()

    def _set_state(self, state: ServiceState) -> None:
        self.state = state
        self._state_changed.set()
        self._state_changed = asyncio.Event()


def _check_picks(rows: BatchRows, picks: Sequence[Picked], vocab: int) -> None:
    """Raises StepError unless there is one for each row that wanted it, of the known tokens."""
    first = rows.start + len(rows.tokens) - rows.want_logits + 1
    for i, token in enumerate(rows.scored_ids):
        picked = picks[i] if i < len(picks) else None
        if picked is None or (picked.position, picked.pick.token) != (first + i, token):
            raise StepError(
                f"session {rows.session} awaits the log-probability of position {first + i}",
                remedy="is the last stage's worker of an older release? update it",
            )
    if len(picks) != rows.want_logits or not 0 <= picks[-1].pick.token < vocab:
        raise StepError(f"session {rows.session} awaits a token of the vocabulary and got none")


def _shown(planned: Planned) -> str:
    """Stages, what they are expected to do, and who is left over."""
    stages, forecast = planned.plan.stages, planned.forecast
    spans = ", ".join(f"{stage.worker} {stage.span}" for stage in stages)
    alone, total = forecast.tokens_per_second(), forecast.tokens_per_second(len(stages))
    spares = f"; spare: {', '.join(planned.spares)}" if planned.spares else ""
    return f"{spans}; predicted {alone:.3g} tokens/s alone, {total:.3g} in all{spares}"
