"""Files that are wrong: each is refused in one line that names the place, at once and for free."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from potluck import gguf
from potluck.errors import ModelError, UnknownModel
from potluck.testing import Tensor, Typed, gguf_fields, overwritten, write_gguf
from potluck.testing.writer import Field, Metadata

PAIRS: list[tuple[str, Metadata]] = [
    ("general.alignment", 32),
    ("text", "some text"),
    ("flag", True),
    ("flags", Typed("bool", [True, False])),
    ("numbers", Typed("i32", list(range(100)))),
    ("texts", ["one", "two", "three"]),
]
TENSORS = [
    Tensor("a", "q4_0", (3, 64), bytes(108)),
    Tensor("b", "f32", (16,), bytes(64)),
    Tensor("c", "f16", (2, 8), bytes(32)),
]
FIELDS = gguf_fields(PAIRS, TENSORS)
BIG = 2**62


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong, and what the refusal must name."""

    what: str
    changes: dict[str, int | bytes]
    names: str

    @property
    def data(self) -> bytes:
        return overwritten(FIELDS, self.changes)


def start_of(name: str) -> int:
    """Offset of a field in the right file."""
    names = [f.name for f in FIELDS]
    return sum(len(f.data) for f in FIELDS[: names.index(name)])


def at(name: str) -> str:
    return f"offset {start_of(name)}: "


DAMAGES = [
    # The first bytes.
    Damage("magic of nobody", {"magic": b"ABCD"}, "b'ABCD'"),
    Damage("magic GGML", {"magic": b"lmgg"}, "magic 'ggml': an old GGML file"),
    Damage("magic GGJT", {"magic": b"tjgg"}, "magic 'ggjt': an old GGML file"),
    Damage("magic GGJT in letters", {"magic": b"ggjt"}, "magic 'ggjt': an old GGML file"),
    Damage("magic GGMF", {"magic": b"fmgg"}, "magic 'ggmf': an old GGML file"),
    Damage("magic of a zip", {"magic": b"PK\3\4"}, r"b'PK\x03\x04'"),
    Damage("version 0", {"version": 0}, "version 0; 2 and 3 are supported"),
    Damage("version 1", {"version": 1}, "version 1; 2 and 3 are supported"),
    Damage("version 4", {"version": 4}, "version 4; 2 and 3 are supported"),
    Damage("version 999", {"version": 999}, "version 999; 2 and 3 are supported"),
    Damage("big-endian 3", {"version": 3 << 24}, "version 3 in big-endian byte order"),
    Damage("big-endian 2", {"version": 2 << 24}, "version 2 in big-endian byte order"),
    # Counts.
    Damage("2^63 tensors", {"n_tensors": 2**63}, at("n_tensors") + "9,223,372,036,854,775,808"),
    Damage("all bits tensors", {"n_tensors": 2**64 - 1}, "at most 65,536 are supported"),
    Damage("65,537 tensors", {"n_tensors": 65_537}, "at most 65,536 are supported"),
    Damage("more tensors than fit", {"n_tensors": 5000}, "bytes that follow hold at most"),
    Damage("one tensor too many", {"n_tensors": 4}, "tensor 3 has no name"),
    Damage("2^63 keys", {"n_keys": 2**63}, at("n_keys") + "9,223,372,036,854,775,808"),
    Damage("65,537 keys", {"n_keys": 65_537}, "at most 65,536 are supported"),
    Damage("more keys than fit", {"n_keys": 5000}, "bytes that follow hold at most"),
    Damage("one key too many", {"n_keys": 7}, "offset 648: the name of tensor 0 ends 844,"),
    Damage("one key too few", {"n_keys": 5}, "tensor texts: 9 dimensions, expected 1 to 4"),
    # Keys.
    Damage("key of 2^62", {"key.text.name.length": BIG}, at("key.text.name.length")),
    Damage("key of all bits", {"key.text.name.length": 2**64 - 1}, "behind the end of the file"),
    Damage("key without name", {"key.text.name.length": 0, "key.text.name": b""}, "has no name"),
    Damage("key not UTF-8", {"key.text.name": b"te\xffxt"[:4]}, "metadata key 1 is not UTF-8"),
    Damage("key twice", {"key.flag.name": b"text"}, "metadata key text stands twice"),
    Damage(
        "key of 70,000 bytes",
        {"key.text.name.length": 70_000, "key.text.name": b"k" * 70_000},
        "metadata key 1 has 70,000 bytes, at most 65,536 are supported",
    ),
    Damage(
        "key with a line break twice",
        {"key.text.name": b"a\nbc", "key.flag.name": b"a\nbc"},
        r"metadata key 'a\nbc' stands twice",
    ),
    # Values.
    Damage("type 13", {"key.text.type": 13}, "metadata key text has the unknown type 13"),
    Damage("type of all bits", {"key.text.type": 2**32 - 1}, "unknown type 4294967295"),
    Damage("string of 2^62", {"key.text.length": BIG}, "metadata key text ends 4,611,686"),
    Damage("string of all bits", {"key.text.length": 2**64 - 1}, "metadata key text ends 18,446"),
    Damage("string not UTF-8", {"key.text.value": b"\xc3\x28 text.."}, "text is not UTF-8"),
    Damage("bool of 2", {"key.flag.value": 2}, "metadata key flag is a bool that is neither"),
    Damage("bools of 7", {"key.flags.value": b"\1\7"}, "metadata key flags is a bool that is"),
    Damage("array of type 13", {"key.numbers.element_type": 13}, "array of the unknown type 13"),
    Damage("array of arrays", {"key.numbers.element_type": 9}, "numbers is an array of arrays"),
    Damage("array of 2^40", {"key.numbers.n_elements": 2**40}, "1,099,511,627,776 elements in"),
    Damage(
        "array of all bits", {"key.numbers.n_elements": 2**64 - 1}, at("key.numbers.n_elements")
    ),
    Damage("array of 2^24 + 1", {"key.numbers.n_elements": 2**24 + 1}, "at most 16,777,216"),
    Damage("array past the end", {"key.numbers.n_elements": 2**20}, "bytes that follow hold"),
    Damage("strings of 2^40", {"key.texts.n_elements": 2**40}, "1,099,511,627,776 elements in"),
    Damage("strings past the end", {"key.texts.n_elements": 10**6}, "bytes that follow hold"),
    Damage(
        "element of 2^62",
        {"key.texts.value": b"\3\0\0\0\0\0\0\0one" + BIG.to_bytes(8, "little") + b"x" * 16},
        "metadata key texts, element 1, ends 4,611,686",
    ),
    Damage(
        "element not UTF-8",
        {"key.texts.value": b"\1\0\0\0\0\0\0\0a" * 2 + b"\1\0\0\0\0\0\0\0\xff"},
        "metadata key texts, element 2, is not UTF-8",
    ),
    # Alignment.
    Damage("alignment 0", {"key.general.alignment.value": 0}, "alignment 0 is not a power of two"),
    Damage("alignment 3", {"key.general.alignment.value": 3}, "alignment 3 is not a power of two"),
    Damage("alignment 2^31", {"key.general.alignment.value": 2**31}, "a multiple of 2147483648"),
    Damage(
        "alignment of -32",
        {"key.general.alignment.type": 5, "key.general.alignment.value": -32},
        "general.alignment -32 is not a power of two",
    ),
    Damage("alignment as float", {"key.general.alignment.type": 6}, "general.alignment is float"),
    Damage(
        "alignment as string",
        {"key.general.alignment.type": 8, "key.general.alignment.value": b"\2\0\0\0\0\0\0\00032"},
        "general.alignment is str 32",
    ),
    # Tensors.
    Damage("name of 2^62", {"tensor.b.name.length": BIG}, at("tensor.b.name.length")),
    Damage(
        "name of 65 bytes",
        {"tensor.b.name.length": 65, "tensor.b.name": b"n" * 65},
        "the name of tensor 1 has 65 bytes, at most 64 are supported",
    ),
    Damage(
        "name of 1 MB",
        {"tensor.b.name.length": 10**6, "tensor.b.name": b"n" * 10**6},
        "the name of tensor 1 has 1,000,000 bytes, at most 64 are supported",
    ),
    Damage("no name", {"tensor.b.name.length": 0, "tensor.b.name": b""}, "tensor 1 has no name"),
    Damage("name not UTF-8", {"tensor.b.name": b"\xff"}, "the name of tensor 1 is not UTF-8"),
    Damage("name twice", {"tensor.b.name": b"a"}, "tensor a stands twice"),
    Damage("0 dimensions", {"tensor.b.n_dimensions": 0}, "tensor b: 0 dimensions, expected 1 to 4"),
    Damage("5 dimensions", {"tensor.b.n_dimensions": 5}, "tensor b: 5 dimensions, expected 1 to 4"),
    Damage("2^32 - 1 dimensions", {"tensor.b.n_dimensions": 2**32 - 1}, "tensor b: 4294967295 dim"),
    Damage("dimension of 0", {"tensor.a.dimension.1": 0}, "tensor a: shape [0, 64] has a dim"),
    Damage("row of 0", {"tensor.a.dimension.0": 0}, "tensor a: shape [3, 0] has a dimension of 0"),
    Damage(
        "row of 63", {"tensor.a.dimension.0": 63}, "rows of 63 values, expected a multiple of 32"
    ),
    Damage("rows beyond the file", {"tensor.c.dimension.1": 2**40}, "tensor c: 17,592,186,044,416"),
    Damage(
        "product over 2^64",
        {"tensor.a.dimension.0": 2**40, "tensor.a.dimension.1": 2**40},
        "tensor a: 680,",
    ),
    Damage("removed type 4", {"tensor.a.type": 4}, "tensor a: unknown type 4"),
    Damage("type 99", {"tensor.a.type": 99}, "tensor a: unknown type 99"),
    Damage("type -1", {"tensor.a.type": -1}, "tensor a: unknown type 4294967295"),
    Damage("a wider type", {"tensor.a.type": 8}, "tensor b: its data overlaps that of a"),
    Damage("data not aligned", {"tensor.b.offset": 129}, "data at 129, expected a multiple of 32"),
    Damage("data at 2^62", {"tensor.b.offset": BIG}, "tensor b: 64 bytes of data at offset 4,611"),
    Damage("data at 2^64 - 32", {"tensor.b.offset": -32}, "behind the end of the file"),
    Damage("data of two in one place", {"tensor.b.offset": 0}, "its data overlaps that of"),
    Damage(
        "data half over another", {"tensor.c.offset": 160}, "tensor c: its data overlaps that of b"
    ),
    Damage("data cut by a byte", {"tensor.c.data": bytes(31)}, "tensor c: 32 bytes of data at"),
    Damage(
        "no data at all",
        {"tensor.a.data": b"", "tensor.b.data": b"", "tensor.c.data": b"", "tensor.a.padding": b""},
        "behind the end of the file",
    ),
]


def refusal(path: Path, size_bytes: int = 0) -> ModelError:
    """The refusal of `path`, which must be quick, one printable line, and cost no memory."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(ModelError) as caught:
            gguf.read(path)
        seconds, peak_bytes = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < 1
    assert peak_bytes < 4 * 2**20 + 3 * size_bytes
    for line in (caught.value.message, caught.value.remedy):
        assert line.isprintable()
        assert len(line) < 500
    assert path.name in caught.value.message
    return caught.value


@pytest.fixture(scope="module", autouse=True)
def the_right_file_is_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write_gguf(tmp_path_factory.mktemp("right") / "x.gguf", PAIRS, TENSORS)
    assert list(gguf.read(path).tensors) == ["a", "b", "c"]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.what)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: Damage) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(damage.data)
    assert damage.names in refusal(path, len(damage.data)).message


def test_the_table_of_damages_is_long_and_each_stands_once() -> None:
    assert len(DAMAGES) >= 60
    assert len({d.what for d in DAMAGES}) == len({d.data for d in DAMAGES}) == len(DAMAGES)


@pytest.mark.parametrize("size_bytes", [0, 1, 3])
def test_a_file_of_a_few_bytes_is_no_gguf_file(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF"[:size_bytes])
    assert f"x.gguf: {size_bytes} bytes, not a GGUF file" in refusal(path).message


def test_a_pointer_of_git_lfs_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(ModelError, match="a pointer of Git LFS, not the file"):
        gguf.read(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "x.gguf", overwritten(FIELDS, {})
    for size_bytes in range(4, len(data)):
        path.write_bytes(data[:size_bytes])
        with pytest.raises(
            ModelError, match=r"behind the end of the file|that follow hold at most"
        ):
            gguf.read(path)


def test_a_string_of_more_than_16_mib_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", [("k", "x" * (16 * 2**20 + 1))], [])
    assert "k has 16,777,217 bytes, at most 16,777,216" in refusal(path).message


def test_a_header_of_more_than_256_mib_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "HEADER_BYTES_LIMIT", 1000)
    path = write_gguf(tmp_path / "x.gguf", [("k", "x" * 500), ("l", "x" * 500)], [])
    assert "a header of more than 1,000 bytes" in refusal(path).message


def special_file(kind: str) -> Callable[[Path], object]:
    return {
        "folder": lambda path: path.mkdir(),
        "pipe": lambda path: os.mkfifo(path),
        "device": lambda path: path.symlink_to("/dev/zero"),
        "loop": lambda path: path.symlink_to(path),
    }[kind]


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop"])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.gguf"
    special_file(kind)(path)
    expected = {"folder": "a folder", "loop": "can't be opened"}.get(kind, "not a regular file")
    assert expected in refusal(path).message


def test_a_missing_file_is_an_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"nowhere\.gguf: no such file"):
        gguf.read(tmp_path / "nowhere.gguf")


@pytest.mark.parametrize("name", ["a\0b.gguf", "x" * 5000])
def test_a_path_that_can_not_be_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="can't be opened") as caught:
        gguf.read(tmp_path / name)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500


def test_a_change_of_no_field_is_an_error_of_the_test() -> None:
    with pytest.raises(KeyError, match="no field n_tensor"):
        overwritten([Field("n_tensors", b"12345678")], {"n_tensor": 1})
