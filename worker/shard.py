"""The weights of a span at work: finds and loads them, and runs what is decided of a step.

Owns the engine's Shard. All methods but `cancel` and `progress` belong to one thread, the engine
thread, which runs nothing else; they block. The event loop hands work over and reads the figures.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from potluck import catalogue, engine, model, sampling, synthetic
from potluck.errors import (
    Cancelled,
    DamagedPack,
    DamagedTensor,
    FrameError,
    Full,
    ModelError,
    PotluckError,
    SessionError,
    UnknownModel,
    UnknownSession,
    UsageError,
)
from potluck.gguf import GgufFile
from potluck.model import SCRATCH_BYTES, KvType, ModelConfig
from potluck.packs import MappedWeights, PackFolder, unit_bytes
from potluck.plan import Span
from potluck.rpc import status
from potluck.rpc.v1 import types_pb2
from potluck.sampling import Pick
from potluck.wire import Hidden
from worker.late_tensors import LateTensors
from worker.sessions import RowsWork, StepWork

log = logging.getLogger(__name__)

_SAME_VERSION = "run the same version of potluck on both machines"
_NAMED_SESSION = re.compile(r"\bsession (\d+)\b")


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is asked to load; equal orders give equal shards."""

    model_name: str
    model_path: str  # on the coordinator's machine, and perhaps here
    header_sha256: str
    span: Span
    embeds: bool
    has_head: bool
    context_tokens: int
    kv_bytes: int
    max_sessions: int
    kv_type: KvType = KvType.F16
    modified_ns: int = 0  # of the coordinator's file; 0: unknown


@dataclass(slots=True)
class StepOutput:
    """What the engine made of a step. Rows stand in the step's order."""

    rows: list[RowsWork] = field(default_factory=list)  # computed
    hidden: Hidden | None = None  # [their tokens, dim], reused by the next step; last stage: None
    picks: list[list[Pick]] = field(default_factory=list)  # last stage: per rows, want_logits each
    failures: list[types_pb2.Failure] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)  # sessions that the engine could not open
    started_at: float = 0.0  # time.perf_counter()
    compute_seconds: float = 0.0  # from there to the last pick


def find(order: Order) -> tuple[GgufFile, ModelConfig]:
    """The model's file on this machine: at the coordinator's path, else in the cache by name.

    A synthetic model needs none. Raises ModelError: neither is here, or another one is.
    """
    other: ModelError | None = None
    for place in (order.model_path, order.model_name):
        try:
            file = catalogue.open_model(place)
        except (UnknownModel, UsageError):
            continue
        if file.header_sha256 == order.header_sha256:
            return file, model.config_of(file)
        found, meant = file.header_sha256[:12], order.header_sha256[:12]
        other = ModelError(
            f"{file.path} is not the coordinator's model: header sha256 {found}..., not {meant}...",
            remedy="bring the same file to both machines"
            if file.synthetic is None
            else _SAME_VERSION,
        )
    if other is not None:
        raise other
    # Not UnknownModel: for the caller it is this worker that lacks something.
    if synthetic.is_synthetic(order.model_name):
        raise ModelError(f"this worker does not know {order.model_name}", remedy=_SAME_VERSION)
    raise ModelError(
        f"{order.model_name} is not on this worker's machine: neither {order.model_path} nor in"
        f" {catalogue.models_folder()}",
        remedy=f"run `potluck pull {order.model_name}` there, or copy the file",
    )


def check(order: Order, config: ModelConfig) -> None:
    """Raises UsageError for an order that does not fit the model."""
    span = order.span
    if span.stop > config.n_layers:
        raise UsageError(f"span {span}: the model has {config.n_layers} layers")
    ends = (span.start == 0, span.stop == config.n_layers)
    if (order.embeds, order.has_head) != ends:
        raise UsageError(
            f"span {span} of {config.n_layers} layers: only the first embeds, only the last has"
            " the head"
        )
    if not 1 <= order.context_tokens <= config.context_tokens:
        most = config.context_tokens
        raise UsageError(f"context_tokens: 1 to {most}, not {order.context_tokens}")


class Shard:
    """One span: made, loaded, run, freed, in this order. `packs` None: weights in memory only.

    `late` brings delivered tensors that packs have to be made of.
    """

    def __init__(
        self,
        engine_: engine.Engine,
        worker: str,
        order: Order,
        file: GgufFile,
        config: ModelConfig,
        packs: PackFolder | None = None,
        late: LateTensors | None = None,
    ) -> None:
        self.order = order
        self.config = config
        self.file = file
        self.bytes_per_token = model.kv_bytes_per_token(config, order.span, order.kv_type)
        self.tensors = model.span_tensors(
            file, config, order.span, embeds=order.embeds, has_head=order.has_head
        )
        self.weights_bytes = sum(tensor.size_bytes for tensor in self.tensors)  # as in the file
        self._engine = engine_
        self._worker = worker
        # Kept here: the engine's own properties wait while a step is in it.
        self.shard_bytes = 0  # of packed weights
        self.mapped_bytes = 0  # of these, on disk
        self.kv_bytes = 0  # budget, in whole pages
        self.late = late
        self._packs = packs
        self._mapped: MappedWeights | None = None
        self._shard: engine.Shard | None = None
        self._buffer: npt.NDArray[np.float32] = np.empty(0, np.float32)

    def check_memory(self, free_bytes: int, room_bytes: int) -> int:
        """How much of mapped weights may stay in memory.

        Raises Full if weights and KV are more than `free_bytes`, or what must be in memory of
        mapped ones is more than `room_bytes`.
        """
        order = self.order
        needed = self.weights_bytes + order.kv_bytes
        if needed > free_bytes:
            parts = f"weights {_gib(self.weights_bytes)}, KV {_gib(order.kv_bytes)}"
            raise Full(
                f"layers {order.span} need {_gib(needed)} GiB ({parts}),"
                f" {_gib(free_bytes)} GiB are free",
                remedy="add a worker, lower --context, or give this one more --memory",
            )
        resident_bytes = room_bytes - order.kv_bytes - SCRATCH_BYTES
        least = model.passing_bytes(unit_bytes(self.tensors))
        if self._packs is not None and resident_bytes < least:
            raise Full(
                f"{_gib(room_bytes)} GiB of memory are free: too little for KV"
                f" ({_gib(order.kv_bytes)} GiB), buffers ({_gib(SCRATCH_BYTES)} GiB) and two layers"
                f" at a time ({_gib(least)} GiB)",
                remedy="lower --context or --max-sessions, or free some memory",
            )
        return resident_bytes

    def load(self, on_progress: Callable[[int, str], None], resident_bytes: int) -> None:
        """Reads the weights; on_progress gets bytes done and the matrix just read, and may raise.
        Of mapped ones `resident_bytes` may stay in memory.

        Raises ModelError.
        """
        order = self.order
        shard = engine.Shard(
            self._engine,
            engine.config_for(self.config),
            order.span.start,
            order.span.stop,
            embeds=order.embeds,
            has_head=order.has_head,
            kv_bytes=order.kv_bytes,
            max_sessions=order.max_sessions,
            kv_type=order.kv_type.value,
        )
        self._shard = shard  # its progress is asked for meanwhile
        if self._packs is None:
            self._read(shard, on_progress)
        else:
            self._map(shard, self._packs, on_progress, resident_bytes)
            if shard.n_streamed:
                log.info("%d layers do not fit and are read in every step", shard.n_streamed)
        self.shard_bytes, self.kv_bytes = shard.shard_bytes, shard.kv_bytes
        self.mapped_bytes = shard.mapped_bytes

    def _read(self, shard: engine.Shard, on_progress: Callable[[int, str], None]) -> None:
        tensors = iter(self.tensors)  # told of in this order
        engine.load(
            shard, self.file, self.tensors, lambda done: on_progress(done, next(tensors).name)
        )

    def _map(
        self,
        shard: engine.Shard,
        packs: PackFolder,
        on_progress: Callable[[int, str], None],
        resident_bytes: int,
    ) -> None:
        late = self.late
        if late is None or self.file.stored is None:
            self._mapped = MappedWeights(shard, self.file, self.tensors, packs)
            self._mapped.load(on_progress, resident_bytes)
            return
        self._mapped = MappedWeights(shard, self.file, self.tensors, packs, late.bring)
        try:
            self._mapped.load(on_progress, resident_bytes)
            late.end_loading()
        finally:
            late.release()

    def run(
        self,
        work: StepWork,
        input_: Hidden | npt.NDArray[np.int32],
        is_stale: Callable[[int], bool],
    ) -> StepOutput:
        """Commands, then rows, then picks. `input_` is f32 [n_rows, dim], or int32 [n_rows] ids.

        `is_stale` is asked for each session, again when a flush has stopped the engine. Rows that
        fail are left out and named, the others run; a value that is not finite fails the whole
        step.
        """
        output = StepOutput()
        self._command(work, output)
        rows = [
            row
            for row in work.rows
            if row.session not in output.closed and not is_stale(row.session)
        ]
        output.started_at = time.perf_counter()
        while rows:
            try:
                self._forward(work, rows, input_, output)
                break
            except Cancelled:
                rows = [row for row in rows if not is_stale(row.session)]
            except DamagedPack:
                rows = [row for row in self._repair(rows, output) if not is_stale(row.session)]
            except (SessionError, UsageError) as e:
                guilty = self._guilty(rows, e)
                output.failures.append(self._failure(guilty, e))
                rows = [row for row in rows if guilty not in (0, row.session)]
            except FrameError as e:
                failure = self._failure(0, e)
                failure.code = types_pb2.FAILURE_CODE_NOT_FINITE
                output.failures.append(failure)
                rows = []
        output.compute_seconds = time.perf_counter() - output.started_at
        return output

    def _repair(self, rows: list[RowsWork], output: StepOutput) -> list[RowsWork]:
        """Makes damaged packs again; the rows to run then, which are none if that fails."""
        assert self._mapped is not None, "only mapped weights are in packs"
        try:
            try:
                self._mapped.repair()
            except DamagedTensor as e:  # it is gone, and fetched now if anybody has it
                log.warning("%s", e.message)
                self._mapped.repair()
        except PotluckError as e:
            log.warning("%s", e.message)
            output.failures.append(self._failure(0, e))
            return []
        finally:
            if self.late is not None:
                self.late.release()
        return rows

    def close(self, sessions: list[int]) -> None:
        """Frees the pages of these sessions."""
        for session in sessions:
            self._loaded.close(session)

    def free(self) -> None:
        """Gives weights and KV back to the system, whoever still knows this object."""
        self._shard = self._mapped = None
        self._buffer = np.empty(0, np.float32)
        self.shard_bytes = self.mapped_bytes = self.kv_bytes = 0

    def cancel(self) -> None:
        """Stops a running forward between two layers. Any thread."""
        if (shard := self._shard) is not None:
            shard.cancel()

    @property
    def progress(self) -> int:
        """Phases finished and pieces loaded. Any thread."""
        return shard.progress if (shard := self._shard) is not None else 0

    @property
    def _loaded(self) -> engine.Shard:
        assert self._shard is not None, "load comes first"
        return self._shard

    def _command(self, work: StepWork, output: StepOutput) -> None:
        """Does what was decided. The engine agrees; if it does not, the session is closed."""
        shard = self._loaded
        for command in work.commands:
            session = 0
            try:
                match command.WhichOneof("command"):
                    case "open":
                        session = command.open.session
                        shard.open(session, command.open.max_tokens)
                    case "truncate":
                        session = command.truncate.session
                        shard.truncate(session, command.truncate.position)
                    case "fork":
                        session = command.fork.new_session
                        fork = command.fork
                        shard.fork(fork.session, fork.new_session, fork.max_tokens)
                    case "close":
                        shard.close(command.close.session)
            except (SessionError, UsageError) as e:
                log.warning("the engine refused what was admitted: %s", e.message)
                output.failures.append(self._failure(session, e))
                output.closed.append(session)
                shard.close(session)

    def _forward(
        self,
        work: StepWork,
        rows: list[RowsWork],
        input_: Hidden | npt.NDArray[np.int32],
        output: StepOutput,
    ) -> None:
        """Runs `rows` and puts them and their results into `output`, or raises and changes none."""
        n_rows = sum(row.n_tokens for row in rows)
        if n_rows != work.n_rows:
            kept = [np.arange(r.first_row, r.first_row + r.n_tokens) for r in rows]
            input_ = input_[np.concatenate(kept)]
        spans = [engine.RowSpan(r.session, r.start, r.n_tokens, r.want_logits) for r in rows]
        if not self.order.has_head:
            result = self._output(n_rows, self.config.dim)
            self._loaded.forward(input_.data, spans, result.data)
            output.hidden = result
        else:
            result = self._output(sum(r.want_logits for r in rows), self.config.vocab)
            self._loaded.forward(input_.data, spans, result.data)
            self._pick(rows, result, output)
        output.rows = rows

    def _pick(
        self, rows: list[RowsWork], logits: npt.NDArray[np.float32], output: StepOutput
    ) -> None:
        """Tokens for each row that wanted logits [sum of want_logits, vocab]; known ones first."""
        at = 0
        for row in rows:
            first = row.start + row.n_tokens - row.want_logits + 1  # position of the first pick
            picks: list[Pick] = []
            try:
                for i, token in enumerate(row.scored_ids):
                    known = sampling.score(logits[at + i], token, row.sampling, first + i, engine)
                    picks.append(known)
                for position in range(first + len(picks), first + row.want_logits):
                    wanted = logits[at + position - first]
                    before = row.tokens[:position]
                    picks.append(sampling.pick(wanted, row.sampling, position, before, engine))
            except PotluckError as e:
                picks = []
                output.failures.append(self._failure(row.session, e))
            output.picks.append(picks)
            at += row.want_logits

    def _output(self, rows: int, cols: int) -> npt.NDArray[np.float32]:
        """A piece of one lasting buffer: fresh ones would cost a page fault every 4 KiB."""
        if self._buffer.size < rows * cols:
            self._buffer = np.empty(rows * cols, np.float32)
        return self._buffer[: rows * cols].reshape(rows, cols)

    def _guilty(self, rows: list[RowsWork], error: PotluckError) -> int:
        """The session of `rows` whose fault an error of the engine is; 0: nobody's or all's."""
        for row in rows:
            try:
                if self._loaded.length(row.session) < row.start:
                    return row.session
            except UnknownSession:
                return row.session
        named = _NAMED_SESSION.search(error.message)
        session = int(named[1]) if named else 0
        return session if any(row.session == session for row in rows) else 0

    def _failure(self, session: int, error: PotluckError) -> types_pb2.Failure:
        return types_pb2.Failure(
            code=status.failure_code_of(error),
            worker=self._worker,
            session=session,
            message=error.message,
        )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f}" if n_bytes >= 2**30 / 10 else f"{n_bytes / 2**30:.3f}"
