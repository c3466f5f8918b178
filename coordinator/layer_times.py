"""How long a worker takes for layers and the head of a model, by rows of a step.

Pure. From what its probe measured, or, until it has, from its read bandwidth alone.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from coordinator.sizes import ModelSizes
from potluck.plan import LayerTimes, WorkerInfo

# Without measured times: so many rows are nearly free, as a step of few rows waits for memory; then
# time rises with the rows. Ratios of prompts to generation on plain AVX2 and ARM say 2.5 to 3.5,
# newer CPUs have more: an assumption that is careful with many rows.
ASSUMED_FREE_ROWS = 3.0

# What a worker is taken to read a second if it did not say.
_LEAST_BYTES_PER_SECOND = 1e6


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of one worker for parts of one model; rows of a step are 1 or more."""

    rows: tuple[int, ...]  # rising, from 1
    seconds: tuple[float, ...]  # of one layer for so many rows, never falling
    head_row_seconds: float  # norm and head, one row
    kv_position_seconds: float  # reading one position of one layer

    def layer_seconds(self, rows: int) -> float:
        """Weights of one layer used for `rows` rows: between measured points a straight line,
        beyond the last as steep as before it.
        """
        if len(self.rows) == 1:
            return self.seconds[0] * assumed_growth(rows)
        i = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        x0, x1 = self.rows[i - 1], self.rows[i]
        y0, y1 = self.seconds[i - 1], self.seconds[i]
        return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)

    def head_seconds(self, rows: int) -> float:
        """Norm and head for `rows` rows, which grow as those of a layer do."""
        return self.head_row_seconds * self.layer_seconds(rows) / self.seconds[0]


def speed_of(sizes: ModelSizes, worker: WorkerInfo) -> Speed:
    """Of `worker` for a model of these sizes. Measured layers of another size are scaled by bytes.

    65B's layers of 455 MB at 50 GB/s: 9.1 ms for one row.
    """
    bandwidth = max(worker.read_bytes_per_second, _LEAST_BYTES_PER_SECOND)
    kv = sizes.kv_layer_bytes / bandwidth
    times = worker.times
    if times is None:
        layer = sizes.mean_layer_bytes / bandwidth
        return Speed((1,), (layer,), sizes.head_bytes / bandwidth, kv)
    scale = sizes.mean_layer_bytes / times.layer_bytes
    seconds = tuple(scale * t for t in times.seconds)
    return Speed(times.rows, seconds, _head_seconds(sizes, times), kv)


def assumed_growth(rows: int) -> float:
    """Time of so many rows over that of one, without measurement: (1 + (m/k)^4)^(1/4), one at 1."""
    return float(
        (1 + (rows / ASSUMED_FREE_ROWS) ** 4) ** 0.25 / (1 + ASSUMED_FREE_ROWS**-4) ** 0.25
    )


def _head_seconds(sizes: ModelSizes, times: LayerTimes) -> float:
    if times.head_bytes:
        return times.head_seconds * sizes.head_bytes / times.head_bytes
    return times.seconds[0] * sizes.head_bytes / times.layer_bytes
