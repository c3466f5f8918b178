"""Measured figures survive a message, and a stranger's nonsense does not pass."""

from __future__ import annotations

import pytest

from potluck.errors import PlanError
from potluck.plan import DiskFigures, LayerTimes
from potluck.rpc.measured import disk_message, disk_of, layer_times_message, layer_times_of
from potluck.rpc.v1 import types_pb2

TIMES = LayerTimes(455_409_664, (1, 2, 8), (0.0091, 0.0092, 0.0121), 215_072_768, 0.0043)
DISK = DiskFigures(200 * 10**9, 3.5e9, 2.25e9)


def test_times_and_disks_come_back_as_they_were() -> None:
    assert layer_times_of(layer_times_message(TIMES)) == TIMES
    assert disk_of(disk_message(DISK)) == DISK


def test_times_that_fall_with_more_rows_are_refused() -> None:
    message = types_pb2.LayerTimes(layer_bytes=1, rows=[1, 2], seconds=[2.0, 1.0], head_seconds=1.0)
    with pytest.raises(PlanError, match="more rows took less time"):
        layer_times_of(message)


def test_a_rate_below_zero_is_no_rate() -> None:
    assert disk_of(types_pb2.DiskFigures(read_bytes_per_second=-1.0)) == DiskFigures(0, 0.0, 0.0)
