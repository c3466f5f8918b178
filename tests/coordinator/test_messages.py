"""What a worker says of itself is taken, or not taken; it never makes a plan go wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest

from coordinator.messages import worker_info
from potluck.errors import UsageError
from potluck.plan import DiskFigures, LayerTimes
from potluck.rpc.v1 import cluster_pb2, types_pb2

LAYER_BYTES = 1000


def said(**resources: Any) -> Any:
    request = cluster_pb2.RegisterRequest(
        address="127.0.0.1:1", resources=types_pb2.Resources(**resources)
    )
    return worker_info(request, LAYER_BYTES)


def times(**changes: Any) -> types_pb2.LayerTimes:
    fields = {
        "layer_bytes": LAYER_BYTES,
        "rows": [1, 8],
        "seconds": [0.5, 1.0],
        "head_bytes": 10,
        "head_seconds": 0.25,
    }
    return types_pb2.LayerTimes(**{**fields, **changes})


def test_what_was_measured_is_taken() -> None:
    disk = types_pb2.DiskFigures(
        free_bytes=7, read_bytes_per_second=2e9, write_bytes_per_second=1e9
    )
    info = said(layer_times=times(), disk=disk, read_bytes_per_second=3e9)
    assert info.times == LayerTimes(LAYER_BYTES, (1, 8), (0.5, 1.0), 10, 0.25)
    assert info.disk == DiskFigures(7, 2e9, 1e9)
    assert info.read_bytes_per_second == 3e9


def test_who_measured_nothing_says_nothing() -> None:
    info = said()
    assert (info.times, info.disk, info.read_bytes_per_second) == (None, None, 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_bytes": LAYER_BYTES + 1},  # of another model
        {"layer_bytes": 0},
        {"rows": []},
        {"rows": [2, 8]},
        {"rows": [1, 1]},
        {"rows": [1]},
        {"seconds": [1.0, 0.5]},
        {"seconds": [0.0, 0.5]},
        {"seconds": [-1.0, 0.5]},
        {"seconds": [math.nan, 0.5]},
        {"seconds": [0.5, math.inf]},
        {"head_seconds": 0.0},
        {"head_seconds": math.nan},
        {"rows": list(range(1, 100)), "seconds": [1.0] * 99},
    ],
)
def test_times_that_can_not_be_true_are_not_taken(changes: dict[str, Any]) -> None:
    assert said(layer_times=times(**changes)).times is None


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf, -math.inf])
def test_rates_that_can_not_be_true_count_as_not_measured(rate: float) -> None:
    disk = types_pb2.DiskFigures(read_bytes_per_second=rate, write_bytes_per_second=rate)
    info = said(read_bytes_per_second=rate, disk=disk)
    assert info.read_bytes_per_second == 0.0
    assert info.disk == DiskFigures(0, 0.0, 0.0)


@pytest.mark.parametrize("address", ["", "here", ":7", "here:", "here:x"])
def test_a_worker_without_an_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError):
        worker_info(cluster_pb2.RegisterRequest(address=address), LAYER_BYTES)
