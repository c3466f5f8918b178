"""Models are written whole, as they were meant, from any source, and after any interruption."""

from __future__ import annotations

import shutil
import tracemalloc
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from potluck import gguf, model_writer
from potluck.errors import ModelError
from potluck.gguf_source import gguf_source
from potluck.model_writer import Progress, Start, write_model
from potluck.tensor_source import ModelSource, Typed
from potluck.testing import Tensor, TinyShape, dequantize, write_gguf, write_tiny
from potluck.testing import Typed as Odd
from potluck.testing.writer import Metadata
from potluck.type_mix import CHOICES, choice_of

F16, Q4_0, Q8_0 = choice_of("f16"), choice_of("q4_0"), choice_of("q8_0")
SHAPE = TinyShape("f16", dim=256, n_layers=2, head_dim=64, ffn_dim=512)


@dataclass
class Rows:
    """A TensorSource over an array; what was asked for stays in `reads`."""

    name: str
    values: np.ndarray
    type_name: str = "f32"
    fails_at: int = 10**9  # a row whose reading is interrupted
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self, first_row: int, n_rows: int) -> bytes | memoryview:
        self.reads.append((first_row, n_rows))
        if first_row + n_rows > self.fails_at:
            raise KeyboardInterrupt
        rows = self.values.reshape(-1, self.values.shape[-1])
        return rows[first_row : first_row + n_rows].tobytes()


def rows(name: str, *shape: int, seed: int = 1) -> Rows:
    values = np.random.default_rng(seed).standard_normal(shape) * 0.02
    return Rows(name, values.astype(np.float32))


def model_of(*tensors: Rows, identity: str = "test") -> ModelSource:
    return ModelSource([("general.architecture", "llama")], tensors, identity)


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tensor of 64 rows takes many."""
    monkeypatch.setattr(model_writer, "SLAB_BYTES", 8 * 256 * 4)


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_gives_a_model_with_the_values_of_its_source(
    tmp_path: Path, name: str
) -> None:
    source = gguf.read(write_tiny(tmp_path / "in.gguf", SHAPE))
    choice = choice_of(name)
    done = write_model(gguf_source(source), tmp_path / "out.gguf", choice, threads=2)
    file = gguf.read(tmp_path / "out.gguf")
    assert list(file.tensors) == list(source.tensors)
    assert file.integer("general.file_type") == choice.file_type
    assert (done.size_bytes, done.n_tensors) == (file.size_bytes, len(file.tensors))
    assert sum(done.types.values()) == sum(t.size_bytes for t in file.tensors.values())
    old, new = source.path.read_bytes(), file.path.read_bytes()
    for tensor in file.tensors.values():
        before = source.tensors[tensor.name]
        x = dequantize(old[before.offset_bytes :][: before.size_bytes], before.type_name)
        y = dequantize(new[tensor.offset_bytes :][: tensor.size_bytes], tensor.type_name)
        error = np.sqrt(np.mean((x - y) ** 2) / np.mean(x**2))
        # Four bits leave 0.07 to 0.1 of the values' size, five half of that.
        most = {"f32": 0, "f16": 0, "bf16": 0.002, "q8_0": 0.006, "q6_k": 0.02}
        assert error <= most.get(tensor.type_name, 0.1 if "4" in tensor.type_name else 0.05)


def test_metadata_is_carried_over_with_its_exact_types(tmp_path: Path) -> None:
    pairs: list[tuple[str, Metadata]] = [
        ("general.architecture", "unheard-of"),
        ("general.file_type", 1),
        ("a", Odd("u64", 7)),
        ("b", Odd("f64", [0.1, 0.2])),
        ("c", Odd("i8", [-1])),
        ("d", ["x", "ü"]),
        ("general.alignment", 64),
        ("e", Odd("bool", [True])),
    ]
    weight = Tensor("a.weight", "f16", (2, 32), np.ones(64, "<f2").tobytes())
    odd = Tensor("order", "i32", (3, 5), np.arange(15, dtype="<i4").tobytes())
    path = write_gguf(tmp_path / "in.gguf", pairs, [weight, odd], alignment=64)
    write_model(gguf_source(gguf.read(path)), tmp_path / "out.gguf", Q8_0)
    old, new = gguf.read(path), gguf.read(tmp_path / "out.gguf")
    assert list(new.metadata) == [*old.metadata, "general.quantization_version"]
    kept = [key for key in old.metadata if key != "general.file_type"]
    assert [new.kinds[key] for key in kept] == [old.kinds[key] for key in kept]
    assert all(new.metadata[key] == old.metadata[key] for key in kept)
    assert (new.metadata["general.file_type"], new.kinds["general.file_type"]) == (7, "u32")
    assert new.tensors["a.weight"].type_name == "q8_0"
    place = new.tensors["order"].offset_bytes
    assert place % 64 == 0
    assert new.path.read_bytes()[place : place + 60] == odd.data


def test_a_tensor_of_the_wanted_type_is_copied_byte_for_byte(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "in.gguf", TinyShape("q4_0", embedding_type="q8_0"))
    started: list[Start] = []
    write_model(gguf_source(gguf.read(path)), tmp_path / "o", Q4_0, on_start=started.append)
    old, new = gguf.read(path), gguf.read(tmp_path / "o")
    for tensor in new.tensors.values():
        before = old.tensors[tensor.name]
        if before.type_name == tensor.type_name:
            data = path.read_bytes()[before.offset_bytes :][: before.size_bytes]
            assert new.path.read_bytes()[tensor.offset_bytes :][: tensor.size_bytes] == data
    assert started[0].requantized == ("q8_0",)  # the embedding; the head stays


def test_writing_16_bits_is_no_further_loss(tmp_path: Path) -> None:
    source = gguf_source(gguf.read(write_tiny(tmp_path / "in.gguf", TinyShape("q4_0"))))
    started: list[Start] = []
    write_model(source, tmp_path / "o", choice_of("f16"), on_start=started.append)
    assert started[0].requantized == ()


@pytest.mark.usefixtures("small_slabs")
def test_slabs_and_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tensors() -> list[Rows]:
        return [rows("token_embd.weight", 65, 256), rows("v", 7), rows("output.weight", 3, 256)]

    seen: list[Progress] = []
    first = tensors()
    write_model(model_of(*first), tmp_path / "a", Q4_0, threads=3, on_progress=seen.append)
    assert first[0].reads == [(i, min(8, 65 - i)) for i in range(0, 65, 8)]
    assert [p.done_bytes for p in seen] == sorted({p.done_bytes for p in seen})
    monkeypatch.undo()
    whole = tensors()
    write_model(model_of(*whole), tmp_path / "b", Q4_0, threads=1)
    assert whole[0].reads == [(0, 65)]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("fails_at", [0, 30, 63])
def test_an_interruption_anywhere_is_gone_on_from(tmp_path: Path, fails_at: int) -> None:
    tensors = [rows(f"{i}.weight", 64, 256, seed=i) for i in range(3)]
    write_model(model_of(*tensors), tmp_path / "whole", Q4_0)
    for t in tensors:
        t.reads.clear()
    source = model_of(tensors[0], replace(tensors[1], fails_at=fails_at), tensors[2])
    with pytest.raises(KeyboardInterrupt):
        write_model(source, tmp_path / "x", Q4_0)
    assert not (tmp_path / "x").exists()
    for t in tensors:
        t.reads.clear()
    done = write_model(model_of(*tensors), tmp_path / "x", Q4_0)
    assert done.resumed_bytes > 64 * 256 // 32 * 18
    assert tensors[0].reads == []
    assert (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if ".part" in p.name] == []


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("change", ["identity", "type", "version", "format"])
def test_what_began_otherwise_is_begun_afresh(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [rows("0.weight", 64, 256), rows("1.weight", 64, 256)]
    source = model_of(tensors[0], replace(tensors[1], fails_at=20))
    with pytest.raises(KeyboardInterrupt):
        write_model(source, tmp_path / "x", Q4_0)
    if change == "version":
        monkeypatch.setattr(model_writer, "__version__", "99")
    if change == "format":
        monkeypatch.setattr(model_writer, "FORMAT", 99)
    identity = "another" if change == "identity" else "test"
    started: list[Start] = []
    done = write_model(
        model_of(*tensors, identity=identity),
        tmp_path / "x",
        Q8_0 if change == "type" else Q4_0,
        on_start=started.append,
    )
    assert (done.resumed_bytes, started[0].discarded) == (0, True)
    assert gguf.read(tmp_path / "x").size_bytes == done.size_bytes


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.nan, "NaN in blk.3.ffn_down.weight, row 17, column 5"),
        (np.inf, "infinity in blk.3.ffn_down.weight, row 17, column 5"),
        (-np.inf, "infinity in blk.3.ffn_down.weight, row 17, column 5"),
        (1e6, "1e+06 in blk.3.ffn_down.weight, row 17, column 5: beyond the range of f16"),
    ],
)
def test_values_that_cannot_be_written_are_named_and_leave_nothing(
    tmp_path: Path, value: float, said: str
) -> None:
    bad = rows("blk.3.ffn_down.weight", 64, 256)
    bad.values[17, 5] = bad.values[18, 0] = value
    with pytest.raises(ModelError) as refusal:
        write_model(model_of(rows("0.weight", 64, 256), bad), tmp_path / "x", F16)
    assert refusal.value.message == said
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_copied_is_checked_too(tmp_path: Path) -> None:
    bad = rows("blk.0.attn_norm.weight", 8)
    bad.values[3] = np.nan
    with pytest.raises(ModelError, match=r"NaN in blk\.0\.attn_norm\.weight, row 0, column 3"):
        write_model(model_of(bad), tmp_path / "x", F16)


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**24 + 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        ModelError, match=r"takes 1 MB and leaves 17 MB of the disk, 17 MB are"
    ) as refusal:
        write_model(model_of(rows("0.weight", 1024, 256)), tmp_path / "x", F16)
    assert "make room for 1 MB more" in refusal.value.remedy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_slabs")
def test_room_that_an_unfinished_file_takes_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [rows("0.weight", 1024, 256), rows("1.weight", 64, 256)]
    with pytest.raises(KeyboardInterrupt):
        write_model(model_of(tensors[0], replace(tensors[1], fails_at=20)), tmp_path / "x", F16)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**24 + 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert write_model(model_of(*tensors), tmp_path / "x", F16).resumed_bytes > 500_000


@pytest.mark.parametrize("how", ["itself", "symlink", "hard link", "part", "other path"])
def test_an_input_is_never_written_over(tmp_path: Path, how: str) -> None:
    path = write_tiny(tmp_path / "in.gguf", SHAPE)
    before, out = path.read_bytes(), tmp_path / "out.gguf"
    if how == "itself":
        out = path
    elif how == "symlink":
        out.symlink_to(path)
    elif how == "hard link":
        out.hardlink_to(path)
    elif how == "part":
        path = path.rename(tmp_path / "out.gguf.part")
    else:
        (tmp_path / "sub").mkdir()
        out = tmp_path / "sub" / ".." / path.name
    with pytest.raises(ModelError, match="is the input"):
        write_model(gguf_source(gguf.read(path)), out, Q8_0, force=True)
    assert path.read_bytes() == before


def test_a_source_that_gives_broken_rows_is_refused(tmp_path: Path) -> None:
    class Short(Rows):
        def read(self, first_row: int, n_rows: int) -> bytes:
            return bytes(super().read(first_row, n_rows))[:-1]

    values = np.zeros((4, 32), np.float32)
    with pytest.raises(ModelError, match=r"0\.weight: .*not whole"):
        write_model(model_of(Short("0.weight", values)), tmp_path / "x", F16)


def test_memory_stays_small_whatever_the_size(tmp_path: Path) -> None:
    """Of a tensor of 64 MB no more than some slabs are held."""

    class Zeros(Rows):
        def read(self, first_row: int, n_rows: int) -> bytes:
            return bytes(n_rows * self.values.shape[-1] * 4)

    values = np.broadcast_to(np.float32(0), (4096, 4096))
    tracemalloc.start()
    try:
        write_model(model_of(Zeros("0.weight", values)), tmp_path / "x", Q4_0, threads=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * model_writer.SLAB_BYTES


def test_a_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", [("split.count", Odd("u16", 3))], [])
    with pytest.raises(ModelError, match="one of 3 parts of a model"):
        gguf_source(gguf.read(path))


def test_types_that_nothing_here_can_read_are_refused_by_name(tmp_path: Path) -> None:
    tensor = Tensor("a.weight", "iq4_nl", (1, 32), bytes(18))
    path = write_gguf(tmp_path / "x.gguf", [("k", 1)], [tensor])
    with pytest.raises(ModelError, match=r"a\.weight: type iq4_nl can't be converted"):
        gguf_source(gguf.read(path))


def test_a_file_that_shrank_since_its_header_was_read_is_named(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "in.gguf", SHAPE)
    source = gguf_source(gguf.read(path))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="changed while it was read; start again"):
        write_model(source, tmp_path / "x", Q8_0)
    assert not (tmp_path / "x").exists()


def test_a_file_type_of_any_kind_is_replaced(tmp_path: Path) -> None:
    source = ModelSource([("general.file_type", Typed("u8", 3))], [rows("v", 4)], "i")
    write_model(source, tmp_path / "x", F16)
    assert gguf.read(tmp_path / "x").kinds["general.file_type"] == "u32"
