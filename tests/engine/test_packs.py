"""Packed weights on disk: the same bits, made again when damaged, in memory where disks refuse."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from potluck import engine, gguf, model, packs
from potluck.errors import DamagedPack, ModelError
from potluck.packs import MappedWeights, PackFolder
from potluck.plan import Span
from potluck.testing import TinyShape, write_tiny

F32 = npt.NDArray[np.float32]
EVERYTHING = 2**40
IDS = np.arange(3, 40, dtype=np.int32)


@dataclass
class Loader:
    """Loads spans of one tiny model and runs them."""

    file: gguf.GgufFile
    machine: engine.Engine

    def __post_init__(self) -> None:
        self.config = model.config_of(self.file)
        self.n_layers = self.config.n_layers

    def empty(self, start: int, stop: int) -> tuple[engine.Shard, list[gguf.TensorInfo]]:
        embeds, has_head = start == 0, stop == self.n_layers
        config, span = engine.config_for(self.config), Span(start, stop)
        shard = engine.Shard(
            self.machine, config, start, stop, embeds=embeds, has_head=has_head, kv_bytes=2**20
        )
        return shard, model.span_tensors(
            self.file, self.config, span, embeds=embeds, has_head=has_head
        )

    def in_memory(self) -> F32:
        shard, tensors = self.empty(0, self.n_layers)
        engine.load(shard, self.file, tensors, lambda _: None)
        return self.logits(shard)

    def mapped(
        self,
        folder: PackFolder,
        resident_bytes: int = EVERYTHING,
        span: tuple[int, int] | None = None,
    ) -> tuple[engine.Shard, MappedWeights]:
        shard, tensors = self.empty(*(span or (0, self.n_layers)))
        weights = MappedWeights(shard, self.file, tensors, folder)
        weights.load(lambda *_: None, resident_bytes)
        return shard, weights

    def logits(self, shard: engine.Shard) -> F32:
        shard.close(1)
        shard.open(1, len(IDS))
        out = np.empty((len(IDS), self.config.vocab), np.float32)
        for at in range(0, len(IDS), 16):
            n = len(IDS[at : at + 16])
            rows = [engine.RowSpan(1, at, n, n)]
            shard.forward(IDS[at : at + 16], rows, out[at : at + 16])
        return out


@pytest.fixture(scope="module")
def machine() -> engine.Engine:
    return engine.Engine(2)


@pytest.fixture
def loader(tmp_path: Path, machine: engine.Engine) -> Loader:
    shape = TinyShape(n_layers=4)
    return Loader(gguf.read(write_tiny(tmp_path / "tiny.gguf", shape)), machine)


@pytest.fixture
def folder(tmp_path: Path) -> PackFolder:
    return PackFolder(tmp_path / "packs")


def names(folder: PackFolder) -> list[str]:
    return sorted(p.name for p in folder.root.glob("*/*"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("resident_bytes", [0, 10**6, EVERYTHING])
def test_every_start_gives_the_bits_of_weights_in_memory(
    tmp_path: Path, machine: engine.Engine, folder: PackFolder, resident_bytes: int, *, tied: bool
) -> None:
    shape = TinyShape("q6_k", dim=256, n_layers=4, head_dim=64, ffn_dim=256, tied=tied)
    loader = Loader(gguf.read(write_tiny(tmp_path / "tiny.gguf", shape)), machine)
    expected = loader.in_memory()
    assert np.std(expected) > 0.1
    stamps = set()
    for _ in range(3):
        shard, _weights = loader.mapped(folder, resident_bytes)
        stamps.add(tuple(p.stat().st_ino for p in sorted(folder.root.glob("*/*"))))
        np.testing.assert_array_equal(loader.logits(shard), expected)
        assert (shard.n_streamed > 0) == (resident_bytes < EVERYTHING)
    assert len(stamps) == 1  # later starts wrote nothing
    assert names(folder) == ["embedding.P8k4.pack", "head.P8k4.pack"] + [
        f"layer-{i}.P8k4.pack" for i in range(4)
    ]


def test_the_room_that_a_pack_takes_is_known_before(loader: Loader, folder: PackFolder) -> None:
    shard, tensors = loader.empty(0, loader.n_layers)
    loader.mapped(folder)
    for part, members in packs.parts_of(tensors).items():
        sources = [(t.name, t.type_name, t.rows, t.cols, 0) for t in members]
        assert folder.path_of(loader.file, part).stat().st_size == shard.pack_bytes(sources)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_counts_as_a_unit_only_if_it_is_the_head(
    tmp_path: Path, *, tied: bool
) -> None:
    file = gguf.read(write_tiny(tmp_path / "tiny.gguf", TinyShape(n_layers=2, tied=tied)))
    config = model.config_of(file)
    layers = [model.layer_bytes(file, config, i) for i in range(2)]
    for start, stop, ends in ((0, 2, [model.head_bytes(file, config)]), (0, 1, [])):
        tensors = model.span_tensors(
            file, config, Span(start, stop), embeds=True, has_head=bool(ends)
        )
        assert packs.unit_bytes(tensors) == layers[start:stop] + ends


def test_a_layer_moves_to_another_span_without_packing(loader: Loader, folder: PackFolder) -> None:
    loader.mapped(folder, span=(0, 3))
    before = {p.name: p.stat().st_ino for p in folder.root.glob("*/*")}
    loader.mapped(folder, span=(2, 4))
    after = {p.name: p.stat().st_ino for p in folder.root.glob("*/*")}
    assert after.items() > before.items()
    assert set(after) - set(before) == {"layer-3.P8k4.pack", "head.P8k4.pack"}


@pytest.mark.parametrize("kind", ["header", "short", "empty", "another model", "no file"])
def test_a_pack_that_is_not_right_is_made_again_with_one_line(
    loader: Loader, folder: PackFolder, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = loader.logits(loader.mapped(folder)[0])
    path = folder.path_of(loader.file, "layer-2")
    right = path.read_bytes()
    path.unlink()
    match kind:
        case "header":
            path.write_bytes(right[:40] + b"\xff" + right[41:])
        case "short":
            path.write_bytes(right[:-9])
        case "empty":
            path.write_bytes(b"")
        case "another model":
            path.write_bytes(folder.path_of(loader.file, "layer-1").read_bytes())
        case _:
            path.mkdir()
            path.rmdir()
    caplog.set_level(logging.INFO, "potluck.packs")
    shard, _weights = loader.mapped(folder)
    assert len(caplog.records) == (kind != "no file")
    assert path.read_bytes() == right
    np.testing.assert_array_equal(loader.logits(shard), expected)


def test_a_model_that_was_written_again_is_packed_again(
    loader: Loader, folder: PackFolder, tmp_path: Path
) -> None:
    loader.mapped(folder)
    other = write_tiny(tmp_path / "other.gguf", TinyShape(n_layers=4, seed=2)).read_bytes()
    mine = (tmp_path / "tiny.gguf").read_bytes()
    assert len(other) == len(mine)
    header = loader.file.data_offset_bytes
    (tmp_path / "tiny.gguf").write_bytes(mine[:header] + other[header:])
    new = Loader(gguf.read(tmp_path / "tiny.gguf"), loader.machine)
    assert new.file.header_sha256 == loader.file.header_sha256
    np.testing.assert_array_equal(new.logits(new.mapped(folder)[0]), new.in_memory())


def test_contents_that_changed_are_made_again_and_the_step_repeated(
    loader: Loader, folder: PackFolder, caplog: pytest.LogCaptureFixture
) -> None:
    expected = loader.logits(loader.mapped(folder)[0])
    for part in ("embedding", "layer-0", "layer-3", "head"):
        path = folder.path_of(loader.file, part)
        data = bytearray(path.read_bytes())
        data[64 * 1024 + 7] ^= 1
        path.unlink()
        path.write_bytes(data)
    shard, weights = loader.mapped(folder)
    for _ in range(4):
        with pytest.raises(DamagedPack, match="is not what was written"):
            loader.logits(shard)
        weights.repair()
    np.testing.assert_array_equal(loader.logits(shard), expected)
    assert shard.damaged_packs() == []
    assert len(caplog.records) == 4
    # The disk has them right, too.
    np.testing.assert_array_equal(loader.logits(loader.mapped(folder)[0]), expected)


def test_a_disk_that_never_returns_what_was_written_ends_in_an_error(
    loader: Loader, folder: PackFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder.path_of(loader.file, "layer-1")

    def damage() -> None:
        data = bytearray(path.read_bytes())
        data[64 * 1024 + 7] ^= 1
        path.unlink()
        path.write_bytes(data)

    loader.mapped(folder)
    damage()
    shard, weights = loader.mapped(folder)
    real = weights._map

    def map_damaged(path_: str) -> str:
        damage()
        return real(path_)

    monkeypatch.setattr(weights, "_map", map_damaged)
    for _ in range(packs.MOST_REPAIRS):
        with pytest.raises(DamagedPack):
            loader.logits(shard)
        weights.repair()
    with pytest.raises(DamagedPack):
        loader.logits(shard)
    with pytest.raises(ModelError, match="the disk returns other bytes"):
        weights.repair()


def test_where_nothing_can_be_written_weights_are_kept_in_memory(
    loader: Loader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    shard, _weights = loader.mapped(PackFolder(tmp_path / "file"))
    np.testing.assert_array_equal(loader.logits(shard), loader.in_memory())
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "what is not on disk is kept in memory" in caplog.text
    with pytest.raises(ModelError, match="do not fit into the 0 of memory"):
        loader.mapped(PackFolder(tmp_path / "file"), resident_bytes=1000)


def test_a_full_disk_is_no_failure(
    loader: Loader, folder: PackFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine's own words for it; a limit of the process stands for the disk."""
    script = f"""
import resource, signal, logging
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from potluck import engine, gguf, model, packs
from potluck.plan import Span
from pathlib import Path
logging.basicConfig()
file = gguf.read({str(loader.file.path)!r})
config = model.config_of(file)
shard = engine.Shard(engine.Engine(2), engine.config_for(config), 0, 4, embeds=True, has_head=True,
                     kv_bytes=2**20)
tensors = model.span_tensors(file, config, Span(0, 4), embeds=True, has_head=True)
folder = packs.PackFolder(Path({str(folder.root)!r}))
packs.MappedWeights(shard, file, tensors, folder).load(lambda *_: None, 2**40)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stderr
    assert not list(folder.root.glob("*/*.part-*"))


def test_packs_take_no_more_room_than_allowed_and_the_oldest_go_first(
    loader: Loader, folder: PackFolder, caplog: pytest.LogCaptureFixture
) -> None:
    expected = loader.logits(loader.mapped(folder)[0])
    own = sum(p.stat().st_size for p in folder.root.glob("*/*"))
    others = []
    for i in range(4):
        other = folder.root / f"other{i}" / "layer-0.P8k4.pack"
        other.parent.mkdir()
        other.write_bytes(bytes(200_000))
        os.utime(other, (i, i))
        others.append(other)
    for pack in folder.root.glob(f"{loader.file.header_sha256}/*"):
        pack.unlink()
    small = PackFolder(folder.root, own + 450_000)
    shard, _weights = loader.mapped(small)
    assert [p.exists() for p in others] == [False, False, True, True]
    assert sum(p.stat().st_size for p in folder.root.glob("*/*")) <= own + 450_000
    np.testing.assert_array_equal(loader.logits(shard), expected)
    # Too little for this model alone: some of it stays in memory, and nothing of it is thrown out.
    for pack in folder.root.glob(f"{loader.file.header_sha256}/*"):
        pack.unlink()
    caplog.clear()
    shard, _weights = loader.mapped(PackFolder(folder.root, own // 2))
    assert sum(p.stat().st_size for p in folder.root.glob("*/*")) <= own // 2
    assert 0 < len(names(folder)) < 6
    assert "packs may take" in caplog.text
    np.testing.assert_array_equal(loader.logits(shard), expected)


def test_own_packs_of_another_span_or_layout_go_after_those_of_other_models(
    loader: Loader, folder: PackFolder
) -> None:
    own = folder.path_of(loader.file, "head").parent
    loader.mapped(folder)
    used = sum(p.stat().st_size for p in own.iterdir())
    shutil.rmtree(own)
    old = [own / name for name in ("layer-7.P8k4.pack", "layer-0.P8k2.pack", "layer-9.P8k4.pack")]
    old.append(folder.root / "other" / "layer-0.P8k4.pack")
    for i, path in enumerate(old):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(used // 3))
        os.utime(path, (i, i))
    for space, left in ((3, [False, True, True, False]), (2, [False, False, True, False])):
        small = PackFolder(folder.root, used * (3 + space - 1) // 3)
        loader.mapped(small)
        assert [path.exists() for path in old] == left
        for path in own.glob("layer-[0-3].P8k4.pack"):
            path.unlink()


def test_packs_that_somebody_uses_stay_and_none_goes_in_vain(
    loader: Loader, folder: PackFolder, tmp_path: Path
) -> None:
    file = gguf.read(write_tiny(tmp_path / "other.gguf", TinyShape(n_layers=3)))
    using, _weights = Loader(file, loader.machine).mapped(folder)
    other = folder.path_of(file, "head").parent
    used = {p.name: p.stat().st_size for p in other.iterdir()}
    unused = other / "layer-8.P8k4.pack"
    unused.write_bytes(bytes(200_000))
    path = folder.path_of(loader.file, "layer-0")
    exact = sum(used.values())
    assert "are taken" in PackFolder(folder.root, exact + 99_999).make_room(path, 100_000)
    assert unused.exists()
    assert PackFolder(folder.root, exact + 100_000).make_room(path, 100_000) == ""
    assert {p.name: p.stat().st_size for p in other.iterdir()} == used
    del using, _weights
    assert PackFolder(folder.root, 100_000).make_room(path, 100_000) == ""
    assert not list(other.iterdir())


class RefusingShard:
    """A shard whose system maps or writes nothing."""

    def __init__(self, shard: engine.Shard, refused: str) -> None:
        self._shard = shard
        self._refused = refused

    def __getattr__(self, name: str) -> Any:
        if name == self._refused:
            return lambda *_: "Too many open files"
        return getattr(self._shard, name)


def test_a_good_pack_stays_when_it_can_be_neither_mapped_nor_written(
    loader: Loader, folder: PackFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader.mapped(folder)
    before = {p: p.stat().st_ino for p in folder.root.glob("*/*")}
    shard, tensors = loader.empty(0, loader.n_layers)
    refusing: Any = RefusingShard(shard, "map_pack")
    monkeypatch.setattr(PackFolder, "make_room", lambda *_: "the disk is full")
    MappedWeights(refusing, loader.file, tensors, folder).load(lambda *_: None, EVERYTHING)
    assert {p: p.stat().st_ino for p in folder.root.glob("*/*")} == before
    np.testing.assert_array_equal(loader.logits(shard), loader.in_memory())


def test_a_wrong_pack_gives_its_room_to_the_right_one_where_there_is_none_for_both(
    loader: Loader, folder: PackFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loader.logits(loader.mapped(folder)[0])
    path = folder.path_of(loader.file, "layer-1")
    right = path.read_bytes()
    path.unlink()
    path.write_bytes(right[:40] + b"\xff" + right[41:])
    monkeypatch.setattr(packs, "RESERVE_BYTES", 0)

    def usage(_path: Path) -> Any:
        free = len(right) - (path.stat().st_size if path.exists() else 0)
        return SimpleNamespace(free=free)

    monkeypatch.setattr("potluck.packs.shutil.disk_usage", usage)
    shard, _weights = loader.mapped(folder)
    assert path.read_bytes() == right
    np.testing.assert_array_equal(loader.logits(shard), expected)


def test_weights_kept_in_memory_leave_room_for_two_layers_that_pass(
    loader: Loader, folder: PackFolder
) -> None:
    _shard, tensors = loader.empty(0, loader.n_layers)
    parts = packs.parts_of(tensors)
    loader.mapped(folder)
    folder.path_of(loader.file, "layer-3").unlink()
    layer = sum(t.size_bytes for t in parts["layer-3"])
    others = packs.unit_bytes([t for t in tensors if t not in parts["layer-3"]])
    least = layer + 2 * max(others)
    for resident_bytes in (least, least - 1):
        shard, tensors = loader.empty(0, loader.n_layers)
        refusing: Any = RefusingShard(shard, "write_pack")
        weights = MappedWeights(refusing, loader.file, tensors, folder)
        if resident_bytes == least:
            weights.load(lambda *_: None, resident_bytes)
            np.testing.assert_array_equal(loader.logits(shard), loader.in_memory())
        else:
            with pytest.raises(ModelError, match=f"fit into the {layer - 1} of memory"):
                weights.load(lambda *_: None, resident_bytes)


def test_a_repair_needs_no_reserve_and_counts_only_if_something_was_written(
    loader: Loader, folder: PackFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loader.logits(loader.mapped(folder)[0])
    path = folder.path_of(loader.file, "layer-1")
    data = bytearray(path.read_bytes())
    data[64 * 1024 + 7] ^= 1
    path.unlink()
    path.write_bytes(data)
    shard, weights = loader.mapped(folder)
    with pytest.raises(DamagedPack):
        loader.logits(shard)
    with monkeypatch.context() as patch:
        patch.setattr(PackFolder, "make_room", lambda *_: "the disk is full")
        for _ in range(2 * packs.MOST_REPAIRS):
            with pytest.raises(ModelError, match="can't be made again: the disk is full"):
                weights.repair()
    monkeypatch.setattr(packs, "RESERVE_BYTES", 2**60)
    weights.repair()
    np.testing.assert_array_equal(loader.logits(shard), expected)


def test_the_disk_is_never_filled(
    loader: Loader, folder: PackFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "RESERVE_BYTES", 2**60)
    loader.mapped(folder)
    assert names(folder) == []


def test_what_dead_writers_left_goes_and_what_others_write_stays(
    loader: Loader, folder: PackFolder
) -> None:
    parent = folder.path_of(loader.file, "head").parent
    parent.mkdir(parents=True)
    (parent / "layer-0.P8k4.pack.part-abcdef").write_bytes(b"x")
    with (parent / "layer-1.P8k4.pack.part-ghijkl").open("wb") as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        loader.mapped(folder)
        assert [n for n in names(folder) if "part" in n] == ["layer-1.P8k4.pack.part-ghijkl"]
    loader.mapped(folder)
    assert not any("part" in n for n in names(folder))


SWEEPER = """
import sys, threading
from pathlib import Path
from potluck.packs import PackFolder
is_over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()
folder = PackFolder(Path(sys.argv[1]))
print(flush=True)
while not is_over.is_set():
    folder.sweep()
"""


def test_a_cache_may_be_swept_by_one_process_while_another_fills_it(
    loader: Loader, folder: PackFolder, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", SWEEPER, str(folder.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sweeper:
        assert sweeper.stdout is not None
        sweeper.stdout.readline()
        for turn in range(30):
            root = folder.root / str(turn) if turn % 2 else folder.root
            shard, _weights = loader.mapped(PackFolder(root))
            assert len(names(PackFolder(root))) >= 6
            assert loader.logits(shard).any()
            shutil.rmtree(folder.root)  # as `potluck rm` does
        sweeper.communicate()
    assert sweeper.returncode == 0
    assert "can't be written" not in caplog.text
