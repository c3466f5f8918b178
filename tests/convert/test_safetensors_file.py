"""Safetensors files are read as they are, or refused in one line that names the file."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from potluck.convert.safetensors_file import HEADER_BYTES_LIMIT, open_safetensors
from potluck.errors import ModelError, UnknownModel
from potluck.testing.safetensors import Stored, indices, stored, write_raw, write_safetensors

RANDOM = np.random.default_rng(7)
MATRIX = RANDOM.normal(size=(5, 6)).astype(np.float32)
VECTOR = RANDOM.normal(size=7).astype(np.float32)
TENSORS = {
    "a": stored(MATRIX),
    "b": stored(VECTOR, "f16"),
    "c": stored(MATRIX, "bf16"),
    "ids": indices(3),
}

Change = Callable[[dict[str, Any]], object]


def refusal(path: Path) -> str:
    """The one line in which the file is refused."""
    with pytest.raises(ModelError) as caught:
        open_safetensors(path)
    assert str(path) in caught.value.message
    assert caught.value.message.isprintable()
    return caught.value.message


def accepts(path: Path) -> bool:
    """Whether the library reads the file."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            file.keys()
    except safetensors.SafetensorError:
        return False
    return True


def test_tensors_come_with_type_shape_and_rows(tmp_path: Path) -> None:
    file = open_safetensors(write_safetensors(tmp_path / "x.safetensors", TENSORS))
    assert {n: (t.type_name, t.shape) for n, t in file.tensors.items()} == {
        "a": ("f32", (5, 6)),
        "b": ("f16", (7,)),
        "c": ("bf16", (5, 6)),
        "ids": ("i64", (3,)),
    }
    assert file.tensors["a"].read(0, 5) == MATRIX.tobytes()
    assert file.tensors["a"].read(2, 2) == MATRIX[2:4].tobytes()
    assert file.tensors["a"].read(5, 0) == b""
    assert file.tensors["b"].read(0, 1) == VECTOR.astype(np.float16).tobytes()
    assert file.tensors["c"].read(4, 1) == TENSORS["c"].data[-12:]


def test_the_library_reads_what_the_tests_write(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", {k: TENSORS[k] for k in ("a", "b", "ids")})
    found = safetensors.numpy.load_file(path)
    assert np.array_equal(found["a"], MATRIX)
    assert np.array_equal(found["b"], VECTOR.astype(np.float16))
    assert np.array_equal(found["ids"], np.arange(3))


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(
        {"a": MATRIX, "b": VECTOR.astype(np.float16)}, path, {"format": "pt"}
    )
    file = open_safetensors(path)
    assert file.tensors["a"].read(0, 5) == MATRIX.tobytes()
    assert file.tensors["b"].shape == (7,)


def test_scalars_and_empty_tensors_are_seen(tmp_path: Path) -> None:
    tensors = {"none": Stored("F32", (0, 4), b""), "one": Stored("F32", (), bytes(4))}
    file = open_safetensors(write_safetensors(tmp_path / "x.safetensors", tensors))
    assert [t.shape for t in file.tensors.values()] == [(0, 4), ()]


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 10_000])
def test_a_header_larger_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", TENSORS, length=length)
    assert f"a header of {length:,} bytes, the file has" in refusal(path)
    assert not accepts(path)


def test_a_header_above_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as out:
        out.write((HEADER_BYTES_LIMIT + 1).to_bytes(8, "little"))
        out.truncate(2 * HEADER_BYTES_LIMIT)
    assert f"a header of more than {HEADER_BYTES_LIMIT + 8:,} bytes" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"abc", b"\0" * 8])
def test_files_without_a_header_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert refusal(path)


def test_a_pointer_of_git_lfs_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    assert "a pointer of Git LFS" in refusal(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"GGUF", "not JSON"),
        (b"[1]", "expected an object"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"a":' * 5000, "nested too deeply"),
        (b'{"a":NaN}', "NaN is no number"),
        (b'{"a":{"dtype":"F32","dtype":"F32"}}', "'dtype' stands twice"),
        (b'{"a":null}', "a is no tensor"),
        (b'{"a":[]}', "a is an array, expected an object"),
        (b'{"\\ud800":{}}', "is no tensor"),
        (b'{"__metadata__":{"n":1}}', "expected an object of strings"),
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"more":1}}', "unknown key more"),
    ],
)
def test_headers_of_other_kinds_are_refused(tmp_path: Path, header: bytes, message: str) -> None:
    assert message in refusal(write_raw(tmp_path / "x.safetensors", header))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    path = write_raw(tmp_path / "x.safetensors", b"{%b,%b}" % (entry, entry), bytes(4))
    assert "the key 'a' stands twice" in refusal(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["a"].update(dtype="F31"), "tensor a: unknown type F31"),
        (lambda h: h["a"].pop("dtype"), "tensor a: unknown type"),
        (lambda h: h["a"].update(dtype=4), "a.dtype is 4, expected a string"),
        (lambda h: h["a"].pop("shape"), "a.shape is nothing, expected an array"),
        (lambda h: h["a"].update(shape=[-5, -6]), "expected an array of whole numbers"),
        (lambda h: h["a"].update(shape=[5.0, 6]), "expected an array of whole numbers"),
        (lambda h: h["a"].update(shape=[True, 30]), "expected an array of whole numbers"),
        (lambda h: h["a"].update(shape=[2**62, 2**62]), "120 bytes, shape"),
        (lambda h: h["a"].update(shape=[2**63, 2]), "expected an array of whole numbers"),
        (lambda h: h["a"].update(shape=[1] * 9), "9 dimensions, at most 8"),
        (lambda h: h["a"].update(shape=[5, 7]), "120 bytes, shape [5, 7] of F32 takes 140"),
        (lambda h: h["a"].update(data_offsets=[0]), "are not a start and an end"),
        (lambda h: h["a"].update(data_offsets=[120, 0]), "are not a start and an end"),
        (lambda h: h["b"].update(data_offsets=[100, 114]), "b overlaps another tensor"),
        (lambda h: h["ids"].update(data_offsets=[999, 1023]), "bytes behind the end of the file"),
        (lambda h: h.pop("b"), "a hole of 14 bytes before c"),
        (lambda h: h.pop("ids"), "24 bytes behind the last tensor that belong to none"),
    ],
)
def test_wrong_entries_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", TENSORS, change=change)
    assert message in refusal(path)
    assert not accepts(path)


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", TENSORS, rest=b"?")
    assert "1 bytes behind the last tensor" in refusal(path)
    assert not accepts(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="no such file"):
        open_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="a folder"):
        open_safetensors(tmp_path)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", TENSORS)
    file = open_safetensors(path)
    os.truncate(path, 100)
    with pytest.raises(ModelError, match="changed while it was read"):
        file.tensors["a"].read(0, 1)
    path.unlink()
    with pytest.raises(UnknownModel, match="no such file"):
        file.tensors["a"].read(0, 1)


def test_a_link_is_followed_as_in_hugging_faces_cache(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "blob", TENSORS)
    (tmp_path / "x.safetensors").symlink_to("blob")
    file = open_safetensors(tmp_path / "x.safetensors")
    assert file.tensors["a"].read(0, 5) == MATRIX.tobytes()


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    """1,500 files with a few bytes or words changed: ModelError, or every tensor can be read."""
    dice = random.Random(5)
    path = write_safetensors(tmp_path / "x.safetensors", TENSORS)
    good = path.read_bytes()
    words = [b"0", b"-1", b"%d" % 2**63, b"1e999", b"null", b"true", b"[]", b"{}", b'"F16"']
    n_read, lines = 0, []
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(len(data))
            if dice.random() < 0.5:
                data[at] = dice.randrange(256)
            else:
                data[at : at + dice.randint(0, 8)] = dice.choice(words)
        path.write_bytes(data)
        try:
            file = open_safetensors(path)
            n_read += all(
                t.read(0, t.shape[0] if len(t.shape) > 1 else 1) for t in file.tensors.values()
            )
        except ModelError as e:
            lines.append(e.message)
    assert all(line.isprintable() for line in lines)
    assert 50 < n_read < 1450
