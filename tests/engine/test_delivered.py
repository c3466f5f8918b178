"""Weights from delivered tensors: the bits of the model's file, and never a wrong byte."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from potluck import engine, gguf, model, packs, verified
from potluck.errors import Cancelled, DamagedTensor, ModelError, UsageError
from potluck.gguf import GgufFile, TensorInfo
from potluck.packs import MappedWeights, PackFolder
from potluck.plan import Span
from potluck.tensor_store import TensorStore
from potluck.testing import TinyShape, write_tiny

F32 = npt.NDArray[np.float32]
IDS = np.arange(3, 30, dtype=np.int32)
EVERYTHING = 2**40
N_LAYERS = 4
UP = "blk.2.ffn_up.weight"


@dataclass
class Delivered:
    """A model as its file and as tensors of a store."""

    whole: GgufFile
    file: GgufFile
    store: TensorStore
    machine: engine.Engine

    def path(self, name: str) -> Path:
        return self.file.stored_path(name)

    def bring(self, tensors: Sequence[TensorInfo]) -> None:
        """To the store, those of them that are not there."""
        data = self.whole.path.read_bytes()
        for tensor in tensors:
            sha256 = bytes.fromhex(self.path(tensor.name).name)
            with self.store.writer(sha256, tensor.size_bytes) as writer:
                at = tensor.offset_bytes
                writer.write(data[at + writer.offset : at + tensor.size_bytes])
                writer.finish()

    def empty(self) -> tuple[engine.Shard, list[TensorInfo]]:
        config = model.config_of(self.file)
        shard = engine.Shard(
            self.machine,
            engine.config_for(config),
            0,
            N_LAYERS,
            embeds=True,
            has_head=True,
            kv_bytes=2**20,
        )
        span = Span(0, N_LAYERS)
        return shard, model.span_tensors(self.file, config, span, embeds=True, has_head=True)

    def loaded(self, file: GgufFile) -> F32:
        shard, tensors = self.empty()
        engine.load(shard, file, tensors, lambda _: None)
        return self.logits(shard)

    def mapped(self, folder: PackFolder, **options: Any) -> tuple[engine.Shard, MappedWeights]:
        shard, tensors = self.empty()
        weights = MappedWeights(shard, self.file, tensors, folder, **options)
        weights.load(lambda *_: None, EVERYTHING)
        return shard, weights

    def logits(self, shard: engine.Shard) -> F32:
        shard.close(1)
        shard.open(1, len(IDS))
        out = np.empty((len(IDS), model.config_of(self.file).vocab), np.float32)
        shard.forward(IDS, [engine.RowSpan(1, 0, len(IDS), len(IDS))], out)
        return out

    def flip(self, name: str) -> None:
        path = self.path(name)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.fixture(scope="module")
def machine() -> engine.Engine:
    return engine.Engine(2)


@pytest.fixture
def deliver(tmp_path: Path, machine: engine.Engine) -> Callable[..., Delivered]:
    def made(shape: TinyShape | None = None) -> Delivered:
        whole = gguf.read(write_tiny(tmp_path / "tiny.gguf", shape or TinyShape(n_layers=N_LAYERS)))
        store = TensorStore(tmp_path / "tensors")
        data = whole.path.read_bytes()
        header = store.put_header(whole.header_sha256, data[: whole.data_offset_bytes])
        stored = {
            t.name: store.path_of(
                hashlib.sha256(data[t.offset_bytes : t.offset_bytes + t.size_bytes]).digest()
            )
            for t in whole.tensors.values()
        }
        file = gguf.read_header(header, whole.size_bytes, stored)
        delivered = Delivered(whole, file, store, machine)
        delivered.bring(list(whole.tensors.values()))
        return delivered

    return made


@pytest.fixture
def delivered(deliver: Callable[..., Delivered]) -> Delivered:
    return deliver()


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith("hashing")]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("type_name", ["q4_0", "q6_k", "f16"])
def test_delivered_tensors_give_the_bits_of_the_file(
    deliver: Callable[..., Delivered], tmp_path: Path, type_name: str, *, tied: bool
) -> None:
    shape = TinyShape(type_name, dim=256, n_layers=4, head_dim=64, ffn_dim=256, tied=tied)
    delivered = deliver(shape)
    expected = delivered.loaded(delivered.whole)
    assert np.std(expected) > 0.1
    delivered.whole.path.unlink()
    np.testing.assert_array_equal(delivered.loaded(delivered.file), expected)
    folder = PackFolder(tmp_path / "packs")
    for _ in range(2):
        np.testing.assert_array_equal(delivered.logits(delivered.mapped(folder)[0]), expected)


@pytest.mark.parametrize("ahead_bytes", [0, 5000, 2**28])
def test_tensors_are_checked_in_their_order_however_far_ahead(
    delivered: Delivered, monkeypatch: pytest.MonkeyPatch, ahead_bytes: int
) -> None:
    monkeypatch.setattr(verified, "AHEAD_BYTES", ahead_bytes)
    tensors = list(delivered.file.tensors.values())
    with verified.verified(delivered.file, iter(tensors)) as right:
        assert list(right) == tensors
    delivered.flip(UP)
    before: list[str] = []
    with (
        pytest.raises(DamagedTensor, match=f"{UP}: .* is damaged: its sha256 is"),
        verified.verified(delivered.file, tensors) as right,
    ):
        before.extend(tensor.name for tensor in right)
    assert before == [t.name for t in tensors][: len(before)]
    assert before == [] or tensors[len(before)].name == UP
    assert not delivered.path(UP).exists()


def test_a_flipped_byte_is_never_loaded_and_only_that_tensor_is_fetched_again(
    delivered: Delivered,
) -> None:
    expected = delivered.loaded(delivered.whole)
    delivered.flip(UP)
    shard, tensors = delivered.empty()
    done: list[int] = []
    with pytest.raises(DamagedTensor, match=UP) as raised:
        engine.load(shard, delivered.file, tensors, done.append)
    assert "load again" in raised.value.remedy
    at = [t.name for t in tensors].index(UP)
    assert done == list(np.cumsum([t.size_bytes for t in tensors[:at]]))
    missing = [n for n in delivered.file.tensors if not delivered.path(n).exists()]
    assert missing == [UP]
    with pytest.raises(DamagedTensor, match=f"{UP}: .*No such file"):
        delivered.loaded(delivered.file)
    delivered.bring(tensors)
    np.testing.assert_array_equal(delivered.loaded(delivered.file), expected)


def test_a_tensor_that_was_not_delivered_is_named(delivered: Delivered) -> None:
    stored = {n: p for n, p in (delivered.file.stored or {}).items() if n != UP}
    file = gguf.read_header(delivered.file.path, delivered.file.size_bytes, stored)
    with pytest.raises(DamagedTensor, match=f"{UP} is not here"):
        delivered.loaded(file)


def test_loading_that_is_given_up_or_has_nothing_more_to_read_ends_at_once(
    delivered: Delivered,
) -> None:
    def give_up(_: int) -> None:
        raise Cancelled("enough")

    shard, tensors = delivered.empty()
    with pytest.raises(Cancelled):
        engine.load(shard, delivered.file, tensors, give_up)

    def coming() -> Iterator[TensorInfo]:
        yield from tensors[:5]
        raise ModelError("the coordinator is gone")

    shard, _ = delivered.empty()
    done: list[int] = []
    with pytest.raises(ModelError, match="the coordinator is gone"):
        engine.load(shard, delivered.file, coming(), done.append)
    assert len(done) == 5


def test_packs_are_mapped_without_the_tensors_and_only_missing_ones_are_brought(
    delivered: Delivered, tmp_path: Path
) -> None:
    folder = PackFolder(tmp_path / "packs")
    expected = delivered.loaded(delivered.whole)
    brought: list[list[str]] = []

    def bring(tensors: Sequence[TensorInfo]) -> None:
        brought.append([t.name for t in tensors])
        delivered.bring(tensors)

    delivered.store.remove()
    delivered.store.put_header(
        delivered.whole.header_sha256,
        delivered.whole.path.read_bytes()[: delivered.whole.data_offset_bytes],
    )
    delivered.mapped(folder, bring=bring)
    assert [len(names) for names in brought] == [len(delivered.file.tensors)]
    delivered.store.remove()
    shard, _ = delivered.mapped(folder, bring=bring)
    assert len(brought) == 1
    np.testing.assert_array_equal(delivered.logits(shard), expected)
    folder.path_of(delivered.file, "layer-1").unlink()
    shard, _ = delivered.mapped(folder, bring=bring)
    assert len(brought) == 2
    assert all(name.startswith("blk.1.") for name in brought[1])
    np.testing.assert_array_equal(delivered.logits(shard), expected)


def test_a_pack_of_other_tensors_is_made_again_and_others_are_kept(
    deliver: Callable[..., Delivered], tmp_path: Path
) -> None:
    folder = PackFolder(tmp_path / "packs")
    delivered = deliver()
    delivered.mapped(folder)
    stamps = {p.name: p.stat().st_ino for p in folder.root.glob("*/*")}
    # The same header, but one layer's matrix is another's.
    stored = dict(delivered.file.stored or {})
    stored[UP] = stored["blk.1.ffn_up.weight"]
    delivered.file = gguf.read_header(delivered.file.path, delivered.file.size_bytes, stored)
    expected = delivered.loaded(delivered.file)
    shard, _ = delivered.mapped(folder)
    np.testing.assert_array_equal(delivered.logits(shard), expected)
    now = {p.name: p.stat().st_ino for p in folder.root.glob("*/*")}
    assert [n for n in now if now[n] != stamps[n]] == ["layer-2.P8k4.pack"]


def test_a_damaged_tensor_never_becomes_a_pack(delivered: Delivered, tmp_path: Path) -> None:
    folder = PackFolder(tmp_path / "packs")
    delivered.flip(UP)
    with pytest.raises(DamagedTensor, match=UP):
        delivered.mapped(folder)
    assert not folder.path_of(delivered.file, "layer-2").exists()
    assert folder.path_of(delivered.file, "layer-1").exists()


def test_a_damaged_pack_is_made_again_of_tensors_that_are_brought(
    delivered: Delivered, tmp_path: Path
) -> None:
    folder = PackFolder(tmp_path / "packs")
    shard, _ = delivered.mapped(folder)
    expected = delivered.logits(shard)
    del shard
    path = folder.path_of(delivered.file, "layer-2")
    data = bytearray(path.read_bytes())
    data[64 * 1024 + 7] ^= 1
    path.unlink()
    path.write_bytes(data)
    delivered.store.remove()
    shard, weights = delivered.mapped(folder)
    with pytest.raises(ModelError):
        delivered.logits(shard)
    with pytest.raises(DamagedTensor, match=r"blk\.2\."):
        weights.repair()
    shard, weights = delivered.mapped(folder, bring=delivered.bring)
    with pytest.raises(ModelError):
        delivered.logits(shard)
    weights.repair()
    np.testing.assert_array_equal(delivered.logits(shard), expected)


def test_delivered_tensors_go_before_packs_but_not_before_they_are_read(
    delivered: Delivered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)

    def used(folder: Path) -> int:
        return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

    folder = PackFolder(tmp_path / "packs", tensors=delivered.store)
    other = folder.root / ("0" * 64) / "layer-0.P8k4.pack"
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(1000))
    delivered.mapped(folder)
    n_bytes = used(folder.root) - 1000
    shutil.rmtree(folder.path_of(delivered.file, "head").parent)
    raw_bytes = delivered.store.total_bytes()
    # Room for the packs when about half of the tensors are gone.
    room = raw_bytes + 1000 + n_bytes - raw_bytes // 2
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda _: usage._replace(
            free=packs.RESERVE_BYTES + room - used(tmp_path / "tensors") - used(folder.root)
        ),
    )
    shard, _ = delivered.mapped(folder)
    assert shard.mapped_bytes == n_bytes
    assert other.exists()
    assert 0 < delivered.store.total_bytes() < raw_bytes


def test_the_engine_takes_an_identity_of_16_bytes_and_no_other_origin() -> None:
    with pytest.raises(UsageError, match="15 bytes, expected 16"):
        engine.TensorFiles(paths={}, identity=bytes(15))
