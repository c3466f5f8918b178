"""A model of which only the header is here: checked like a file, against a size that is claimed."""

from __future__ import annotations

import hashlib
import random
import struct
import tracemalloc
from pathlib import Path

import pytest

from potluck import gguf, model
from potluck.errors import DamagedTensor, ModelError, UnknownModel
from potluck.gguf_source import gguf_source
from potluck.testing import Tensor, TinyShape, write_gguf, write_tiny

SEED = 5


@pytest.fixture
def whole(tmp_path: Path) -> gguf.GgufFile:
    return gguf.read(write_tiny(tmp_path / "tiny.gguf", TinyShape(n_layers=2)))


@pytest.fixture
def header(whole: gguf.GgufFile, tmp_path: Path) -> Path:
    path = tmp_path / "header"
    path.write_bytes(whole.path.read_bytes()[: whole.data_offset_bytes])
    return path


def test_a_header_alone_says_what_its_file_does(whole: gguf.GgufFile, header: Path) -> None:
    stored = {"output_norm.weight": Path("ab"), "of another model": Path("cd")}
    file = gguf.read_header(header, whole.size_bytes, stored)
    assert file.tensors == whole.tensors
    assert (file.size_bytes, file.header_sha256) == (whole.size_bytes, whole.header_sha256)
    assert file.kinds == whole.kinds
    assert dict(file.stored or {}) == {"output_norm.weight": Path("ab")}
    assert model.config_of(file) == model.config_of(whole)
    assert whole.stored is None


def test_tensors_lie_inside_the_size_that_is_claimed(whole: gguf.GgufFile, header: Path) -> None:
    end = max(t.offset_bytes + t.size_bytes for t in whole.tensors.values())
    assert gguf.read_header(header, end, {}).size_bytes == end
    for size in (end - 1, whole.data_offset_bytes, 0, -1):
        with pytest.raises(ModelError, match="behind the end of the file"):
            gguf.read_header(header, size, {})


def test_a_header_is_whole_and_nothing_follows_it(
    whole: gguf.GgufFile, header: Path, tmp_path: Path
) -> None:
    data = header.read_bytes()
    where = random.Random(SEED)
    for size in (0, 3, 4, len(data) - 1, *(where.randrange(len(data)) for _ in range(40))):
        header.write_bytes(data[:size])
        with pytest.raises(ModelError):
            gguf.read_header(header, whole.size_bytes, {})
    for more in (b"\0", data):
        header.write_bytes(data + more)
        with pytest.raises(ModelError, match=f"but the header has {len(data):,}"):
            gguf.read_header(header, whole.size_bytes, {})
    with pytest.raises(UnknownModel):
        gguf.read_header(tmp_path / "none", whole.size_bytes, {})
    with pytest.raises(ModelError, match="a folder"):
        gguf.read_header(tmp_path, whole.size_bytes, {})


def test_a_header_of_any_bytes_is_refused_or_within_its_bounds(
    whole: gguf.GgufFile, header: Path
) -> None:
    data = header.read_bytes()
    where = random.Random(SEED)
    refused = 0
    tracemalloc.start()
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(where.randrange(1, 4)):
            at = where.randrange(len(data))
            changed[at : at + 8] = where.choice(
                (where.randbytes(8), bytes(8), struct.pack("<Q", 2**62), b"\xff" * 8)
            )[: len(data) - at]
        header.write_bytes(changed)
        try:
            file = gguf.read_header(header, whole.size_bytes, {})
        except ModelError:
            refused += 1
            continue
        assert file.data_offset_bytes == len(data)
        for tensor in file.tensors.values():
            stop = tensor.offset_bytes + tensor.size_bytes
            assert len(data) <= tensor.offset_bytes < stop <= whole.size_bytes
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 50 < refused < 300
    assert peak_bytes < 20 * 2**20


def test_a_claimed_alignment_can_not_move_the_data_away(tmp_path: Path) -> None:
    tensors = [Tensor("a", "f32", (8,), bytes(32))]
    path = write_gguf(tmp_path / "a.gguf", [("general.alignment", 32)], tensors)
    whole = gguf.read(path)
    data = bytearray(path.read_bytes()[: whole.data_offset_bytes])
    at = data.index(b"general.alignment") + len("general.alignment") + 4
    data[at : at + 4] = struct.pack("<I", 2**31)
    path.write_bytes(data)
    with pytest.raises(ModelError, match="but the header has 2,147,483,648"):
        gguf.read_header(path, 2**40, {})


def test_small_tensors_come_from_their_own_files_and_only_with_the_right_bytes(
    whole: gguf.GgufFile, header: Path, tmp_path: Path
) -> None:
    norm = whole.tensors["output_norm.weight"]
    data = whole.path.read_bytes()[norm.offset_bytes : norm.offset_bytes + norm.size_bytes]
    path = tmp_path / hashlib.sha256(data).hexdigest()
    file = gguf.read_header(header, whole.size_bytes, {norm.name: path})
    with pytest.raises(DamagedTensor, match="no such file"):
        gguf.read_floats(file, norm)
    path.write_bytes(data)
    assert gguf.read_floats(file, norm) == gguf.read_floats(whole, norm)
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DamagedTensor, match=r"output_norm\.weight"):
        gguf.read_floats(file, norm)
    path.write_bytes(data[:-1])
    with pytest.raises(ModelError, match="1 bytes behind the end of the file"):
        gguf.read_floats(file, norm)
    with pytest.raises(DamagedTensor, match=r"token_embd\.weight is not here"):
        gguf.read_floats(file, whole.tensors["token_embd.weight"])


def test_a_header_alone_is_no_source_to_write_a_model_from(
    whole: gguf.GgufFile, header: Path
) -> None:
    with pytest.raises(ModelError, match="only the header"):
        gguf_source(gguf.read_header(header, whole.size_bytes, {}))
