"""Sums of tensors: right, made once, remembered, and never those of another file."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from potluck import gguf, manifest
from potluck.errors import ModelError, UnknownModel
from potluck.gguf import GgufFile
from potluck.manifest import Manifest
from potluck.testing import TinyShape, write_tiny


@pytest.fixture
def file(tmp_path: Path) -> GgufFile:
    return gguf.read(write_tiny(tmp_path / "m.gguf", TinyShape(tied=True)))


def sums_of(file: GgufFile) -> dict[str, bytes]:
    """Once more, by another way."""
    data = file.path.read_bytes()
    return {
        t.name: hashlib.sha256(data[t.offset_bytes :][: t.size_bytes]).digest()
        for t in file.tensors.values()
    }


def test_sums_are_those_of_the_bytes_in_the_file(file: GgufFile, tmp_path: Path) -> None:
    sums = Manifest(file, tmp_path / "sums")
    expected = sums_of(file)
    assert len(set(expected.values())) > 5
    for tensor in file.tensors.values():
        assert sums.sha256(tensor) == expected[tensor.name]
        found = sums.tensor_of(expected[tensor.name])
        assert found is not None
        assert expected[found.name] == expected[tensor.name]
    assert sums.tensor_of(b"\0" * 32) is None
    assert hashlib.sha256(sums.header()).hexdigest() == file.header_sha256


def test_a_second_start_reads_no_tensor(
    file: GgufFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Manifest(file, tmp_path / "sums")
    sums = {t.name: first.sha256(t) for t in file.tensors.values()}
    monkeypatch.setattr(Manifest, "_hashed", None)
    second = Manifest(file, tmp_path / "sums")
    assert {t.name: second.sha256(t) for t in file.tensors.values()} == sums
    assert all(second.tensor_of(sha256) for sha256 in sums.values())


@pytest.mark.parametrize("damage", ["flip", "cut", "nonsense", "not text"])
def test_a_damaged_record_is_made_again(file: GgufFile, tmp_path: Path, damage: str) -> None:
    first = Manifest(file, tmp_path / "sums")
    for tensor in file.tensors.values():
        first.sha256(tensor)
    (record,) = (tmp_path / "sums").iterdir()
    text = record.read_text()
    digit = "0" if text[0] != "0" else "1"
    damaged = {
        "flip": (digit + text[1:]).encode(),
        "cut": text[:-5].encode(),
        "nonsense": b"what is this\n" + text.encode()[200:],
        "not text": b"\xff\xfe\n" * 40,
    }[damage]
    record.write_bytes(damaged)
    second = Manifest(file, tmp_path / "sums")
    assert {t.name: second.sha256(t) for t in file.tensors.values()} == sums_of(file)


def test_a_file_changed_in_place_is_refused_and_another_one_has_its_own_sums(
    file: GgufFile, tmp_path: Path
) -> None:
    sums = Manifest(file, tmp_path / "sums")
    (first, *_, last) = file.tensors.values()
    before = sums.sha256(last)
    with file.path.open("r+b") as opened:
        opened.seek(last.offset_bytes)
        byte = opened.read(1)[0]
        opened.seek(last.offset_bytes)
        opened.write(bytes([byte ^ 1]))
    os.utime(file.path, ns=(1, sums.modified_ns + 10**9))
    with pytest.raises(ModelError, match="was changed since it was opened"):
        sums.sha256(first)
    with pytest.raises(ModelError, match="was changed since it was opened"):
        sums.read(0, 10)
    after = Manifest(file, tmp_path / "sums").sha256(last)
    assert after != before
    assert after == sums_of(file)[last.name]


def test_a_file_that_is_removed_or_replaced_can_still_be_read(
    file: GgufFile, tmp_path: Path
) -> None:
    expected = sums_of(file)
    sums = Manifest(file, tmp_path / "sums")
    other = write_tiny(tmp_path / "other.gguf", TinyShape(seed=9, tied=True))
    shutil.move(other, file.path)
    tensor = file.tensors["token_embd.weight"]
    assert sums.sha256(tensor) == expected["token_embd.weight"]
    file.path.unlink()
    norm = file.tensors["output_norm.weight"]
    assert sums.sha256(norm) == expected["output_norm.weight"]


def test_another_header_than_the_one_that_was_read_is_refused(
    file: GgufFile, tmp_path: Path
) -> None:
    write_tiny(file.path, TinyShape(n_layers=3))
    with pytest.raises(ModelError, match="was changed"):
        Manifest(file, tmp_path / "sums")
    file.path.unlink()
    with pytest.raises(UnknownModel, match="no such file"):
        Manifest(file, tmp_path / "sums")


def test_a_folder_that_can_not_be_written_costs_the_memory_only(
    file: GgufFile, tmp_path: Path
) -> None:
    (tmp_path / "sums").write_text("a file in its place")
    sums = Manifest(file, tmp_path / "sums")
    for tensor in file.tensors.values():
        assert sums.sha256(tensor) == sums_of(file)[tensor.name]


def test_who_asks_for_the_same_sum_at_once_waits_for_one_hashing(
    file: GgufFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = Manifest(file, tmp_path / "sums")
    real, may_go_on = Manifest._hashed, threading.Event()
    n_hashed: list[str] = []

    def slow(self: Manifest, tensor: gguf.TensorInfo) -> bytes:
        n_hashed.append(tensor.name)
        may_go_on.wait(10)
        return real(self, tensor)

    monkeypatch.setattr(Manifest, "_hashed", slow)
    tensor = file.tensors["token_embd.weight"]
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(sums.sha256, tensor) for _ in range(4)]
        may_go_on.set()
        assert {future.result() for future in asked} == {sums_of(file)[tensor.name]}
    assert len(n_hashed) == 1


def test_records_of_files_long_unused_go(
    file: GgufFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "MANY", 3)
    tensor = file.tensors["output_norm.weight"]
    for i in range(5):
        os.utime(file.path, ns=(1, 10**18 + i * 10**9))
        Manifest(file, tmp_path / "sums").sha256(tensor)
    assert len(list((tmp_path / "sums").iterdir())) == 3
