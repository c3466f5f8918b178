"""Which step is next: numbers, repeats and the answers kept for them.

Pure: no clock, no engine, no asyncio. Owned by worker/stage.py. Links keep order, so one counter an
epoch is enough: a step is next, a repeat, of an epoch that is over, or behind a gap.
"""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum
from typing import Generic, TypeVar

from potluck.errors import FrameError, StepError, UsageError
from potluck.rpc.v1 import worker_pb2

ROWS_LIMIT = 512  # tokens a step
REMEMBERED_MESSAGES = 16
REMEMBERED_BYTES = 16 * 2**20

M = TypeVar("M")


class Arrival(Enum):
    """What the number of a step says about it."""

    NEXT = "next"
    REPEAT = "repeat"  # answered from memory
    STALE = "stale"  # of an epoch that is over: the header alone is passed on


class StepOrder:
    """Epoch and number of the newest step received; `loaded_epoch` is the plan's."""

    def __init__(self, loaded_epoch: int) -> None:
        self.loaded_epoch = loaded_epoch
        self.epoch = loaded_epoch
        self.next_step = 1

    def check(self, epoch: int, step: int) -> Arrival:
        """Changes nothing. Raises UsageError for a zero, StepError for a gap."""
        if epoch == 0 or step == 0:
            raise UsageError(f"epoch {epoch}, step {step}: both are counted from 1")
        if epoch < self.epoch:
            return Arrival.STALE
        expected = self.next_step if epoch == self.epoch else 1
        if step > expected:
            raise StepError(f"epoch {epoch}: step {step} came, step {expected} is next")
        return Arrival.NEXT if step == expected else Arrival.REPEAT

    def accept(self, epoch: int, step: int) -> None:
        """The step that `check` called next has been taken in."""
        assert self.check(epoch, step) is Arrival.NEXT
        self.epoch, self.next_step = epoch, step + 1


class Remembered(Generic[M]):
    """The newest outgoing messages of one epoch, bounded by count and bytes; the newest always."""

    def __init__(
        self, most_messages: int = REMEMBERED_MESSAGES, most_bytes: int = REMEMBERED_BYTES
    ) -> None:
        self._most_messages = most_messages
        self._most_bytes = most_bytes
        self._messages: OrderedDict[tuple[int, int], tuple[M, int]] = OrderedDict()
        self._bytes = 0

    def keep(self, epoch: int, step: int, message: M, size_bytes: int) -> None:
        """`message` answers repeats of the step from now on."""
        self._messages[epoch, step] = (message, size_bytes)
        self._bytes += size_bytes
        while len(self._messages) > 1 and (
            len(self._messages) > self._most_messages or self._bytes > self._most_bytes
        ):
            _, (_, dropped_bytes) = self._messages.popitem(last=False)
            self._bytes -= dropped_bytes

    def find(self, epoch: int, step: int) -> M | None:
        """The answer of that step; None if it is forgotten."""
        found = self._messages.get((epoch, step))
        return found[0] if found else None


def check_batch(step: worker_pb2.Step, *, embeds: bool) -> int:
    """Tokens in the step's batch. Raises UsageError: too many; FrameError: an activation where
    none belongs, or none where one does. Its contents are potluck/wire.py's business.
    """
    n_rows = sum(len(rows.token_ids) for rows in step.rows)
    if n_rows > ROWS_LIMIT:
        raise UsageError(f"{n_rows} rows; a step has at most {ROWS_LIMIT}")
    needs = n_rows > 0 and not embeds
    if step.HasField("activation") != needs:
        found = "an activation" if step.HasField("activation") else "no activation"
        where = "the first stage, which takes token ids" if embeds else f"{n_rows} rows"
        raise FrameError(f"{found} for {where}")
    return n_rows
