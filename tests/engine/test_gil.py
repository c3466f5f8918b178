"""The engine computes without the GIL: Python goes on while it does."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

from potluck import engine


def holds_the_gil(call: Callable[[], object]) -> bool:
    """Whether `call`, in another thread, keeps this one from running until it has returned.

    With a switch interval of minutes no thread is made to give the GIL away, so this one runs in
    the middle of `call` only if `call` gives it away by itself. That does not depend on how busy
    the machine is, as long as `call` takes longer than this thread needs to wake up.
    """
    began = threading.Event()
    ended = threading.Event()

    def run() -> None:
        began.set()
        call()
        ended.set()

    former = sys.getswitchinterval()
    sys.setswitchinterval(300)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        began.wait()
        return ended.is_set()
    finally:
        sys.setswitchinterval(former)
        thread.join()


@pytest.fixture(scope="module")
def machine() -> engine.Engine:
    return engine.Engine(1)


def test_the_check_itself_tells_who_holds_the_gil() -> None:
    assert holds_the_gil(lambda: sum(range(3_000_000)))
    assert not holds_the_gil(lambda: threading.Event().wait(0.5))


def test_a_matmul_gives_the_gil_away(machine: engine.Engine) -> None:
    x = np.ones((256, 2048), np.float32)
    weights = np.ones((2048, 2048), np.float32)
    out = np.zeros((256, 2048), np.float32)

    def long() -> None:
        for _ in range(4):
            engine.matmul(machine, "f32", 2048, 2048, weights, x, out)

    assert not holds_the_gil(long)
    assert out[0, 0] == 2048


def test_the_memory_probe_gives_the_gil_away(machine: engine.Engine) -> None:
    assert not holds_the_gil(lambda: machine.read_bandwidth(64 << 20, 100))


def test_a_benchmark_gives_the_gil_away(machine: engine.Engine) -> None:
    assert not holds_the_gil(lambda: engine.benchmark_matmul(machine, "q4_0", 2048, 2048, 256, 20))


def test_checksums_and_exponentials_give_the_gil_away() -> None:
    many = np.zeros(1 << 22, dtype=np.uint8)
    logits = many.view(np.float32)
    # Many calls, so that the other thread has half a second in which to find the GIL free.
    assert not holds_the_gil(lambda: [engine.crc32c(many) for _ in range(1000)])
    assert not holds_the_gil(lambda: [engine.log_sum_exp(logits) for _ in range(400)])
    assert not holds_the_gil(lambda: times(400, lambda: engine.exp(logits, logits)))


def times(n: int, call: Callable[[], None]) -> None:
    for _ in range(n):
        call()
