"""What callers may do to the engine: change buffers meanwhile, call from several threads, ask for
too much, give damaged data and try again. It answers right or refuses, and never crashes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from potluck import engine, gguf, model
from potluck.errors import FrameError, ModelError, UsageError
from potluck.plan import Span
from potluck.testing import write_tiny

ROOT = Path(__file__).resolve().parents[2]
F32 = npt.NDArray[np.float32]
IDS = np.arange(3, 10, dtype=np.int32)


@dataclass(frozen=True)
class Made:
    """A tiny model, and shards of it."""

    file: gguf.GgufFile
    config: model.ModelConfig

    def tensors(self, start: int = 0, stop: int = 2) -> list[gguf.TensorInfo]:
        return model.span_tensors(
            self.file, self.config, Span(start, stop), embeds=start == 0, has_head=stop == 2
        )

    def empty(self, machine: engine.Engine, start: int = 0, stop: int = 2) -> engine.Shard:
        return engine.Shard(
            machine,
            engine.config_for(self.config),
            start,
            stop,
            embeds=start == 0,
            has_head=stop == 2,
            kv_bytes=1 << 20,
        )

    def shard(self, machine: engine.Engine, start: int = 0, stop: int = 2) -> engine.Shard:
        shard = self.empty(machine, start, stop)
        engine.load(shard, self.file, self.tensors(start, stop), lambda _: None)
        return shard

    def answer(self, shard: engine.Shard, session: int = 1) -> bytes:
        """Logits of a whole session, opened and closed."""
        out = np.full((7, self.config.vocab), np.nan, np.float32)
        shard.open(session, 64)
        shard.forward(IDS, [engine.RowSpan(session, 0, 7, 7)], out)
        shard.close(session)
        return out.tobytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    file = gguf.read(write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf"))
    return Made(file, model.config_of(file))


def test_token_ids_that_change_during_a_step_never_leave_the_vocabulary(made: Made) -> None:
    """They were read twice, checked and then used: the second time from beyond the embedding."""
    shard = made.shard(engine.Engine(2))
    shard.open(1, 64)
    ids = IDS.copy()
    out = np.zeros((1, made.config.vocab), np.float32)
    ended = threading.Event()

    def spoil() -> None:
        while not ended.is_set():
            ids[:] = 2**31 - 1
            ids[:] = IDS

    thread = threading.Thread(target=spoil)
    former = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for _ in range(2000):
            try:
                shard.forward(ids, [engine.RowSpan(1, 0, 7, 1)], out)
            except UsageError as refused:
                assert "2147483647" in str(refused)  # noqa: PT017 - either outcome is right
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(former)


@pytest.mark.parametrize("n_shards", [1, 3])
def test_threads_that_share_a_shard_or_an_engine_get_their_own_answers(
    made: Made, n_shards: int
) -> None:
    machine = engine.Engine(2)
    expected = made.answer(made.shard(machine))
    shards = [made.shard(machine) for _ in range(n_shards)]
    wrong: list[int] = []
    done: list[int] = []

    def ask(number: int) -> None:
        for _ in range(100):
            if made.answer(shards[number % n_shards], session=number) != expected:
                wrong.append(number)
        done.append(number)

    threads = [threading.Thread(target=ask, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2]
    assert not wrong


def test_the_output_may_be_the_input(made: Made) -> None:
    x = np.random.default_rng(1).normal(0, 1, (7, made.config.dim)).astype(np.float32)
    out = np.empty_like(x)
    rows = [engine.RowSpan(1, 0, 7, 0)]
    shard = engine.Shard(
        engine.Engine(2),
        engine.config_for(made.config),
        1,
        2,
        embeds=False,
        has_head=False,
        kv_bytes=1 << 20,
    )
    tensors = model.span_tensors(made.file, made.config, Span(1, 2), embeds=False, has_head=False)
    engine.load(shard, made.file, tensors, lambda _: None)
    shard.open(1, 7)
    shard.forward(x, rows, out)
    shard.truncate(1, 0)
    shard.forward(x, rows, x)
    assert x.tobytes() == out.tobytes()


def test_an_activation_too_large_to_square_is_a_frame_error(made: Made) -> None:
    shard = made.shard(engine.Engine(2), 1, 2)
    shard.open(1, 64)
    x = np.ones((3, made.config.dim), np.float32)
    x[1, 5] = 2e19
    out = np.zeros((1, made.config.vocab), np.float32)
    with pytest.raises(FrameError, match="layer 1, session 1, position 1"):
        shard.forward(x, [engine.RowSpan(1, 0, 3, 1)], out)


def test_after_a_damaged_tensor_the_right_ones_are_taken(made: Made) -> None:
    """What a failed run of the pool had left over was worked on with the next tensor's memory."""
    machine = engine.Engine(3)
    expected = made.answer(made.shard(machine))
    data = made.file.path.read_bytes()
    embedding, *others = sorted(made.tensors(), key=lambda t: t.name != "token_embd.weight")
    for _ in range(20):
        shard = made.empty(machine)
        with pytest.raises(ModelError, match="not finite"):
            put(shard, embedding, b"\xff" * embedding.size_bytes)
        for tensor in (*others, embedding):
            put(shard, tensor, data[tensor.offset_bytes :][: tensor.size_bytes])
        shard.seal()
        assert made.answer(shard) == expected


def put(shard: engine.Shard, tensor: gguf.TensorInfo, data: bytes) -> None:
    shard.put(tensor.name, tensor.type_name, tensor.rows, tensor.cols, 0, data)


@pytest.mark.parametrize("sizes", [(2**60, 2**20, 1), (2**63, 1, 1), (1, 2**62, 1), (8, 32, 2**60)])
def test_a_benchmark_of_absurd_sizes_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="at most 16777216"):
        engine.benchmark_matmul(engine.Engine(1), "f32", *sizes, 1)


def test_threads_that_the_system_does_not_give_are_refused() -> None:
    """A thread that can't be made must not end the program."""
    script = (
        "import resource\n"
        "from potluck import engine\n"
        "from potluck.errors import UsageError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "try: engine.Engine(1024)\n"
        "except UsageError as error: print(error, '/', error.remedy)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith("threads: the system gives ")
    assert ran.stdout.endswith("/ use fewer threads\n")


@pytest.mark.parametrize(
    "ask",
    [
        lambda shard: shard.shard_bytes,
        lambda shard: shard.scratch_bytes,
        lambda shard: shard.kv_used_bytes,
        lambda shard: shard.length(1),
    ],
    ids=["shard_bytes", "scratch_bytes", "kv_used_bytes", "length"],
)
def test_figures_asked_for_during_a_step_leave_python_running(
    made: Made, ask: Callable[[engine.Shard], int]
) -> None:
    """Whoever waits for a shard's mutex must not hold the GIL meanwhile."""
    shard = made.shard(engine.Engine(1, "scalar"))
    shard.open(1, 256)
    ids = np.full(256, 5, np.int32)
    out = np.zeros((0, made.config.vocab), np.float32)
    before = shard.progress
    forward = threading.Thread(
        target=lambda: shard.forward(ids, [engine.RowSpan(1, 0, 256, 0)], out)
    )
    forward.start()
    while shard.progress == before:
        pass
    asker = threading.Thread(target=lambda: ask(shard))
    asker.start()
    passed = 0
    while asker.is_alive():
        passed += 1
        threading.Event().wait(0.001)
    forward.join()
    assert passed > 3
