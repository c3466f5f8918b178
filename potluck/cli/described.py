"""Machines as tables of a workers file (docs/planning.md): to be planned with, or to be shown.

From what a worker says of itself, at its probe or in the status of a cluster. Pure. The
coordinator's reader of such tables is the other side; a test has each read what the other wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from potluck.errors import PotluckError
from potluck.plan import DiskFigures, LayerTimes
from potluck.replies import MeasuredLinkReport, ServiceReport, WorkerReport

Table = dict[str, object]  # keys and values of one table, as TOML and JSON have them
USELESS_STATES = ("lost", "quarantined", "draining")


def of_service(report: ServiceReport) -> dict[str, object]:
    """The workers of a cluster that can be planned, and the links that it measured."""
    workers = [_of_report(w) for w in report.workers if w.state not in USELESS_STATES]
    here = {str(w["id"]) for w in workers} | {"coordinator"}
    links = [
        _of_link(x)
        for x in report.measured_links
        if {x.start, x.end} <= here and x.rtt_seconds > 0 and x.bytes_per_second > 0
    ]
    return {"worker": workers, "link": links}


def of_machine(said: Mapping[str, object]) -> Table:
    """The table of a machine that `potluck-worker --describe` has told of.

    Raises PotluckError if that is another release's way of telling.
    """
    try:
        times, disk = said.get("times"), said.get("disk")
        return _table(
            id=id_of(str(said.get("id") or said.get("machine") or "")),
            memory_bytes=_whole(said["memory_free_bytes"]),
            room_bytes=None if said.get("room_bytes") is None else _whole(said["room_bytes"]),
            read_bytes_per_second=_number(said["read_bytes_per_second"]),
            times=_times(times) if isinstance(times, Mapping) else None,
            disk=_disk(disk) if isinstance(disk, Mapping) else None,
        )
    except (KeyError, TypeError) as error:
        raise PotluckError(
            f"potluck-worker describes this machine in words of another release: {error}",
            remedy="pip install --force-reinstall potluck",
        ) from error


def id_of(name: str) -> str:
    """A machine's name as a worker's id: 1 to 32 of a-z, 0-9 and -."""
    return re.sub(r"[^a-z0-9-]+", "-", name.lower())[:32].strip("-") or "here"


def toml_of(table: Table) -> str:
    """A [[worker]] to be pasted into a workers file."""
    lines = ["[[worker]]"]
    for key, value in table.items():
        if isinstance(value, dict):
            shown = "{ " + ", ".join(f"{k} = {v!r}" for k, v in value.items()) + " }"
        elif isinstance(value, int):
            shown = f"{value:_}"
        else:
            shown = f'"{value}"' if isinstance(value, str) else repr(value)
        lines.append(f"{key} = {shown}")
    return "\n".join(lines) + "\n"


def _of_report(worker: WorkerReport) -> Table:
    return _table(
        id=worker.id,
        memory_bytes=worker.offered_bytes,
        room_bytes=worker.room_bytes,
        read_bytes_per_second=worker.read_bytes_per_second,
        times=worker.layer_times,
        disk=worker.disk,
    )


def _of_link(link: MeasuredLinkReport) -> Table:
    return {
        "from": link.start,
        "to": link.end,
        "rtt_ms": link.rtt_seconds * 1e3,
        "mbit_per_second": link.bytes_per_second * 8 / 1e6,
    }


def _table(
    *,
    id: str,
    memory_bytes: int,
    room_bytes: int | None,
    read_bytes_per_second: float,
    times: LayerTimes | None,
    disk: DiskFigures | None,
) -> Table:
    """Only what is known: the file's reader takes no zeros."""
    found: Table = {"id": id, "memory": max(1, memory_bytes), "room": room_bytes}
    found["read_gb_per_second"] = _short(read_bytes_per_second / 1e9)
    if times is not None:
        ms = {str(r): _short(s * 1e3) for r, s in zip(times.rows, times.seconds, strict=True)}
        found |= {"layer_mb": times.layer_bytes / 1e6, "layer_ms": ms}
        found |= {"head_mb": times.head_bytes / 1e6, "head_ms": _short(times.head_seconds * 1e3)}
    if disk is not None:
        found["disk_free"] = disk.free_bytes
        found["disk_read_mb_per_second"] = _short(disk.read_bytes_per_second / 1e6)
        found["disk_write_mb_per_second"] = _short(disk.write_bytes_per_second / 1e6)
    return {key: value for key, value in found.items() if value}


def _short(value: float) -> float:
    """Four figures: a probe's are not better, and people read them."""
    return float(f"{value:.4g}")


def _times(said: Mapping[str, object]) -> LayerTimes:
    rows, seconds = said["rows"], said["seconds"]
    if not isinstance(rows, Sequence) or not isinstance(seconds, Sequence):
        raise TypeError("rows and seconds are no lists")
    return LayerTimes(
        layer_bytes=_whole(said["layer_bytes"]),
        rows=tuple(_whole(r) for r in rows),
        seconds=tuple(_number(s) for s in seconds),
        head_bytes=_whole(said["head_bytes"]),
        head_seconds=_number(said["head_seconds"]),
    )


def _disk(said: Mapping[str, object]) -> DiskFigures:
    return DiskFigures(
        free_bytes=_whole(said["free_bytes"]),
        read_bytes_per_second=_number(said["read_bytes_per_second"]),
        write_bytes_per_second=_number(said["write_bytes_per_second"]),
    )


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)
