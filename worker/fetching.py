"""Tensors from other machines to this one's store: several at a time, each whole and right.

A tensor that is cut off goes on where it was, from whoever has it. What is wrong is deleted and
fetched from another source, three times in all. Who does not answer is asked again after pauses,
until no byte has come from anybody for FETCH_AWAY_SECONDS. Belongs to the event loop; files are
hashed and written in threads of its own, one for each stream.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from typing import TypeVar

from potluck.errors import BeingWritten, DamagedTensor, Full, ModelError, PotluckError
from potluck.gguf import TensorInfo
from potluck.rpc import options
from potluck.tensor_store import RESERVE_BYTES, TensorStore
from potluck.tensor_writer import TensorWriter
from worker.sources import Away, Busy, NotHere, Source, Sources, next_message

log = logging.getLogger(__name__)

T = TypeVar("T")
WRONG_TRIES = 3
# Of tensors whose sums are asked for at a time: the next ones are hashed while these are fetched.
SLICE_BYTES = 2**27
WAIT_SECONDS = 2.0  # for another process, before it is looked at again
_EARLIER = "an earlier start"  # where the first bytes of a tensor are from that was cut off


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor that is needed here."""

    name: str
    sha256: bytes
    size_bytes: int


class Wrong(PotluckError):
    """A source sent something else than the tensor."""


class Fetching:
    """What one load brings. `fetched_bytes` counts what has come, right or not."""

    def __init__(
        self,
        store: TensorStore,
        sources: Sources,
        stack: AsyncExitStack | ExitStack,
        away_seconds: float | None = None,
    ) -> None:
        """Tensors that are used stay claimed in the store until `stack` is closed.

        `away_seconds`: in place of FETCH_AWAY_SECONDS.
        """
        self.fetched_bytes = 0
        self.by_source: Counter[str] = Counter()  # of `fetched_bytes`
        self.wanted_bytes = 0  # of all tensors, also those that are here
        self.left_bytes = 0  # that still have to come
        self._store = store
        self._sources = sources
        self._claim = ExitStack()  # of `_claimed`; one file, however many they become
        self._claimed = {bytes.fromhex(sources.header_sha256)}  # it is read again in the end
        stack.callback(lambda: self._claim.close())
        self._away_seconds = options.FETCH_AWAY_SECONDS if away_seconds is None else away_seconds
        self._loop = asyncio.get_running_loop()
        self._moved_at = self._loop.time()
        self._left: dict[bytes, int] = {}  # of `left_bytes`, by tensor
        self._why_away = ""

    async def sums(self, tensors: Sequence[TensorInfo]) -> list[bytes]:
        """Of these tensors in the coordinator's file. Raises ModelError."""
        return await self._patiently(lambda: self._sources.digests(tensors))

    async def header(self, size_bytes: int) -> bytes:
        """Of the model, whose file has `size_bytes`. Raises ModelError, DamagedTensor."""
        for left in reversed(range(WRONG_TRIES)):
            try:
                return await self._patiently(lambda: self._sources.header(size_bytes))
            except DamagedTensor as e:
                log.warning("%s", e.message)
                if not left:
                    raise
        raise AssertionError("the last try returns or raises")

    async def bring(self, tensors: Sequence[TensorInfo]) -> dict[str, bytes]:
        """All of these to the store; their sums by name.

        Raises ModelError: a source refuses, nobody answers, the disk fails; Full: it is full;
        DamagedTensor: only wrong bytes came.
        """
        self.left_bytes = sum(t.size_bytes for t in tensors)
        self.wanted_bytes += self.left_bytes
        sums: dict[str, bytes] = {}
        coming: asyncio.Queue[Wanted | None] = asyncio.Queue()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._ask(tensors, sums, coming), name="sums of tensors")
                for i in range(options.FETCH_STREAMS):
                    group.create_task(self._take(coming), name=f"fetching {i}")
        except* PotluckError as failed:
            first = failed.exceptions[0]
            assert isinstance(first, PotluckError), "the tasks raise no groups"
            raise first from first.__cause__
        except* OSError as failed:
            why = failed.exceptions[0]
            raise ModelError(f"{self._store.root}: {why}") from why
        return sums

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What the coordinator answers, asked again while it is away. Raises ModelError."""
        self._moved_at = self._loop.time()
        while True:
            coordinator = self._sources.coordinator
            try:
                answer = await ask()
            except Away as e:
                self._note_away(e)
                coordinator.rest(self._loop.time())
                await self._pause(coordinator.rests_until)
            else:
                coordinator.n_away = 0
                return answer

    async def _ask(
        self,
        tensors: Sequence[TensorInfo],
        sums: dict[str, bytes],
        coming: asyncio.Queue[Wanted | None],
    ) -> None:
        """Finds out the sums, and hands on what is not here."""
        held_back: list[Wanted] = []
        is_roomy = await asyncio.to_thread(self._is_roomy, self.left_bytes)
        for some in _slices(tensors):
            found = await self.sums(some)
            sums.update(zip((t.name for t in some), found, strict=True))
            await self._claim_too(found)
            missing = await asyncio.to_thread(self._missing, some, found)
            if missing:
                await self._sources.find([wanted.sha256 for wanted in missing])
            if not is_roomy:
                held_back += missing
                continue
            for wanted in missing:
                coming.put_nowait(wanted)
        if held_back:
            await asyncio.to_thread(self._make_room, held_back)
            for wanted in held_back:
                coming.put_nowait(wanted)
        coming.put_nowait(None)

    async def _claim_too(self, sums: Sequence[bytes]) -> None:
        """The new claim, of all, is there before the old one goes."""
        self._claimed.update(sums)
        claim = ExitStack()
        await asyncio.to_thread(claim.enter_context, self._store.claimed(self._claimed))
        before, self._claim = self._claim, claim
        before.close()

    async def _take(self, coming: asyncio.Queue[Wanted | None]) -> None:
        """One stream: tensor after tensor."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        try:
            while (wanted := await coming.get()) is not None:
                await self._bring(wanted, thread)
            coming.put_nowait(None)  # for the others
        finally:  # it may be hashing what an earlier start has left; the loop does not wait for it
            await asyncio.shield(asyncio.to_thread(thread.shutdown))

    def _missing(self, tensors: Sequence[TensorInfo], sums: Sequence[bytes]) -> list[Wanted]:
        """What is not in the store, each sum once; notes how much of it is left."""
        missing: dict[bytes, Wanted] = {}
        for tensor, sha256 in zip(tensors, sums, strict=True):
            if sha256 in self._left or self._store.has(sha256, tensor.size_bytes):
                self.left_bytes -= tensor.size_bytes
                continue
            missing[sha256] = Wanted(tensor.name, sha256, tensor.size_bytes)
            partial = min(tensor.size_bytes, self._store.partial_bytes(sha256))
            self._left[sha256] = tensor.size_bytes - partial
            self.left_bytes -= partial
        return list(missing.values())

    def _is_roomy(self, n_bytes: int) -> bool:
        """Whether so much finds room without anything being removed for it."""
        store = self._store
        if store.space_bytes is not None and store.total_bytes() + n_bytes > store.space_bytes:
            return False
        return not store.make_room(0) and _free_bytes(store) >= n_bytes + RESERVE_BYTES

    def _make_room(self, missing: Sequence[Wanted]) -> None:
        n_bytes = sum(self._left[wanted.sha256] for wanted in missing)
        if why := self._store.make_room(n_bytes, keep=self._claimed):
            raise Full(
                f"{len(missing)} tensors need {n_bytes / 1e9:.3g} GB in {self._store.root}: {why}",
                remedy="free some space there, allow more by --tensor-space, or set POTLUCK_CACHE",
            )

    async def _bring(self, wanted: Wanted, thread: ThreadPoolExecutor) -> None:
        """One tensor, from as many sources as it takes."""
        blamed: Counter[str] = Counter()
        senders = {_EARLIER} if self._left[wanted.sha256] < wanted.size_bytes else set()
        n_wrong = 0
        while True:
            source = await self._source(wanted, blamed)
            source.n_streams += 1
            try:
                await self._from(source, wanted, thread, senders)
                source.n_away = 0
                return
            except Away as e:
                log.info("%s: %s", wanted.name, e.message)
                self._note_away(e)
                source.rest(self._loop.time())
            except NotHere as e:
                log.info("%s: %s", wanted.name, e.message)
                source.sums.discard(wanted.sha256)
            except BeingWritten:
                if await self._written_by_another(wanted):
                    return
            except (Wrong, DamagedTensor) as e:
                n_wrong += 1
                blamed.update(senders)
                source.n_wrong += senders == {source.name}
                by = ", ".join(sorted(senders))
                log.warning("tensor %s from %s: %s", wanted.name, by, e.message)
                # Once may be for what others had sent of it before.
                if n_wrong >= WRONG_TRIES and blamed[self._sources.coordinator.name] > 1:
                    raise DamagedTensor(
                        f"tensor {wanted.name} came wrong {n_wrong} times, from"
                        f" {', '.join(sorted(blamed))}: {e.message}",
                        remedy="nothing of it was loaded; is a disk or a memory damaged there?",
                    ) from e
                if isinstance(e, DamagedTensor):  # the store has deleted it
                    self._set_left(wanted, wanted.size_bytes)
                    senders.clear()
            finally:
                source.n_streams -= 1

    async def _source(self, wanted: Wanted, blamed: Counter[str]) -> Source:
        """Whom to ask, when one of those that have it has rested. Raises ModelError."""
        while True:
            now = self._loop.time()
            source = self._sources.choose(wanted.sha256, blamed, now)
            if source is not None:
                return source
            await self._pause(self._sources.next_at(wanted.sha256))

    async def _pause(self, until: float) -> None:
        """Raises ModelError if nothing has come from anybody for too long."""
        self._check_silence()
        await asyncio.sleep(max(0.0, until - self._loop.time()))

    def _note_away(self, why: Away) -> None:
        self._why_away = why.message
        if isinstance(why, Busy):  # its bytes go to others meanwhile; that is no silence
            self._moved_at = self._loop.time()

    def _check_silence(self) -> None:
        silent = self._loop.time() - self._moved_at
        if silent > self._away_seconds:
            raise ModelError(
                f"{self.left_bytes / 1e9:.3g} GB of weights are missing, and nothing has come for"
                f" {silent:.0f} s from {self._sources.names}: {self._why_away}",
                remedy="what has come is kept; load again when the coordinator can be reached",
            )

    async def _from(
        self, source: Source, wanted: Wanted, thread: ThreadPoolExecutor, senders: set[str]
    ) -> None:
        """What is left of one tensor, from one source, in the store in the end.

        Raises Away, NotHere, Wrong, BeingWritten, DamagedTensor, ModelError. Whatever ends it, what
        came is kept, and `thread` is through with the file.
        """
        run = self._loop.run_in_executor
        opening = run(thread, self._store.writer, wanted.sha256, wanted.size_bytes)
        try:
            writer = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unused)
            raise
        try:
            self._set_left(wanted, wanted.size_bytes - writer.offset)
            if writer.offset < wanted.size_bytes:
                await self._receive(source, wanted, writer, thread, senders)
            await run(thread, writer.finish)
        finally:
            # Behind whatever is still being written; also if we are cancelled once more.
            closing = run(thread, writer.__exit__, None, None, None)
            await asyncio.shield(closing)

    async def _receive(
        self,
        source: Source,
        wanted: Wanted,
        writer: TensorWriter,
        thread: ThreadPoolExecutor,
        senders: set[str],
    ) -> None:
        """Writes one message while the next one comes. Raises like `_from`."""
        call = source.fetch(sha256=wanted.sha256, offset_bytes=writer.offset)
        writing: asyncio.Future[None] | None = None
        stop_at, since = self._loop.time() + options.FETCH_STALL_SECONDS, 0
        try:
            while True:
                part = await next_message(source, call, stop_at)
                if writing is not None:
                    asked_at = self._loop.time()
                    await writing
                    stop_at += self._loop.time() - asked_at  # the disk's time is not the source's
                if part is None:
                    break
                senders.add(source.name)
                self.by_source[source.name] += len(part.data)
                n_bytes = len(part.data)
                since += n_bytes
                if since >= options.FETCH_LEAST_BYTES:
                    stop_at, since = self._loop.time() + options.FETCH_STALL_SECONDS, 0
                writing = self._loop.run_in_executor(thread, writer.write, part.data)
                self._came(wanted, n_bytes)
                if self._left[wanted.sha256] <= 0:
                    await writing
                    return
            left = self._left[wanted.sha256]
            raise Wrong(f"it ended {left:,} bytes before the end")
        finally:
            call.cancel()

    async def _written_by_another(self, wanted: Wanted) -> bool:
        """Waits while another process fetches this tensor into the same store; whether it did."""
        sha256, size_bytes = wanted.sha256, wanted.size_bytes
        self._set_left(wanted, size_bytes - self._store.partial_bytes(sha256))
        is_here = await asyncio.to_thread(self._store.wait_for, sha256, size_bytes, WAIT_SECONDS)
        if is_here:
            self._set_left(wanted, 0)
        self._check_silence()
        return is_here

    def _came(self, wanted: Wanted, n_bytes: int) -> None:
        self.fetched_bytes += n_bytes
        self._set_left(wanted, self._left[wanted.sha256] - n_bytes)

    def _set_left(self, wanted: Wanted, n_bytes: int) -> None:
        """Notes how much of a tensor has to come yet."""
        before = self._left[wanted.sha256]
        if n_bytes < before:
            self._moved_at = self._loop.time()
        self._left[wanted.sha256] = n_bytes
        self.left_bytes += n_bytes - before


def _close_unused(opening: asyncio.Future[TensorWriter]) -> None:
    """Of a writer that nobody waited for: its lock would bind this process for ever."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().__exit__(None, None, None)


def _slices(tensors: Sequence[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """In their order, each of SLICE_BYTES or a little more."""
    some: list[TensorInfo] = []
    for tensor in tensors:
        some.append(tensor)
        if sum(t.size_bytes for t in some) >= SLICE_BYTES:
            yield some
            some = []
    if some:
        yield some


def _free_bytes(store: TensorStore) -> int:
    return shutil.disk_usage(store.root).free
