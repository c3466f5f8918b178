"""Writes a model as a GGUF file, tensor by tensor, in the types of a choice.

Takes any ModelSource. Rows are read, converted on all threads and written in slabs, so memory stays
small whatever the model's size. An interrupted writing goes on where it was; the file has its name
only when it is whole, and its inputs are never touched. What is read is checked on the way: a
tensor with NaN or infinity is refused by name.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from potluck import __version__, engine
from potluck.blocks import BY_NAME
from potluck.errors import ModelError
from potluck.gguf import TensorInfo
from potluck.gguf_header import Layout, TensorHeading, laid_out
from potluck.model import WEIGHT_TYPES
from potluck.part_file import PartFile
from potluck.tensor_source import Metadata, ModelSource, TensorSource, Typed
from potluck.type_mix import Candidate, TypeChoice, types_of

# Of a tensor, read or written at once: enough for all threads, and three of them are held.
SLAB_BYTES = 16 * 2**20
ROOM_MARGIN_BYTES = 16 * 2**20  # left free on the disk
# Of the bytes that are written for equal inputs; another one, and part files are begun afresh.
FORMAT = 2
_QUANTIZATION_VERSION = 2  # of ggml's block layouts


@dataclass(frozen=True, slots=True)
class Start:
    """What is known before the first byte is written."""

    path: Path
    size_bytes: int
    resumed_bytes: int  # that an interrupted writing left
    free_bytes: int  # on the disk
    discarded: bool  # an interrupted writing of something else was there
    requantized: tuple[str, ...]  # types with less than 16 bits that are converted once more


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is; bytes are those of the file."""

    tensor: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written."""

    path: Path
    size_bytes: int
    n_tensors: int
    types: dict[str, int] = field(repr=False)  # bytes of each type, the largest first
    resumed_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Work:
    """One tensor: from where to where."""

    source: TensorSource
    target: TensorInfo

    @property
    def slab_rows(self) -> int:
        row_bytes = max(
            _row_bytes(self.source.type_name, self.target.cols),
            _row_bytes(self.target.type_name, self.target.cols),
        )
        return max(1, SLAB_BYTES // row_bytes)


def _silent(_: object) -> None:
    pass


def write_model(
    source: ModelSource,
    out: Path,
    choice: TypeChoice,
    *,
    threads: int = 0,
    force: bool = False,
    on_start: Callable[[Start], None] = _silent,
    on_progress: Callable[[Progress], None] = _silent,
) -> Summary:
    """Write `source` to `out`. threads 0: as many as the process may use.

    force: write over `out`. Callbacks come on the calling thread. Raises ModelError: something is
    there already, no room, a tensor that is not finite or beyond the range of its type; the reading
    of `source` raises its own. After an interruption the same call goes on.
    """
    started = time.monotonic()
    _check_apart(source, out)
    layout, works = _planned(source, choice)
    identity = _identity(source, choice, layout)
    with PartFile(out, identity, force=force) as part:
        resumed_bytes = part.done_bytes
        free_bytes = _check_room(part, layout.size_bytes)
        on_start(
            Start(
                out,
                layout.size_bytes,
                resumed_bytes,
                free_bytes,
                part.discarded,
                _requantized(works),
            )
        )
        part.begin()
        if part.done_bytes < len(layout.header):
            part.append(layout.header[part.done_bytes :])
        _write_tensors(works, part, layout.size_bytes, engine.Engine(threads), on_progress)
        part.finish()
    types: Counter[str] = Counter()
    for tensor in layout.tensors:
        types[tensor.type_name] += tensor.size_bytes
    return Summary(
        out,
        layout.size_bytes,
        len(layout.tensors),
        dict(types.most_common()),
        resumed_bytes,
        time.monotonic() - started,
    )


def _check_apart(source: ModelSource, out: Path) -> None:
    """Neither `out` nor what is written beside it is an input, under whatever name."""
    if not out.name:
        raise ModelError(f"{out}: a folder", remedy="name a file in it")
    if not out.parent.is_dir():
        raise ModelError(f"{out.parent}: no such folder", remedy="make it, or name another")
    for target in (out, *(out.with_name(out.name + end) for end in (".part", ".part.json"))):
        for path in source.paths:
            if target.exists() and Path(path).exists() and target.samefile(path):
                raise ModelError(
                    f"{target} is the input {path}", remedy="name another file to write"
                )


def _planned(source: ModelSource, choice: TypeChoice) -> tuple[Layout, list[_Work]]:
    candidates = [Candidate(t.name, t.shape, t.type_name) for t in source.tensors]
    shared = _many_heads_share_values(source.metadata)
    types = types_of(choice, candidates, many_heads_share_values=shared)
    headings = [TensorHeading(t.name, types[t.name], t.shape) for t in source.tensors]
    layout = laid_out(_with_types(source.metadata, choice), headings)
    pairs = zip(source.tensors, layout.tensors, strict=True)
    return layout, [_Work(tensor, target) for tensor, target in pairs]


def _with_types(
    metadata: Sequence[tuple[str, Metadata]], choice: TypeChoice
) -> list[tuple[str, Metadata]]:
    """The pairs, with those that tell of the types; in their old places if they had one."""
    said: dict[str, Metadata] = {
        "general.file_type": Typed("u32", choice.file_type),
        "general.quantization_version": Typed("u32", _QUANTIZATION_VERSION),
    }
    pairs = [(key, said.pop(key, value)) for key, value in metadata]
    return [*pairs, *said.items()]


def _many_heads_share_values(metadata: Sequence[tuple[str, Metadata]]) -> bool:
    """LLaMA-2-70B's shape: its 80 layers have fewer KV heads than heads."""
    pairs = {key: v.value if isinstance(v, Typed) else v for key, v in metadata}
    heads = pairs.get("llama.attention.head_count")
    return pairs.get("llama.block_count") == 80 and heads != pairs.get(
        "llama.attention.head_count_kv", heads
    )


def _identity(source: ModelSource, choice: TypeChoice, layout: Layout) -> str:
    digest = hashlib.sha256()
    for text in (str(FORMAT), __version__, choice.name, source.identity):
        digest.update(text.encode() + b"\0")
    digest.update(layout.header)
    return digest.hexdigest()


def _check_room(part: PartFile, size_bytes: int) -> int:
    """Free bytes of the disk. Raises ModelError: too few."""
    free_bytes = shutil.disk_usage(part.path.parent).free
    lacking = size_bytes + ROOM_MARGIN_BYTES - part.room_bytes - free_bytes
    if lacking > 0:
        raise ModelError(
            f"{part.path.parent}: the model takes {size_bytes / 1e6:,.0f} MB and leaves"
            f" {ROOM_MARGIN_BYTES / 1e6:,.0f} MB of the disk,"
            f" {(free_bytes + part.room_bytes) / 1e6:,.0f} MB are free",
            remedy=f"make room for {lacking / 1e6:,.0f} MB more, or name a file on another disk",
        )
    return free_bytes


def _requantized(works: Sequence[_Work]) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(
            work.source.type_name
            for work in works
            if work.source.type_name != work.target.type_name
            and min(BY_NAME[t].values for t in (work.source.type_name, work.target.type_name)) > 1
        )
    )


def _write_tensors(
    works: Sequence[_Work],
    part: PartFile,
    total_bytes: int,
    eng: engine.Engine,
    on_progress: Callable[[Progress], None],
) -> None:
    """From where `part` ends; the next slab is read while one is converted and written."""
    slabs = _slabs(works, part.done_bytes)
    with ThreadPoolExecutor(1, "read") as reader:
        following = _read(reader, next(slabs, None))
        while following is not None:
            work, first_row, pending = following
            data = pending.result()
            following = _read(reader, next(slabs, None))
            try:
                converted = _converted(work, first_row, data, eng)
            except ModelError:
                part.abandon()
                raise
            part.append(bytes(max(0, work.target.offset_bytes - part.done_bytes)))
            _check_place(work, first_row, part)
            part.append(converted)
            on_progress(Progress(work.target.name, part.done_bytes, total_bytes))
    part.append(bytes(total_bytes - part.done_bytes))


def _check_place(work: _Work, first_row: int, part: PartFile) -> None:
    """The file ends where the row belongs; somebody may have changed its record."""
    target = work.target
    if part.done_bytes != target.offset_bytes + first_row * (target.size_bytes // target.rows):
        raise ModelError(f"{part.path}: ends inside a row of {target.name}", remedy="remove it")


_Slab = tuple[_Work, int, int]  # rows [first, first + n)
_Reading = tuple[_Work, int, "Future[bytes | memoryview]"]


def _slabs(works: Sequence[_Work], done_bytes: int) -> Iterator[_Slab]:
    """Those of which nothing lies in the first `done_bytes` of the file."""
    for work in works:
        target = work.target
        row_bytes = target.size_bytes // target.rows
        done = min(target.rows, max(0, done_bytes - target.offset_bytes) // row_bytes)
        for first_row in range(done, target.rows, work.slab_rows):
            yield work, first_row, min(work.slab_rows, target.rows - first_row)


def _read(reader: ThreadPoolExecutor, slab: _Slab | None) -> _Reading | None:
    if slab is None:
        return None
    work, first_row, n_rows = slab
    return work, first_row, reader.submit(work.source.read, first_row, n_rows)


def _converted(
    work: _Work, first_row: int, data: bytes | memoryview, eng: engine.Engine
) -> bytes | memoryview:
    """Rows in the target's type. Raises ModelError: a value that can't be written, by name."""
    old, new, cols = work.source.type_name, work.target.type_name, work.target.cols
    n_rows, rest = divmod(memoryview(data).nbytes, _row_bytes(old, cols))
    if rest or not n_rows:
        raise ModelError(f"{work.target.name}: rows of {old} that are not whole")
    if old not in WEIGHT_TYPES:
        return data
    out = np.empty(n_rows * _row_bytes(new, cols), np.uint8)
    flaw = engine.convert(eng, old, new, data, out)
    if flaw is not None:
        index, value = flaw
        where = f"{work.target.name}, row {first_row + index // cols}, column {index % cols}"
        raise ModelError(_refusal(value, new, where), remedy="is the file damaged?")
    return memoryview(out)  # type: ignore[arg-type]  # numpy's stubs hide the buffer before 3.12


def _refusal(value: float, type_name: str, where: str) -> str:
    if math.isnan(value):
        return f"NaN in {where}"
    if math.isinf(value):
        return f"infinity in {where}"
    return f"{value:g} in {where}: beyond the range of {type_name}"


def _row_bytes(type_name: str, cols: int) -> int:
    block = BY_NAME[type_name]
    return cols // block.values * block.size_bytes
