"""What probes are asked and what they measured, to and from messages of types.proto. Pure."""

from __future__ import annotations

from math import isfinite

from potluck.errors import ModelError
from potluck.layer_shape import LayerShape
from potluck.plan import DiskFigures, LayerTimes
from potluck.rpc.v1 import types_pb2

_MOST_TENSORS = 64  # of a layer: five times as many as any has


def layer_shape_message(shape: LayerShape) -> types_pb2.LayerShape:
    """The layer that is to be timed, as a message."""
    return types_pb2.LayerShape(
        dim=shape.dim,
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        ffn_dim=shape.ffn_dim,
        vocab=shape.vocab,
        matrices=[
            types_pb2.MatrixType(name=name, type_name=type_name) for name, type_name in shape.types
        ],
        head_type=shape.head_type,
    )


def layer_shape_of(message: types_pb2.LayerShape) -> LayerShape:
    """The layer that is to be timed. Raises ModelError: no such layer, or none of ours."""
    if len(message.matrices) > _MOST_TENSORS:
        raise ModelError(f"a layer of {len(message.matrices)} tensors")
    return LayerShape(
        dim=message.dim,
        n_layers=message.n_layers,
        n_heads=message.n_heads,
        n_kv_heads=message.n_kv_heads,
        head_dim=message.head_dim,
        ffn_dim=message.ffn_dim,
        vocab=message.vocab,
        types=tuple((matrix.name, matrix.type_name) for matrix in message.matrices),
        head_type=message.head_type,
    )


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
    """A disk's figures; rates that are none count as not measured."""
    return DiskFigures(
        free_bytes=message.free_bytes,
        read_bytes_per_second=rate_of(message.read_bytes_per_second),
        write_bytes_per_second=rate_of(message.write_bytes_per_second),
    )


def rate_of(rate: float) -> float:
    """A rate that somebody says to have measured; 0, which is none, for what can be none."""
    return rate if isfinite(rate) and rate > 0 else 0.0
