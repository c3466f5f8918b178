"""A shard seen from Python: loading, one step, what is refused and how, cancelling, progress."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from potluck import engine, gguf, model
from potluck.errors import (
    Cancelled,
    FrameError,
    Full,
    ModelError,
    SessionError,
    UnknownSession,
    UsageError,
)
from potluck.plan import Span
from potluck.testing import TinyShape, write_tiny

F32 = npt.NDArray[np.float32]
KV_BYTES = 1 << 20
STEP_TOKENS = 32  # of the slow model


@dataclass(frozen=True)
class Tiny:
    file: gguf.GgufFile
    config: model.ModelConfig

    def empty(
        self, start: int = 0, stop: int = 2, threads: int = 2, kv_type: str = "f16"
    ) -> engine.Shard:
        return engine.Shard(
            engine.Engine(threads),
            engine.config_for(self.config),
            start,
            stop,
            embeds=start == 0,
            has_head=stop == self.config.n_layers,
            kv_bytes=KV_BYTES,
            max_sessions=4,
            kv_type=kv_type,
        )

    def tensors(self, start: int = 0, stop: int = 2) -> list[gguf.TensorInfo]:
        return model.span_tensors(
            self.file,
            self.config,
            Span(start, stop),
            embeds=start == 0,
            has_head=stop == self.config.n_layers,
        )

    def shard(self, start: int = 0, stop: int = 2, threads: int = 2) -> engine.Shard:
        shard = self.empty(start, stop, threads)
        engine.load(shard, self.file, self.tensors(start, stop), lambda _: None)
        shard.open(1, 64)
        return shard

    def logits(self, n: int) -> F32:
        return np.full((n, self.config.vocab), np.nan, np.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    file = gguf.read(write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf"))
    return Tiny(file, model.config_of(file))


IDS = np.arange(3, 10, dtype=np.int32)


@pytest.mark.parametrize("kv_type", list(model.KvType))
@pytest.mark.parametrize("head_dim", [16, 22])
def test_python_and_the_engine_count_the_same_bytes_of_a_page(
    tmp_path: Path, kv_type: model.KvType, head_dim: int
) -> None:
    shape = TinyShape("f32", n_heads=2, head_dim=head_dim)
    file = gguf.read(write_tiny(tmp_path / "tiny.gguf", shape))
    odd = Tiny(file, model.config_of(file))
    page_bytes = model.KV_PAGE_TOKENS * model.kv_bytes_per_token(odd.config, Span(0, 2), kv_type)
    assert odd.empty(kv_type=kv_type.value).kv_bytes == KV_BYTES // page_bytes * page_bytes


@pytest.mark.parametrize("kv_type", ["q4", "", "Q8", "q8_0"])
def test_another_type_of_kv_is_refused(tiny: Tiny, kv_type: str) -> None:
    with pytest.raises(UsageError, match=f"kv_type {kv_type}: f16 or q8"):
        tiny.empty(kv_type=kv_type)


def test_a_step_fills_the_output_in_place(tiny: Tiny) -> None:
    shard = tiny.shard()
    out = tiny.logits(2)
    address = out.ctypes.data
    seconds = shard.forward(IDS, [engine.RowSpan(1, 0, 7, 2)], out)
    assert out.ctypes.data == address
    assert np.isfinite(out).all()
    assert len(np.unique(out)) > 100
    assert len(seconds) == tiny.config.n_layers + 1
    assert all(0 <= s < 60 for s in seconds)
    assert shard.length(1) == 7


def test_two_spans_after_each_other_give_the_bits_of_one(tiny: Tiny) -> None:
    whole = tiny.logits(7)
    tiny.shard().forward(IDS, [engine.RowSpan(1, 0, 7, 7)], whole)
    between = np.full((7, tiny.config.dim), np.nan, np.float32)
    tiny.shard(0, 1).forward(IDS, [engine.RowSpan(1, 0, 7, 0)], between)
    frame = memoryview(between.tobytes()).cast("f", between.shape)
    split = tiny.logits(7)
    tiny.shard(1, 2).forward(frame, [engine.RowSpan(1, 0, 7, 7)], split)
    assert split.tobytes() == whole.tobytes()


def test_rows_of_no_wanted_logits_need_no_room_for_them(tiny: Tiny) -> None:
    shard = tiny.shard()
    shard.forward(IDS, [engine.RowSpan(1, 0, 7, 0)], tiny.logits(0))
    assert shard.length(1) == 7


def test_an_engine_lives_as_long_as_its_shards(tiny: Tiny) -> None:
    shard = tiny.shard()  # whose engine nobody else holds
    gc.collect()
    shard.forward(IDS, [engine.RowSpan(1, 0, 7, 1)], tiny.logits(1))


def test_loading_tells_the_bytes_so_far(tiny: Tiny) -> None:
    told: list[int] = []
    tensors = tiny.tensors()
    engine.load(tiny.empty(), tiny.file, tensors, told.append)
    assert len(told) == len(tensors)
    assert told == sorted(set(told))
    assert told[-1] == sum(t.size_bytes for t in tensors)


def test_loading_from_memory_equals_loading_from_the_file(tiny: Tiny) -> None:
    shard = tiny.empty()
    data = tiny.file.path.read_bytes()
    for tensor in tiny.tensors():
        values = memoryview(data)[tensor.offset_bytes :][: tensor.size_bytes]
        shard.put(tensor.name, tensor.type_name, tensor.rows, tensor.cols, 0, values)
    shard.seal()
    shard.open(1, 64)
    rows = [engine.RowSpan(1, 0, 7, 1)]
    out, expected = tiny.logits(1), tiny.logits(1)
    shard.forward(IDS, rows, out)
    tiny.shard().forward(IDS, rows, expected)
    assert out.tobytes() == expected.tobytes()


def test_a_span_names_what_it_needs(tiny: Tiny) -> None:
    needed = {(name, rows, cols) for name, rows, cols in tiny.empty(0, 1).matrices()}
    assert needed == {(t.name, t.rows, t.cols) for t in tiny.tensors(0, 1)}


def test_a_wrong_or_missing_tensor_is_a_model_error_that_names_it(tiny: Tiny) -> None:
    shard = tiny.empty()
    with pytest.raises(ModelError, match=r"blk\.9\.attn_q\.weight"):
        shard.put("blk.9.attn_q.weight", "f32", 64, 64, 0, bytes(64 * 64 * 4))
    with pytest.raises(ModelError, match=r"output_norm\.weight"):
        shard.put("output_norm.weight", "f32", 1, 65, 0, bytes(65 * 4))
    with pytest.raises(ModelError, match="no-such-file"):
        shard.put_file("output_norm.weight", "f32", 1, 64, "/no-such-file", 0)
    with pytest.raises(ModelError, match=r"weight"):
        shard.seal()
    cut = replace(tiny.tensors()[0], offset_bytes=tiny.file.size_bytes - 8)
    with pytest.raises(ModelError, match=cut.name.replace(".", r"\.")):
        engine.load(shard, tiny.file, [cut], lambda _: None)


@pytest.mark.parametrize(
    ("ids", "rows", "shape", "message"),
    [
        (IDS.astype(np.int64), (0, 7, 1), (1, 421), r"input: must be int32 \[7\], not int64 \[7\]"),
        (IDS[:6], (0, 7, 1), (1, 421), r"input: must be int32 \[7\], not int32 \[6\]"),
        (IDS[None, :], (0, 7, 1), (1, 421), r"input: must be int32 \[7\], not int32 \[1, 7\]"),
        (np.arange(14, dtype=np.int32)[::2], (0, 7, 1), (1, 421), "input: must be C-contiguous"),
        (IDS, (0, 7, 2), (1, 421), r"output: must be f32 \[2, 421\], not f32 \[1, 421\]"),
        (IDS, (0, 7, 1), (1, 64), r"output: must be f32 \[1, 421\], not f32 \[1, 64\]"),
        (IDS + 1000, (0, 7, 1), (1, 421), "1003"),
        (-IDS, (0, 7, 1), (1, 421), "-3"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(
    tiny: Tiny,
    ids: npt.NDArray[np.int32],
    rows: tuple[int, int, int],
    shape: tuple[int, int],
    message: str,
) -> None:
    shard = tiny.shard()
    with pytest.raises(UsageError, match=message):
        shard.forward(ids, [engine.RowSpan(1, *rows)], np.zeros(shape, np.float32))
    assert shard.length(1) == 0


def test_counts_that_overflow_are_refused(tiny: Tiny) -> None:
    shard = tiny.shard()
    huge = 2**64 - 1
    spans = [engine.RowSpan(1, 0, huge, 0), engine.RowSpan(2, 0, 8, 0)]
    with pytest.raises(UsageError, match="more tokens than can be counted"):
        shard.forward(IDS, spans, tiny.logits(0))
    spans = [engine.RowSpan(1, 0, 7, huge), engine.RowSpan(2, 0, 0, 1)]
    with pytest.raises(UsageError, match="more logits than can be counted"):
        shard.forward(IDS, spans, tiny.logits(0))


def test_sessions_have_their_own_errors(tiny: Tiny) -> None:
    shard = tiny.shard()
    with pytest.raises(SessionError):
        shard.open(1, 16)
    with pytest.raises(Full):
        shard.open(2, 10**6)
    for call in (
        lambda: shard.truncate(9, 0),
        lambda: shard.fork(9, 2, 16),
        lambda: shard.length(9),
        lambda: shard.forward(IDS, [engine.RowSpan(9, 0, 7, 1)], tiny.logits(1)),
    ):
        with pytest.raises(UnknownSession):
            call()
    shard.close(9)
    with pytest.raises(SessionError, match="3"):
        shard.forward(IDS, [engine.RowSpan(1, 3, 7, 1)], tiny.logits(1))
    shard.close(1)
    with pytest.raises(UnknownSession):
        shard.length(1)
    assert shard.kv_used_bytes == 0
    assert 0 < shard.kv_bytes <= KV_BYTES
    assert shard.shard_bytes > 0
    assert shard.scratch_bytes >= 0


def test_an_activation_that_is_not_finite_is_a_frame_error(tiny: Tiny) -> None:
    shard = tiny.shard(1, 2)
    x = np.ones((3, tiny.config.dim), np.float32)
    x[1, 5] = np.inf
    with pytest.raises(FrameError):
        shard.forward(x, [engine.RowSpan(1, 0, 3, 1)], tiny.logits(1))
    assert shard.length(1) == 0


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A model whose forward on the scalar kernels takes seconds."""
    shape = TinyShape(
        weight_type="f32",
        dim=256,
        n_layers=16,
        n_heads=8,
        n_kv_heads=8,
        head_dim=32,
        ffn_dim=1024,
        context_tokens=1024,
    )
    file = gguf.read(write_tiny(tmp_path_factory.mktemp("slow") / "slow.gguf", shape))
    return Tiny(file, model.config_of(file))


def long_step(slow: Tiny) -> tuple[engine.Shard, npt.NDArray[np.int32], F32]:
    shard = engine.Shard(
        engine.Engine(1, "scalar"),
        engine.config_for(slow.config),
        0,
        slow.config.n_layers,
        embeds=True,
        has_head=True,
        kv_bytes=1 << 25,
    )
    engine.load(shard, slow.file, slow.tensors(0, slow.config.n_layers), lambda _: None)
    shard.open(1, STEP_TOKENS)
    return shard, np.full(STEP_TOKENS, 5, np.int32), slow.logits(1)


def test_a_running_forward_shows_progress_and_is_cancelled_from_another_thread(slow: Tiny) -> None:
    shard, ids, out = long_step(slow)
    ended: list[Exception | None] = []

    def run() -> None:
        try:
            shard.forward(ids, [engine.RowSpan(1, 0, STEP_TOKENS, 1)], out)
            ended.append(None)
        except Cancelled as error:
            ended.append(error)

    before = shard.progress
    thread = threading.Thread(target=run)
    thread.start()
    while shard.progress < before + 3:
        assert thread.is_alive(), "the forward ended before its third phase was seen"
        threading.Event().wait(0.001)
    shard.cancel()
    thread.join()
    assert len(ended) == 1
    assert isinstance(ended[0], Cancelled)
    assert shard.length(1) == 0


def test_a_cancel_between_steps_changes_nothing(tiny: Tiny) -> None:
    shard = tiny.shard()
    shard.cancel()
    shard.forward(IDS, [engine.RowSpan(1, 0, 7, 1)], tiny.logits(1))
    assert shard.length(1) == 7


def test_python_goes_on_while_one_thread_waits_for_a_forward_of_another(slow: Tiny) -> None:
    """A call that waits for the shard's mutex must not hold the GIL: forward would never end."""
    shard, ids, out = long_step(slow)
    before = shard.progress

    def run() -> None:
        with pytest.raises(Cancelled):
            shard.forward(ids, [engine.RowSpan(1, 0, STEP_TOKENS, 1)], out)

    forward = threading.Thread(target=run)
    forward.start()
    while shard.progress == before:
        threading.Event().wait(0.001)
    asker = threading.Thread(target=lambda: shard.length(1))
    asker.start()
    asker.join(0.05)
    assert asker.is_alive(), "length did not wait for the running forward"
    shard.cancel()  # reached only if `asker` gave the GIL away
    forward.join()
    asker.join()
