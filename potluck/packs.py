"""Packed weights on disk: where they lie, how much room they take, when they are made again.

A pack holds a layer, the embedding or the head of one GGUF as the engine wants it in memory, so
that a start maps it and packs nothing. It is a cache: whatever is wrong with one, it is made again.
Where the disk refuses at a start, the weights are kept in memory instead; later, steps fail until
it does not. A pack's path in the folder is `<sha256 of the GGUF's header>/<part>.<layout>.pack`.
Several processes may use it at the same time: packs appear by renaming, and who has mapped one
keeps it and holds a shared lock on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from potluck.engine import PACK_LAYOUT, Shard, Synthetic, TensorFiles, TensorTuple, origin_of
from potluck.errors import DamagedPack, DamagedTensor, Full, ModelError
from potluck.gguf import GgufFile, TensorInfo
from potluck.model import EMBEDDING, HEAD, passing_bytes
from potluck.tensor_store import TensorStore
from potluck.verified import verified

log = logging.getLogger(__name__)

# Of the disk's room, what packs leave to others.
RESERVE_BYTES = 2**30
# A disk that returns other bytes than were written so often is not asked again.
MOST_REPAIRS = 3
_LASTING = "is damaged and can't be made again"
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class PackFolder:
    """Where packs lie, and the most room that all of them may take (None: what the disk has).

    `tensors`: those that packs were made of when they were delivered. They go before any pack does,
    for they only spare fetching them again.
    """

    root: Path
    space_bytes: int | None = None
    tensors: TensorStore | None = None

    def path_of(self, file: GgufFile, part: str) -> Path:
        """The pack of a part (see `parts_of`) of a model."""
        return self.root / file.header_sha256 / f"{part}.{PACK_LAYOUT}.pack"

    def make_room(
        self,
        path: Path,
        n_bytes: int,
        keep: Collection[Path] = (),
        unread: Collection[bytes] = (),
    ) -> str:
        """Makes room for a pack at `path`, which it will replace, and makes its folder; "", or why
        that is impossible, and then nothing has gone.

        Delivered tensors go but those `unread` (by sha256), then packs of other models, then other
        spans and layouts of this one; those first that were not used for longest. Not those to
        `keep`, nor any that somebody has mapped: their room would not come back.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            on_disk, in_space, why = self._shortage(path, n_bytes)
            if max(on_disk, in_space) <= 0:
                return ""
            tensors = self._tensors_beside(path)
            spare_bytes = tensors.removable_bytes(unread) if tensors and on_disk > 0 else 0
            candidates = [p for p in self._files("*.pack") if p != path and p not in keep]
            candidates.sort(key=lambda p: (p.parent == path.parent, _used_at(p)))
            unused = {p: _size_of(p) for p in candidates if not _is_mapped(p)}
            if sum(unused.values()) < max(on_disk - spare_bytes, in_space):
                return why
            if tensors and on_disk > 0:
                freed = tensors.remove(on_disk, unread)
                log.info("%d bytes of delivered tensors make room", freed)
                on_disk, in_space, why = self._shortage(path, n_bytes)
            missing = max(on_disk, in_space)
            for old, size in unused.items():
                if missing > 0 and _remove_unused(old):
                    log.info("%s makes room", old)
                    missing -= size
            on_disk, in_space, why = self._shortage(path, n_bytes)
        except OSError as e:
            return f"{e.filename}: {e.strerror}"
        return why if max(on_disk, in_space) > 0 else ""

    def sweep(self) -> None:
        """Removes what writers that died have left."""
        for part in self._files("*.pack.part-*"):
            with contextlib.suppress(OSError), part.open("rb") as opened:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its writer holds this
                part.unlink()

    def _files(self, pattern: str) -> list[Path]:
        """Files of all models' folders; one that `potluck rm` takes away meanwhile has none."""
        found: list[Path] = []
        with contextlib.suppress(OSError):
            for folder in list(self.root.iterdir()):
                with contextlib.suppress(OSError):
                    found += folder.iterdir()
        return [path for path in found if path.match(pattern)]

    def _tensors_beside(self, path: Path) -> TensorStore | None:
        """The delivered tensors, if they lie on the disk of this pack."""
        store = self.tensors
        if store is None or not store.root.is_dir():
            return None
        return store if store.root.stat().st_dev == path.parent.stat().st_dev else None

    def _shortage(self, path: Path, n_bytes: int) -> tuple[int, int, str]:
        """Bytes that a pack at `path` lacks on the disk and of what packs may take, 0 or less if it
        lacks none, and what it lacks more of.
        """
        free_bytes = shutil.disk_usage(path.parent).free
        # What it replaces goes when the new one is whole; others have no less room then.
        reserve_bytes = 0 if _size_of(path) else RESERVE_BYTES
        on_disk = n_bytes + reserve_bytes - free_bytes
        said = f"{free_bytes} bytes of the disk are free, {n_bytes} are needed"
        if reserve_bytes:
            said += f" and {reserve_bytes} for others"
        if self.space_bytes is None:
            return on_disk, 0, said
        held = sum(_size_of(p) for p in self._files("*.pack") if p != path)
        in_space = held + n_bytes - self.space_bytes
        if in_space > on_disk:
            said = f"packs may take {self.space_bytes} bytes, {held} are taken, {n_bytes} needed"
        return on_disk, in_space, said


def parts_of(tensors: Iterable[TensorInfo]) -> dict[str, list[TensorInfo]]:
    """Tensors by the pack that holds them: "embedding", "layer-N", "head"."""
    parts: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        layer = _LAYER.match(tensor.name)
        end = "embedding" if tensor.name == EMBEDDING else "head"
        parts.setdefault(f"layer-{layer[1]}" if layer else end, []).append(tensor)
    return parts


def unit_bytes(tensors: Sequence[TensorInfo]) -> list[int]:
    """Sizes of what a step uses whole, one after the other: layers, and a head with its norm.

    An embedding that is not the head as well is none: only some rows of it are used.
    """
    parts = {name: sum(t.size_bytes for t in part) for name, part in parts_of(tensors).items()}
    embedding, head = parts.pop("embedding", 0), parts.pop("head", 0)
    is_tied = bool(head) and all(t.name != HEAD for t in tensors)
    return [*parts.values(), *([head + embedding * is_tied] if head else [])]


class MappedWeights:
    """The tensors of one shard as packs. For the thread that calls the shard."""

    def __init__(
        self,
        shard: Shard,
        file: GgufFile,
        tensors: Iterable[TensorInfo],
        packs: PackFolder,
        bring: Callable[[Sequence[TensorInfo]], None] = lambda _: None,
    ) -> None:
        """`bring` is called with the tensors of packs that are to be made, before they are read: of
        a model that is delivered, it returns when they are here. What it raises ends the loading.
        """
        self._shard = shard
        self._file = file
        self._packs = packs
        self._bring = bring
        self._tensors = list(tensors)
        self._parts = {
            str(packs.path_of(file, part)): members
            for part, members in parts_of(self._tensors).items()
        }
        self._unmade: list[TensorInfo] = []  # of packs that have to be made yet
        self._wrong: set[str] = set()  # packs that are there and are not what they should be
        self._repairs: Counter[str] = Counter()

    def load(self, on_progress: Callable[[int, str], None], resident_bytes: int) -> None:
        """Maps the packs that are there, makes the others, and seals the shard; `resident_bytes` of
        all may stay in memory.

        on_progress gets the bytes done so far and the tensor just read; what it raises ends the
        loading. Raises ModelError: a tensor is missing, not of the span, cut short or damaged; or
        packs can't be written and memory has no room for them.
        """
        self._packs.sweep()
        done_bytes, refused = 0, ""
        unmade: list[str] = []
        for path, tensors in self._parts.items():
            if self._map(path):
                unmade.append(path)
                continue
            done_bytes += _sum_bytes(tensors)
            on_progress(done_bytes, tensors[-1].name)
        self._unmade = [tensor for path in unmade for tensor in self._parts[path]]
        in_memory: list[TensorInfo] = []
        with self._read(self._unmade) as right:
            for path in unmade:
                tensors = self._parts[path]
                _take(right, len(tensors))
                if why := self._make(path):
                    resident_bytes = self._keep_in_memory(path, why, in_memory, resident_bytes)
                    refused = refused or f"{path} can't be written: {why}"
                self._unmade = self._unmade[len(tensors) :]
                done_bytes += _sum_bytes(tensors)
                on_progress(done_bytes, tensors[-1].name)
        if refused:
            log.warning("%s; what is not on disk is kept in memory", refused)
        self._shard.seal(resident_bytes)

    def repair(self) -> None:
        """Makes the packs again that a forward found damaged.

        Raises ModelError if they can't be written, or are damaged again and again.
        """
        for path in self._shard.damaged_packs():
            if self._repairs[path] == MOST_REPAIRS:
                raise ModelError(f"{path}: the disk returns other bytes than were written")
            log.warning("%s was damaged and is made again", path)
            self._unmade = self._parts[path]
            try:
                with self._read(self._unmade) as right:
                    _take(right, len(self._unmade))
                    why = self._make(path)
            except DamagedTensor:
                raise
            except (ModelError, Full) as e:
                raise ModelError(f"{path} {_LASTING}: {e.message}", remedy=e.remedy) from e
            if why:
                raise ModelError(f"{path} {_LASTING}: {why}")
            self._repairs[path] += 1

    def _map(self, path: str) -> str:
        """Takes the tensors from a pack that is there; "", or why not."""
        try:
            why = self._shard.map_pack(path, self._origin(path), self._sources(path))
        except DamagedPack as e:
            why = e.message
            self._wrong.add(path)
        if not why:
            self._wrong.discard(path)
            with contextlib.suppress(OSError):
                os.utime(path)  # when it was last used
        elif Path(path).exists():
            log.info("%s; it is made again", why)
        return why

    def _make(self, path: str) -> str:
        """Writes a pack and takes the tensors from it; "", or why that was impossible.

        One that is there stays until the new one takes its place. Only if it is known to be wrong,
        and there is no room for both, it goes before.
        """
        why = self._make_room(path)
        if why and path in self._wrong and _remove_unused(Path(path)):
            why = self._make_room(path)
        return (
            why
            or self._shard.write_pack(path, self._origin(path), self._sources(path))
            or self._map(path)
        )

    def _make_room(self, path: str) -> str:
        keep = {Path(p) for p in self._parts}
        unread = [bytes.fromhex(p.name) for p in self._stored(self._unmade)]
        n_bytes = self._shard.pack_bytes(self._sources(path))
        return self._packs.make_room(Path(path), n_bytes, keep, unread)

    def _keep_in_memory(
        self, path: str, why: str, in_memory: list[TensorInfo], resident_bytes: int
    ) -> int:
        """Takes the tensors of a pack that can't be written; what is left of `resident_bytes`."""
        tensors = self._parts[path]
        n_bytes = _sum_bytes(tensors)
        in_memory += tensors
        # What is mapped, or will be, passes through memory.
        mapped = [t for t in self._tensors if t not in in_memory]
        left_bytes = resident_bytes - passing_bytes(unit_bytes(mapped))
        if n_bytes > left_bytes:
            raise ModelError(
                f"{path} can't be written ({why}), and its {n_bytes} bytes do not fit into"
                f" the {max(0, left_bytes)} of memory that are left",
                remedy="make room on that disk, or set POTLUCK_CACHE to another one",
            )
        origin = self._origin(path)
        for t in tensors:
            self._shard.put_file(t.name, t.type_name, t.rows, t.cols, origin, t.offset_bytes)
        return resident_bytes - n_bytes

    @contextlib.contextmanager
    def _read(self, tensors: list[TensorInfo]) -> Iterator[Iterator[TensorInfo]]:
        """These, when they are here and known to be right."""
        if tensors:
            self._bring(tensors)
        with verified(self._file, tensors) as right:
            yield right

    def _stored(self, tensors: list[TensorInfo]) -> list[Path]:
        """Where delivered tensors lie."""
        return (
            [] if self._file.stored is None else [self._file.stored_path(t.name) for t in tensors]
        )

    def _origin(self, path: str) -> str | Synthetic | TensorFiles:
        return origin_of(self._file, self._parts[path])

    def _sources(self, path: str) -> list[TensorTuple]:
        return [(t.name, t.type_name, t.rows, t.cols, t.offset_bytes) for t in self._parts[path]]


def _take(tensors: Iterator[TensorInfo], n: int) -> None:
    """The next n."""
    for _ in range(n):
        next(tensors)


def _sum_bytes(tensors: Iterable[TensorInfo]) -> int:
    return sum(tensor.size_bytes for tensor in tensors)


def _used_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process removed it
        return 0.0


@contextlib.contextmanager
def _unused(path: Path) -> Iterator[bool]:
    """Whether nobody has mapped a pack; nobody can until the context ends."""
    try:
        opened = path.open("rb")
    except OSError:  # gone, or not ours to read
        yield False
        return
    with opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # no locks here: nobody knows
            pass
        yield True


def _is_mapped(path: Path) -> bool:
    with _unused(path) as is_unused:
        return not is_unused


def _remove_unused(path: Path) -> bool:
    """Removes a pack that nobody has mapped; whether it is gone."""
    with _unused(path) as is_unused:
        if is_unused:
            path.unlink(missing_ok=True)
        return is_unused


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
