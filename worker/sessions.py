"""What of a step a stage runs: each session's length, room, floor and tokens.

Pure: no clock, no engine, no asyncio. Commands take effect when they are decided, rows when
`confirm` says that they were computed. Owned by worker/stage.py, in its event loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from potluck.errors import Full, UsageError
from potluck.rpc.options import LOGITS_BYTES
from potluck.rpc.v1 import types_pb2, worker_pb2
from potluck.sampling import Sampling, from_message
from worker.kv import KvBudget, KvLedger

_GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class RowsWork:
    """Rows of one session that are to be run."""

    session: int
    start: int  # position of the first token
    n_tokens: int
    want_logits: int
    place: int  # index in Step.rows
    first_row: int  # index in the step's batch as it arrived
    sampling: Sampling
    tokens: npt.NDArray[np.int32]  # last stage: ids at positions [0, start + n_tokens); else empty
    scored_ids: tuple[int, ...] = ()  # of the first that want logits the tokens that follow


@dataclass(slots=True)
class StepWork:
    """What is to be run of a step."""

    n_rows: int  # tokens of the batch as it arrived
    commands: list[types_pb2.KvCommand] = field(default_factory=list)
    rows: list[RowsWork] = field(default_factory=list)
    failures: list[types_pb2.Failure] = field(default_factory=list)
    n_stale: int = 0  # rows left out because their session was flushed


@dataclass(frozen=True, slots=True)
class StageLimits:
    """What every session must keep to."""

    vocab: int
    context_tokens: int
    has_head: bool  # then token timelines are kept, for penalties


@dataclass(slots=True)
class _Session:
    """`tokens` [room] on the last stage, [0] elsewhere; ids at or above `length` mean nothing."""

    room_tokens: int
    tokens: npt.NDArray[np.int32]
    floor: int  # rows of steps with a lower epoch are stale
    length: int = 0


class Sessions:
    """The sessions of one stage. Failures name `worker`."""

    def __init__(self, worker: str, limits: StageLimits, budget: KvBudget) -> None:
        self._worker = worker
        self._limits = limits
        self._ledger = KvLedger(budget)
        self._sessions: dict[int, _Session] = {}
        self._floor = 0  # of all sessions, also of those to come

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def kv_used_bytes(self) -> int:
        """Reserved, whether written or not."""
        return self._ledger.used_bytes

    def length(self, session: int) -> int | None:
        """Positions of a session; None if it is not open."""
        found = self._sessions.get(session)
        return found.length if found else None

    def raise_floor(self, epoch: int, sessions: Iterable[int] = ()) -> None:
        """Rows of steps below `epoch` are stale, of these sessions or, if none is named, of all."""
        named = list(sessions)
        for session in named:
            if found := self._sessions.get(session):
                found.floor = max(found.floor, epoch)
        if not named:
            self._floor = max(self._floor, epoch)

    def is_stale(self, session: int, epoch: int) -> bool:
        """Whether rows of this session are left out of a step of this epoch.

        It only looks: the engine thread may ask too.
        """
        found = self._sessions.get(session)
        return epoch < max(self._floor, found.floor if found else 0)

    def decide(self, step: worker_pb2.Step) -> StepWork:
        """Commands and rows that can be run, and a failure for each session whose can't."""
        work = StepWork(n_rows=sum(len(rows.token_ids) for rows in step.rows))
        failed: set[int] = set()
        for command in step.commands:
            failure = self._apply(command)
            if failure is None:
                work.commands.append(command)
            else:
                failed.add(failure.session)
                work.failures.append(failure)
        first_row, n_logits, seen = 0, 0, set[int]()
        most_logits = max(1, LOGITS_BYTES // (4 * self._limits.vocab))
        for place, rows in enumerate(step.rows):
            session, n_tokens = rows.session, len(rows.token_ids)
            if self.is_stale(session, step.epoch):
                work.n_stale += n_tokens
            elif session not in failed:
                n_logits += rows.want_logits
                refusal = self._refusal(rows, n_tokens)
                if session in seen:
                    refusal = _invalid(f"session {session} stands twice in one step")
                elif n_logits > most_logits:
                    full = f"{n_logits} logits wanted in one step, at most {most_logits}"
                    refusal = types_pb2.FAILURE_CODE_FULL, full
                taken = refusal or self._take(rows, n_tokens, place, first_row)
                if isinstance(taken, RowsWork):
                    work.rows.append(taken)
                else:
                    failed.add(session)
                    work.failures.append(self._failure(session, *taken))
            seen.add(session)
            first_row += n_tokens
        return work

    def confirm(self, rows: Iterable[RowsWork]) -> None:
        """These rows have been computed: their sessions end after them now."""
        for done in rows:
            if found := self._sessions.get(done.session):
                found.length = done.start + done.n_tokens

    def forget(self, session: int) -> None:
        """Closes a session: the coordinator asks for it, or the engine refused it."""
        self._sessions.pop(session, None)
        self._ledger.release(session)

    def clear(self) -> list[int]:
        """Closes all sessions and names them."""
        closed = list(self._sessions)
        for session in closed:
            self.forget(session)
        return closed

    def _refusal(self, rows: types_pb2.Rows, n_tokens: int) -> _Refusal | None:
        """Why these rows can't be run, from what the session is; None if they can."""
        session, start = rows.session, rows.start_position
        if n_tokens == 0 or rows.want_logits > n_tokens:
            return _invalid(f"session {session}: {rows.want_logits} logits of {n_tokens} tokens")
        if len(rows.scored_ids) > rows.want_logits:
            counts = f"{len(rows.scored_ids)} tokens to score, {rows.want_logits} logits wanted"
            return _invalid(f"session {session}: {counts}")
        if (largest := max([*rows.token_ids, *rows.scored_ids])) >= self._limits.vocab:
            ids = f"ids are 0 to {self._limits.vocab - 1}"
            return _invalid(f"session {session}: token {largest}, {ids}")
        found = self._sessions.get(session)
        if found is None:
            unknown = f"session {session} is not open here"
            return types_pb2.FAILURE_CODE_UNKNOWN_SESSION, unknown
        if start > found.length:
            at = f"session {session} is at position {found.length} and this step starts at {start}"
            return types_pb2.FAILURE_CODE_POSITION, f"{at}; it must not skip"
        if start + n_tokens > found.room_tokens:
            room = f"session {session} has room for {found.room_tokens} positions"
            return types_pb2.FAILURE_CODE_POSITION, f"{room}, this step ends at {start + n_tokens}"
        return None

    def _take(
        self, rows: types_pb2.Rows, n_tokens: int, place: int, first_row: int
    ) -> RowsWork | _Refusal:
        """Rows that passed `_refusal`, with the tokens before them and their sampling."""
        session, start, stop = rows.session, rows.start_position, rows.start_position + n_tokens
        sampling = _GREEDY
        tokens = self._sessions[session].tokens
        if self._limits.has_head:
            if rows.want_logits and rows.HasField("sampling"):
                try:
                    sampling = from_message(rows.sampling)
                except UsageError as e:
                    return _invalid(f"session {session}: {e.message}")
            tokens[start:stop] = rows.token_ids
            tokens = tokens[:stop]
        want, scored = rows.want_logits, tuple(rows.scored_ids)
        return RowsWork(session, start, n_tokens, want, place, first_row, sampling, tokens, scored)

    def _apply(self, command: types_pb2.KvCommand) -> types_pb2.Failure | None:
        """Does a command; a failure if it can't be done, and then nothing has changed."""
        match command.WhichOneof("command"):
            case "open":
                return self._open(command.open.session, command.open.max_tokens)
            case "fork":
                return self._fork(command.fork)
            case "truncate":
                session = command.truncate.session
                if (found := self._sessions.get(session)) is None:
                    unknown = f"session {session} is not open here"
                    return self._failure(session, types_pb2.FAILURE_CODE_UNKNOWN_SESSION, unknown)
                found.length = min(found.length, command.truncate.position)
                return None
            case "close":
                self.forget(command.close.session)
                return None
            case _:
                return self._failure(0, *_invalid("a KV command that this version does not know"))

    def _open(self, session: int, max_tokens: int) -> types_pb2.Failure | None:
        context = self._limits.context_tokens
        if session == 0 or max_tokens == 0:
            wanted = f"session {session} for {max_tokens} positions: both are counted from 1"
            return self._failure(session, *_invalid(wanted))
        if session in self._sessions:
            return self._failure(session, *_invalid(f"session {session} is open already"))
        if max_tokens > context:
            long = f"session {session} wants {max_tokens} positions, the context is {context}"
            return self._failure(session, types_pb2.FAILURE_CODE_POSITION, long)
        try:
            self._ledger.reserve(session, max_tokens)
        except Full as e:
            return self._failure(session, types_pb2.FAILURE_CODE_FULL, e.message)
        kept = max_tokens if self._limits.has_head else 0
        self._sessions[session] = _Session(max_tokens, np.zeros(kept, np.int32), self._floor)
        return None

    def _fork(self, fork: types_pb2.KvCommand.Fork) -> types_pb2.Failure | None:
        session, new = fork.session, fork.new_session
        if (origin := self._sessions.get(session)) is None:
            unknown = f"session {session} is not open here"
            return self._failure(new, types_pb2.FAILURE_CODE_UNKNOWN_SESSION, unknown)
        if fork.max_tokens < origin.length:
            short = f"session {session} has {origin.length} positions, {fork.max_tokens} are room"
            return self._failure(new, types_pb2.FAILURE_CODE_POSITION, f"{short} for its fork")
        if failure := self._open(new, fork.max_tokens):
            return failure
        added = self._sessions[new]
        added.length, added.floor = origin.length, origin.floor
        n_kept = min(origin.length, len(origin.tokens))
        added.tokens[:n_kept] = origin.tokens[:n_kept]
        return None

    def _failure(
        self, session: int, code: types_pb2.FailureCode.ValueType, message: str
    ) -> types_pb2.Failure:
        return types_pb2.Failure(code=code, worker=self._worker, session=session, message=message)


_Refusal = tuple[types_pb2.FailureCode.ValueType, str]


def _invalid(message: str) -> _Refusal:
    return types_pb2.FAILURE_CODE_INVALID, message
