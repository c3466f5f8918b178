"""Delivered tensors hashed just before they are used, while those before them are.

So a wrong byte is never computed with, and none is read from the disk twice: what was hashed is in
the page cache when it is packed. Tensors of a whole file or of a synthetic model pass unseen.
"""

from __future__ import annotations

import collections
import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from potluck.cursor import shown
from potluck.errors import DamagedTensor
from potluck.gguf import GgufFile, TensorInfo
from potluck.tensor_writer import check_file

# Hashed and not yet used, at most: two layers of LLaMA-7B in Q4_0. One tensor may always be.
AHEAD_BYTES = 2**28
# A core hashes 1.65 GB/s where it has instructions for it and 0.2 without, as on a Raspberry Pi 4.
MOST_THREADS = 4


@contextlib.contextmanager
def verified(file: GgufFile, tensors: Iterable[TensorInfo]) -> Iterator[Iterator[TensorInfo]]:
    """The same tensors in the same order, each with the right bytes. Left early, hashing stops.

    Raises DamagedTensor, which names the tensor, when its turn has come; the file is gone then.
    `tensors` is gone through by another thread: if it waits for something, that must end when the
    context is left.
    """
    if file.stored is None:
        yield iter(tensors)
        return
    ahead = _Ahead(file, iter(tensors))
    try:
        yield ahead.taken()
    finally:
        ahead.stop()


class _Ahead:
    """Tensors that are being hashed. `taken` and `stop` are for one thread."""

    def __init__(self, file: GgufFile, tensors: Iterator[TensorInfo]) -> None:
        self._file = file
        self._tensors = tensors
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._queue: collections.deque[tuple[TensorInfo, Future[None]]] = collections.deque()
        self._ahead_bytes = 0
        self._is_stopped = False
        self._is_at_end = False
        self._error: BaseException | None = None  # of the iterator
        self._pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "hashing")
        self._feeder = threading.Thread(target=self._feed, name="hashing", daemon=True)
        self._feeder.start()

    def taken(self) -> Iterator[TensorInfo]:
        """Each when it is known to be right; it counts as used when the next one is asked for."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_at_end)
                if not self._queue:
                    if self._error is not None:
                        raise self._error
                    return
                tensor, hashing = self._queue[0]
            hashing.result()
            yield tensor
            with self._changed:
                self._queue.popleft()
                self._ahead_bytes -= tensor.size_bytes
                self._changed.notify_all()

    def stop(self) -> None:
        """Ends all threads."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        self._feeder.join()
        self._pool.shutdown(cancel_futures=True)

    def _feed(self) -> None:
        """In a thread of its own: the iterator may wait for tensors that are still on their way."""
        try:
            for tensor in self._tensors:
                with self._changed:
                    while not (self._is_stopped or self._has_room(tensor)):
                        self._changed.wait()
                    if self._is_stopped:
                        return
                    self._queue.append((tensor, self._pool.submit(self._check, tensor)))
                    self._ahead_bytes += tensor.size_bytes
                    self._changed.notify_all()
        except BaseException as e:  # noqa: BLE001  raised again where tensors are taken
            self._error = e
        finally:
            with self._changed:
                self._is_at_end = True
                self._changed.notify_all()

    def _has_room(self, tensor: TensorInfo) -> bool:
        return not self._queue or self._ahead_bytes + tensor.size_bytes <= AHEAD_BYTES

    def _check(self, tensor: TensorInfo) -> None:
        try:
            check_file(self._file.stored_path(tensor.name), lambda: not self._is_stopped)
        except DamagedTensor as e:
            raise DamagedTensor(f"{shown(tensor.name)}: {e.message}", remedy=e.remedy) from e
