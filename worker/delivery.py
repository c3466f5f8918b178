"""How the weights of a load get to this machine: what is here is used, what is missing is fetched.

In this order: a synthetic model needs nothing; the coordinator's own file, if this machine has the
same; another file with the same header, if the sha256 of the span's tensors is right; the store of
delivered tensors; other workers and the coordinator. Belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from potluck import catalogue, gguf, model, synthetic
from potluck.errors import ModelError
from potluck.gguf import GgufFile, TensorInfo
from potluck.manifest import Manifest
from potluck.model import ModelConfig
from potluck.rope import DIVISORS
from potluck.rpc import options
from potluck.rpc.v1 import worker_pb2
from potluck.tensor_store import TensorStore
from worker.fetching import Fetching
from worker.shard import Order, check, find
from worker.sources import open_sources
from worker.weights import OwnFiles

log = logging.getLogger(__name__)

NEWS_SECONDS = 0.5  # between two messages while bytes come
COPY_BYTES = 2**20  # at a time, of a tensor that another file of this machine has
HASHERS = 2  # tensors of an own file that are hashed at a time


class Delivery:
    """The weights of one load. `file` and `config` are there when `bring` has ended.

    The tensors stay claimed until `stack` is closed, which belongs to the caller.
    """

    def __init__(
        self,
        order: Order,
        request: worker_pb2.LoadRequest,
        own_name: str,
        store: TensorStore,
        own_files: OwnFiles,
        stack: contextlib.AsyncExitStack,
        *,
        makes_packs: bool = False,
    ) -> None:
        """makes_packs: tensors are not fetched, only named: who makes packs of them does that."""
        self._order = order
        self._request = request
        self._own_name = own_name
        self._store = store
        self._own_files = own_files
        self._stack = stack
        self._makes_packs = makes_packs
        self._fetching: Fetching | None = None
        self._before_bytes = 0  # fetched by earlier calls of `bring`
        self._arrived: tuple[GgufFile, ModelConfig] | None = None

    @property
    def file(self) -> GgufFile:
        """Its tensors of the span are here, or known by their sums."""
        return self._found[0]

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self._found[1]

    @property
    def fetched_bytes(self) -> int:
        """That came from other machines."""
        return self._before_bytes + (self._fetching.fetched_bytes if self._fetching else 0)

    async def bring(self) -> AsyncGenerator[worker_pb2.LoadProgress, None]:
        """Says how far it is. Raises ModelError, Full, UsageError. Left early, it stops at once."""
        bringing = asyncio.create_task(self._bring(), name="delivery")
        said = 0
        quiet_since = asyncio.get_running_loop().time()
        try:
            while not (await asyncio.wait({bringing}, timeout=NEWS_SECONDS))[0]:
                now = asyncio.get_running_loop().time()
                if self.fetched_bytes == said and now - quiet_since < options.LOAD_NEWS_SECONDS:
                    continue
                said, quiet_since = self.fetched_bytes, now
                yield self._progress()
            self._arrived = bringing.result()
        finally:
            bringing.cancel()
            await asyncio.gather(bringing, return_exceptions=True)

    @property
    def _found(self) -> tuple[GgufFile, ModelConfig]:
        assert self._arrived is not None, "bring comes first"
        return self._arrived

    def _progress(self) -> worker_pb2.LoadProgress:
        return worker_pb2.LoadProgress(
            fetched_bytes=self.fetched_bytes,
            fetch_total_bytes=self.fetched_bytes + self._fetching.left_bytes
            if self._fetching
            else 0,
            total_bytes=self._fetching.wanted_bytes if self._fetching else 0,
        )

    async def _bring(self) -> tuple[GgufFile, ModelConfig]:
        order = self._order
        here: tuple[GgufFile, ModelConfig] | None = None
        try:
            here = await asyncio.to_thread(find, order)
        except ModelError:
            if synthetic.is_synthetic(order.model_name) or not self._request.weights_address:
                raise
        if here is not None:
            check(order, here[1])
            if not self._request.weights_address or await asyncio.to_thread(self._is_same, here[0]):
                return here
        async with open_sources(self._request, self._own_name) as sources:
            self._before_bytes = self.fetched_bytes
            self._fetching = Fetching(self._store, sources, self._stack)
            if here is not None and await self._is_right(here[0], self._tensors(*here)):
                return here
            return await self._fetched(self._fetching)

    def _is_same(self, file: GgufFile) -> bool:
        """Whether it is the coordinator's file, at the same place and unchanged; or needs none."""
        meant = self._request.model
        if file.synthetic is not None:
            return True
        try:
            status = file.path.stat()
            place = str(file.path.resolve())
        except OSError:
            return False
        found = (place, status.st_size, status.st_mtime_ns)
        return found == (meant.path, meant.size_bytes, meant.modified_ns)

    async def _is_right(self, file: GgufFile, tensors: Sequence[TensorInfo]) -> bool:
        """Whether a file's tensors have the sums of the coordinator's; its own are remembered.

        If some have not, the others are copied to the store, unless packs are made: then nobody
        knows yet which are needed.
        """
        assert self._fetching is not None, "made before"
        sums = await self._fetching.sums(tensors)
        try:
            manifest = await asyncio.to_thread(Manifest, file, catalogue.manifests_folder())
        except ModelError as e:
            log.warning("%s", e.message)
            return False
        right: list[tuple[TensorInfo, bytes]] = []
        loop = asyncio.get_running_loop()
        hashers = ThreadPoolExecutor(HASHERS, thread_name_prefix="sha256")
        try:
            for tensor, meant in zip(tensors, sums, strict=True):
                if await loop.run_in_executor(hashers, manifest.sha256, tensor) == meant:
                    right.append((tensor, meant))
                else:
                    log.warning("%s of %s is not the coordinator's", tensor.name, file.path)
            if len(right) == len(sums):
                self._own_files.add(file.header_sha256, manifest)
                return True
            if not self._makes_packs:
                await self._copy(manifest, right)
        except ModelError as e:
            log.warning("%s", e.message)
        finally:
            hashers.shutdown(wait=False, cancel_futures=True)
        return False

    async def _copy(self, manifest: Manifest, right: Sequence[tuple[TensorInfo, bytes]]) -> None:
        """These to the store, as far as it has room. Raises ModelError."""
        claim = self._store.claimed([sha256 for _, sha256 in right])
        await asyncio.to_thread(claim.__enter__)
        self._stack.push(claim)
        for tensor, sha256 in right:
            await asyncio.to_thread(self._copy_one, manifest, tensor, sha256)

    def _copy_one(self, manifest: Manifest, tensor: TensorInfo, sha256: bytes) -> None:
        store, size = self._store, tensor.size_bytes
        if store.has(sha256, size):
            return
        if why := store.make_room(size, [sha256]):
            raise ModelError(f"{tensor.name} is not copied: {why}")
        with store.writer(sha256, size) as writer:
            while writer.offset < size:
                n_bytes = min(COPY_BYTES, size - writer.offset)
                writer.write(manifest.read(tensor.offset_bytes + writer.offset, n_bytes))
            writer.finish()

    async def _fetched(self, fetching: Fetching) -> tuple[GgufFile, ModelConfig]:
        """Header, then what the shape is told by, then the span."""
        file = await self._header(fetching)
        started = asyncio.get_running_loop().time()
        stored: dict[str, Path] = {}
        if DIVISORS in file.tensors:
            stored |= await self._stored(fetching, [file.tensors[DIVISORS]])
            file = await asyncio.to_thread(gguf.read_header, file.path, file.size_bytes, stored)
        config = await asyncio.to_thread(model.config_of, file)
        check(self._order, config)
        tensors = self._tensors(file, config)
        if self._makes_packs:
            stored |= self._paths(tensors, await fetching.sums(tensors))
        else:
            stored |= await self._stored(fetching, tensors)
        if fetched := fetching.fetched_bytes:
            seconds = asyncio.get_running_loop().time() - started
            parts = ", ".join(f"{n} from {name}" for name, n in fetching.by_source.most_common())
            log.info("%d bytes of weights came in %.3f s: %s", fetched, seconds, parts)
        return await asyncio.to_thread(gguf.read_header, file.path, file.size_bytes, stored), config

    async def _header(self, fetching: Fetching) -> GgufFile:
        """From the store, else from the coordinator."""
        sha256, size_bytes = self._order.header_sha256, self._request.model.size_bytes
        path = self._store.header_path(sha256)
        with contextlib.suppress(ModelError):  # not here, or damaged
            file = await asyncio.to_thread(gguf.read_header, path, size_bytes, {})
            if file.header_sha256 == sha256:
                await asyncio.to_thread(path.touch)  # used now
                return file
            path.unlink(missing_ok=True)
        data = await fetching.header(size_bytes)
        await asyncio.to_thread(self._store.put_header, sha256, data)
        return await asyncio.to_thread(gguf.read_header, path, size_bytes, {})

    async def _stored(self, fetching: Fetching, tensors: Sequence[TensorInfo]) -> dict[str, Path]:
        """Where these lie when they are here."""
        sums = await fetching.bring(tensors)
        return self._paths(tensors, [sums[tensor.name] for tensor in tensors])

    def _paths(self, tensors: Sequence[TensorInfo], sums: Sequence[bytes]) -> dict[str, Path]:
        return {t.name: self._store.path_of(s) for t, s in zip(tensors, sums, strict=True)}

    def _tensors(self, file: GgufFile, config: ModelConfig) -> list[TensorInfo]:
        order = self._order
        return model.span_tensors(
            file, config, order.span, embeds=order.embeds, has_head=order.has_head
        )
