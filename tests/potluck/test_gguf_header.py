"""Headers that are written are read back as they were meant, by us and by the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as reference
import pytest

from potluck import blocks, gguf
from potluck.errors import ModelError
from potluck.gguf_header import Layout, TensorHeading, laid_out
from potluck.tensor_source import Metadata, Typed

WHOLE = ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")
PAIRS: list[tuple[str, Metadata]] = [
    ("general.architecture", "llama"),
    ("text", "größer, 漢字"),
    ("empty", ""),
    ("whole", 7),
    ("fraction", 0.5),
    ("flag", True),
    ("strings", ["a", "", "ß"]),
    ("no strings", []),
    ("numbers", [1, -2]),
    ("fractions", [1.5, 2]),
    ("flags", [True, False]),
    *((f"one {kind}", Typed(kind, 100)) for kind in WHOLE),
    *((f"all {kind}", Typed(kind, [0, 100])) for kind in WHOLE),
    ("none", Typed("u16", [])),
    ("double", Typed("f64", 0.1)),
    ("typed flags", Typed("bool", [True])),
]
EXPECTED_KINDS = {
    "text": "str",
    "whole": "u32",
    "fraction": "f32",
    "flag": "bool",
    "strings": "str",
    "no strings": "str",
    "numbers": "i32",
    "fractions": "f32",
    "flags": "bool",
    "one u64": "u64",
    "all i8": "i8",
    "none": "u16",
    "double": "f64",
}
TENSORS = [
    TensorHeading("token_embd.weight", "q4_k", (3, 512)),
    TensorHeading("blk.0.attn_norm.weight", "f32", (5,)),
    TensorHeading("blk.0.experts.weight", "q8_0", (2, 3, 64)),
]


def written(path: Path, layout: Layout) -> Path:
    path.write_bytes(layout.header + bytes(layout.size_bytes - len(layout.header)))
    return path


def plain(value: Metadata | gguf.Value) -> Any:
    value = value.value if isinstance(value, Typed) else value
    return value if isinstance(value, str | bool | int | float) else list(value)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    layout = laid_out(PAIRS, TENSORS)
    file = gguf.read(written(tmp_path / "x.gguf", layout))
    assert {k: plain(v) for k, v in file.metadata.items()} == {k: plain(v) for k, v in PAIRS}
    assert {k: file.kinds[k] for k in EXPECTED_KINDS} == EXPECTED_KINDS
    assert tuple(file.tensors.values()) == layout.tensors
    assert file.data_offset_bytes == len(layout.header)
    assert file.size_bytes == layout.size_bytes


def test_the_gguf_package_reads_it_too(tmp_path: Path) -> None:
    path = written(tmp_path / "x.gguf", laid_out(PAIRS, TENSORS))
    theirs = reference.GGUFReader(path)
    for key, value in PAIRS:
        if plain(value) != []:  # it has no name for the elements of an empty array
            assert theirs.fields[key].contents() == plain(value), key
    assert [t.name for t in theirs.tensors] == [t.name for t in TENSORS]
    for ours, tensor in zip(TENSORS, theirs.tensors, strict=True):
        assert tuple(int(n) for n in reversed(tensor.shape)) == ours.shape
        assert tensor.tensor_type.name.lower() == ours.type_name


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_tensors_lie_at_multiples_of_the_alignment(tmp_path: Path, alignment: int) -> None:
    pairs: list[tuple[str, Metadata]] = [("general.alignment", alignment)]
    layout = laid_out(pairs, TENSORS)
    assert all(t.offset_bytes % alignment == 0 for t in layout.tensors)
    assert layout.size_bytes % alignment == 0
    file = gguf.read(written(tmp_path / "x.gguf", layout))
    assert tuple(file.tensors.values()) == layout.tensors


def test_a_file_without_tensors_is_a_header() -> None:
    layout = laid_out([("k", 1)], [])
    assert layout.size_bytes == len(layout.header)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([("k", 1), ("k", 2)], "metadata key k stands twice"),
        ([("", 1)], "metadata key without a name"),
        ([("k", 2**32)], "key k: a value does not fit its type u32"),
        ([("k", -1)], "key k: a value does not fit its type u32"),
        ([("k", [2**31])], "key k: a value does not fit its type i32"),
        ([("k", Typed("u8", [256]))], "key k: a value does not fit its type u8"),
        ([("k", Typed("u8", 1.5))], "key k: a fraction does not fit its type u8"),
        ([("k", Typed("f32", 1e39))], "key k: a value does not fit its type f32"),
        ([("k", Typed("u128", 1))], "key k: unknown type u128"),
        ([("k", ["a", 1])], "key k: an array of values of different types"),
        ([("k", [True, 2])], "key k: an array of values of different types"),
        ([("k", "\ud800")], "k: text that is not UTF-8"),
        ([("general.alignment", 24)], "general.alignment is 24, expected a power of two"),
        ([("general.alignment", "32")], "general.alignment is 32, expected a power of two"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_its_key(
    pairs: list[tuple[str, Any]], said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        laid_out(pairs, [])


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([TensorHeading("t", "f32", (1,))] * 2, "tensor t stands twice"),
        ([TensorHeading("t" * 64, "f32", (1,))], "a name of 64 bytes, at most 63 fit"),
        ([TensorHeading("t", "f32", ())], r"tensor t: shape \[\], expected 1 to 4 dimensions"),
        ([TensorHeading("t", "f32", (1,) * 5)], "expected 1 to 4 dimensions"),
        ([TensorHeading("t", "f32", (0, 4))], r"tensor t: shape \[0, 4\]"),
        ([TensorHeading("t", "q4_k", (2, 300))], "rows of 300 values, expected a multiple of 256"),
    ],
)
def test_tensors_that_no_reader_takes_are_refused_by_name(
    tensors: list[TensorHeading], said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        laid_out([], tensors)


@pytest.mark.parametrize("type_name", blocks.BY_NAME)
def test_every_type_has_its_size(type_name: str) -> None:
    block = blocks.BY_NAME[type_name]
    heading = TensorHeading("t", type_name, (3, 2 * block.values))
    assert laid_out([], [heading]).tensors[0].size_bytes == 6 * block.size_bytes
