"""What probes measured, to and from messages of types.proto. Pure."""

from __future__ import annotations

from potluck.plan import DiskFigures, LayerTimes
from potluck.rpc.v1 import types_pb2


def layer_times_message(times: LayerTimes) -> types_pb2.LayerTimes:
    """Times of a layer and the head as a message."""
    return types_pb2.LayerTimes(
        layer_bytes=times.layer_bytes,
        rows=times.rows,
        seconds=times.seconds,
        head_bytes=times.head_bytes,
        head_seconds=times.head_seconds,
    )


def layer_times_of(message: types_pb2.LayerTimes) -> LayerTimes:
    """Times of a layer and the head. Raises PlanError if they are none."""
    return LayerTimes(
        layer_bytes=message.layer_bytes,
        rows=tuple(message.rows),
        seconds=tuple(message.seconds),
        head_bytes=message.head_bytes,
        head_seconds=message.head_seconds,
    )


def disk_message(disk: DiskFigures) -> types_pb2.DiskFigures:
    """A disk's figures as a message."""
    return types_pb2.DiskFigures(
        free_bytes=disk.free_bytes,
        read_bytes_per_second=disk.read_bytes_per_second,
        write_bytes_per_second=disk.write_bytes_per_second,
    )


def disk_of(message: types_pb2.DiskFigures) -> DiskFigures:
    """A disk's figures; rates below 0 count as not measured."""
    return DiskFigures(
        free_bytes=message.free_bytes,
        read_bytes_per_second=max(0.0, message.read_bytes_per_second),
        write_bytes_per_second=max(0.0, message.write_bytes_per_second),
    )
