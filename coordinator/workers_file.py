"""Descriptions of machines and people's limits, from TOML, or from the same tables as JSON.

Every key is checked: a wrong one is a UsageError of one line that names the file and the key.
docs/planning.md explains the format. The only effect is reading the file.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from coordinator.checked_table import CheckedTable
from coordinator.described import DescribedWorker, Description
from coordinator.limits import WorkerLimits
from potluck.errors import UsageError
from potluck.near_words import nearest
from potluck.plan import COORDINATOR, GIGABIT, DiskFigures, LinkFigures, Links, WorkerId

COORDINATOR_NAME = "coordinator"  # as an end of a link
MOST_WORKERS = 1000
_MOST_BYTES = 8 * 2**20  # of a file: a thousand machines take a hundredth of that
_ID = re.compile(r"[a-z0-9-]{1,32}")
_ID_WORDS = "1 to 32 of a-z, 0-9 and -"


def read(path: Path) -> Description:
    """The description in a TOML file. Raises UsageError."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        remedy = "docs/planning.md shows one; `potluck plan MODEL --describe` writes a [[worker]]"
        raise UsageError(
            f"{path}: {error.strerror or error}",
            remedy=remedy if isinstance(error, FileNotFoundError) else "",
        ) from error
    if len(content) > _MOST_BYTES:
        raise UsageError(f"{path}: larger than {_MOST_BYTES >> 20} MiB: that is no workers file")
    try:
        return description_of(tomllib.loads(content.decode("utf-8")), str(path))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8: not a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        message = str(error)[:1].lower() + str(error)[1:]
        raise UsageError(f"{path}: not TOML: {message}") from error


def from_json(text: str, source: str) -> Description:
    """The description in a JSON object of the same tables and keys. Raises UsageError."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{source}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{source}: an object of worker, link and network, not {text[:40]!r}")
    return description_of(document, source)


def description_of(document: Mapping[str, object], source: str) -> Description:
    """Checks tables that were parsed. `source` names them in errors. Raises UsageError."""
    top = CheckedTable(source, "", document)
    network, tables, links = top.table("network"), top.tables("worker"), top.tables("link")
    top.end()
    workers: list[DescribedWorker] = []
    limits: dict[WorkerId, WorkerLimits] = {}
    named: dict[str, tuple[WorkerId, ...]] = {COORDINATOR_NAME: (COORDINATOR,)}  # ends of links
    for table in tables:
        worker, count, limit = _worker(table)
        ids = _ids(worker.id, count)
        for id in {worker.id, *ids}:
            if id in named:
                raise table.error("id", f"{id!r} is there twice")
            named[id] = (id,)
        named[worker.id] = ids
        workers += [replace(worker, id=id) for id in ids]
        limits |= dict.fromkeys(ids, limit) if limit is not None else {}
        if len(workers) > MOST_WORKERS:
            raise table.error("count", f"{len(workers)} workers in all, {MOST_WORKERS} at most")
    default = _figures(network, GIGABIT)
    network.end()
    between = {ends: f for table in links for ends, f in _link(table, default, named).items()}
    return Description(source, tuple(workers), limits, Links(default, between))


def _ids(id: WorkerId, count: int) -> tuple[WorkerId, ...]:
    """ "pi" four times is pi-1, pi-2, pi-3 and pi-4; once it is pi."""
    return (id,) if count == 1 else tuple(WorkerId(f"{id}-{i + 1}") for i in range(count))


def _worker(table: CheckedTable) -> tuple[DescribedWorker, int, WorkerLimits | None]:
    """The machine of a [[worker]], how many alike, and what people allow it."""
    id = _id(table)
    count = table.whole("count", 1, low=1, high=MOST_WORKERS)
    if not all(_ID.fullmatch(name) for name in _ids(id, count)):
        raise table.error("count", f"{_ids(id, count)[-1]!r} is no id: {_ID_WORDS}")
    memory_bytes = table.size("memory")
    worker = _timed(table, id, memory_bytes)
    layers, exclude = table.layers("layers"), table.flag("exclude")
    table.end()
    _check_speed(table, worker)
    limit = None
    if memory_bytes or layers is not None or exclude:
        limit = WorkerLimits(memory_bytes or None, layers, exclude)
    return worker, count, limit


def _id(table: CheckedTable) -> WorkerId:
    if not table.has("id"):
        raise table.error("id", "is missing", remedy='name the machine, such as id = "laptop-a"')
    id = table.text("id")
    if not _ID.fullmatch(id):
        raise table.error("id", f"{_ID_WORDS}, not {id!r}")
    if id == COORDINATOR_NAME:
        raise table.error("id", f"{id!r} is the other end of links, and no worker")
    return WorkerId(id)


def _timed(table: CheckedTable, id: WorkerId, memory_bytes: int) -> DescribedWorker:
    """What a [[worker]] says of speed, disk and room."""
    ms = table.by_rows("layer_ms")
    return DescribedWorker(
        id=id,
        where=table.where,
        memory_bytes=memory_bytes,
        room_bytes=table.size("room"),
        read_bytes_per_second=table.number("read_gb_per_second") * 1e9,
        macs_per_second=table.number("macs_per_second"),
        rows=tuple(ms),
        seconds=tuple(value / 1e3 for value in ms.values()),
        layer_bytes=round(table.number("layer_mb") * 1e6),
        head_seconds=table.number("head_ms") / 1e3,
        head_bytes=round(table.number("head_mb") * 1e6),
        disk=_disk(table),
    )


def _check_speed(table: CheckedTable, worker: DescribedWorker) -> None:
    """Raises for figures that say nothing without others, and for times that fall."""
    if worker.rows and worker.rows[0] != 1:
        raise table.error("layer_ms", f"1 is missing, beside {', '.join(map(str, worker.rows))}")
    timed = zip(worker.rows, worker.seconds, strict=True)
    for (few, fast), (many, slow) in pairwise(timed):
        if slow < fast:
            took = f"{many} rows {slow * 1e3:g} ms and {few} {fast * 1e3:g}"
            raise table.error("layer_ms", f"{took}: more rows take longer")
    for key in ("layer_mb", "head_ms", "head_mb"):
        if table.has(key) and not worker.rows:
            raise table.error(key, "goes with layer_ms, which is missing")
    if worker.macs_per_second and not worker.rows and not worker.read_bytes_per_second:
        raise table.error("macs_per_second", "goes with read_gb_per_second, which is missing")


def _disk(table: CheckedTable) -> DiskFigures | None:
    disk = DiskFigures(
        free_bytes=table.size("disk_free"),
        read_bytes_per_second=table.number("disk_read_mb_per_second") * 1e6,
        write_bytes_per_second=table.number("disk_write_mb_per_second") * 1e6,
    )
    return disk if any(dataclasses.astuple(disk)) else None


def _figures(table: CheckedTable, default: LinkFigures) -> LinkFigures:
    """Round trip and rate; what is not said is as in `default`."""
    ms = table.number("rtt_ms", default.rtt_seconds * 1e3, zero=True)
    mbit = table.number("mbit_per_second", default.bytes_per_second * 8 / 1e6)
    return LinkFigures(rtt_seconds=ms / 1e3, bytes_per_second=mbit * 1e6 / 8)


def _link(
    table: CheckedTable, default: LinkFigures, named: Mapping[str, tuple[WorkerId, ...]]
) -> dict[tuple[WorkerId, WorkerId], LinkFigures]:
    """A [[link]]: `between` two ids both ways, or one way `from` and `to`."""
    both = table.pair("between")
    one = [key for key in ("from", "to") if table.has(key)]
    if (both is None) == (not one) or len(one) == 1:
        raise table.error("between", "two ids are wanted, or `from` and `to` for one direction")
    key, ends = ("between", both) if both else ("from", (table.text("from"), table.text("to")))
    for end in ends:
        if end not in named:
            raise table.error(key, f"no worker {end!r}{nearest(end, named)}")
    if ends[0] == ends[1] and len(named[ends[0]]) == 1:
        raise table.error(key, f"{ends[0]!r} and itself")
    figures = _figures(table, default)
    table.end()
    pairs = [(a, b) for a in named[ends[0]] for b in named[ends[1]] if a != b]
    if both:
        pairs += [(b, a) for a, b in pairs]
    return dict.fromkeys(pairs, figures)
