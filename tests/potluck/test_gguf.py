"""Files that are right: everything in them is read, and read right."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import gguf as reference
import numpy as np
import pytest

from potluck import blocks, gguf
from potluck.errors import ModelError
from potluck.testing import Tensor, TinyShape, Typed, tiny_tensors, write_gguf, write_tiny
from potluck.testing.writer import Metadata

VECTOR = Tensor("v", "f32", (8,), np.arange(8, dtype="<f4").tobytes())


def read_metadata(path: Path, *pairs: tuple[str, Metadata]) -> gguf.GgufFile:
    return gguf.read(write_gguf(path / "x.gguf", pairs, []))


def test_the_block_table_equals_the_gguf_package() -> None:
    theirs = {(int(t), t.name.lower(), *size) for t, size in reference.GGML_QUANT_SIZES.items()}
    ours = {(t.number, t.name, t.values, t.size_bytes) for t in blocks.BY_NUMBER.values()}
    assert ours == theirs


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3_read_alike(tmp_path: Path, version: int) -> None:
    path = write_gguf(tmp_path / "x.gguf", [("k", 7)], [VECTOR], changes={"version": version})
    file = gguf.read(path)
    assert (file.version, file.metadata["k"]) == (version, 7)
    assert file.tensors["v"].size_bytes == 32


LEAST_AND_MOST = {"u8": (0, 255), "i8": (-128, 127), "u16": (0, 65535), "i16": (-32768, 32767)}
LEAST_AND_MOST |= {"u32": (0, 2**32 - 1), "i32": (-(2**31), 2**31 - 1), "u64": (0, 2**64 - 1)}
LEAST_AND_MOST |= {"i64": (-(2**63), 2**63 - 1)}


@pytest.mark.parametrize("kind", LEAST_AND_MOST)
def test_whole_numbers_of_every_type_are_exact(tmp_path: Path, kind: str) -> None:
    least, most = LEAST_AND_MOST[kind]
    file = read_metadata(
        tmp_path, ("least", Typed(kind, least)), ("all", Typed(kind, [least, 1, most]))
    )
    assert file.integer("least") == least
    assert list(file.array("all", int)) == [least, 1, most]


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_floats_of_both_types_are_exact(tmp_path: Path, kind: str) -> None:
    file = read_metadata(tmp_path, ("one", Typed(kind, 0.1)), ("all", Typed(kind, [1.5, -2.0])))
    assert file.number("one") == (0.1 if kind == "f64" else float(np.float32(0.1)))
    assert list(file.array("all", float)) == [1.5, -2.0]


def test_bools_and_strings_are_read(tmp_path: Path) -> None:
    pairs: list[tuple[str, Metadata]] = [("yes", True), ("flags", Typed("bool", [True, False]))]
    pairs += [("text", "grüße 👋"), ("texts", ["", "a", "中文"]), ("none", Typed("i32", []))]
    file = read_metadata(tmp_path, *pairs)
    assert file.flag("yes") is True
    assert list(file.array("flags", bool)) == [True, False]
    assert file.text("text") == "grüße 👋"
    assert list(file.array("texts", str)) == ["", "a", "中文"]
    assert list(file.array("none", int)) == []


def test_strings_that_cross_the_read_window_are_whole(tmp_path: Path) -> None:
    texts = [f"{i}:" + "x" * (i * 7919 % 5000) for i in range(2000)] + ["y" * 3_000_000, "z"]
    file = read_metadata(tmp_path, ("texts", texts), ("after", 1))
    assert list(file.array("texts", str)) == texts
    assert file.integer("after") == 1


def test_a_number_may_be_whole_and_a_default_stands_in(tmp_path: Path) -> None:
    file = read_metadata(tmp_path, ("whole", 3))
    assert file.number("whole") == 3.0
    assert (file.number("x", 1.5), file.integer("x", 2), file.text("x", "d")) == (1.5, 2, "d")
    assert file.flag("x", default=False) is False


@pytest.mark.parametrize("getter", ["text", "integer", "number", "flag"])
@pytest.mark.parametrize("value", ["s", 1.5, True, Typed("f32", float("nan")), [1, 2]])
def test_a_value_of_another_type_is_named(tmp_path: Path, getter: str, value: Metadata) -> None:
    right = {"text": "s", "number": 1.5, "flag": True}.get(getter)
    if value == right and type(value) is type(right):
        return
    file = read_metadata(tmp_path, ("some.key", value))
    with pytest.raises(ModelError, match=r"x\.gguf: metadata key some\.key is .*, expected"):
        getattr(file, getter)("some.key")
    with pytest.raises(ModelError, match=r"x\.gguf: missing metadata key other"):
        getattr(file, getter)("other")


@pytest.mark.parametrize(("of", "value"), [(str, [1]), (int, ["a"]), (int, [1.5]), (float, 3)])
def test_an_array_of_another_type_is_named(tmp_path: Path, of: type, value: Metadata) -> None:
    file = read_metadata(tmp_path, ("k", value))
    with pytest.raises(
        ModelError, match=f"metadata key k is .*, expected an array of {of.__name__}"
    ):
        file.array("k", of)


@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096])
def test_tensors_lie_where_the_writer_put_them(tmp_path: Path, alignment: int) -> None:
    tensors = [
        Tensor("a", "q4_0", (3, 64), bytes(range(108))),
        Tensor("b", "f16", (5,), b"0123456789"),
        Tensor("c", "i8", (2, 2, 2, 3), b"abcdefghijklmnopqrstuvwx"),
    ]
    pairs = [("general.alignment", alignment)]
    path = write_gguf(tmp_path / "x.gguf", pairs, tensors, alignment=alignment)
    data, file = path.read_bytes(), gguf.read(path)
    assert list(file.tensors) == ["a", "b", "c"]
    for t in tensors:
        info = file.tensors[t.name]
        assert info.shape == t.shape
        assert info.offset_bytes % alignment == 0
        assert data[info.offset_bytes : info.offset_bytes + info.size_bytes] == t.data
    assert (file.tensors["b"].rows, file.tensors["b"].cols) == (1, 5)
    assert (file.tensors["c"].rows, file.tensors["c"].cols) == (8, 3)


def test_the_header_hash_covers_the_header_and_not_the_weights(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "a.gguf")
    file, data = gguf.read(path), bytearray(path.read_bytes())
    assert file.header_sha256 == hashlib.sha256(data[: file.data_offset_bytes]).hexdigest()
    data[-1] ^= 1
    path.write_bytes(data)
    assert gguf.read(path).header_sha256 == file.header_sha256
    other = write_tiny(tmp_path / "b.gguf", TinyShape(seed=2))
    assert gguf.read(other).header_sha256 != file.header_sha256


def test_a_file_of_a_vocabulary_only_needs_no_padding(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", [("k", "v")], [], changes={"padding": b""})
    file = gguf.read(path)
    assert file.data_offset_bytes == file.size_bytes
    assert not file.tensors


def test_metadata_and_tensors_can_not_be_changed(tmp_path: Path) -> None:
    file = gguf.read(write_gguf(tmp_path / "x.gguf", [("k", [1, 2])], [VECTOR]))
    for what in (file.metadata, file.tensors, file.metadata["k"]):
        with pytest.raises(TypeError):
            what[0] = 1  # type: ignore[index]  # that is the test


def test_a_file_of_the_gguf_package_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    writer = reference.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "bc", "中"])
    writer.add_token_scores([0.0, -1.0, -2.5])
    values = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    writer.add_tensor("w", values)
    packed = reference.quantize(values, reference.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", packed, raw_dtype=reference.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = gguf.read(path)
    assert file.text("general.architecture") == "llama"
    assert file.integer("llama.block_count") == 3
    assert list(file.array("tokenizer.ggml.tokens", str)) == ["a", "bc", "中"]
    assert list(file.array("tokenizer.ggml.scores", float)) == [0.0, -1.0, -2.5]
    assert (file.tensors["q"].type_name, file.tensors["q"].shape) == ("q8_0", (4, 64))
    start = file.tensors["w"].offset_bytes
    assert path.read_bytes()[start : start + values.nbytes] == values.tobytes()


def test_the_gguf_package_reads_our_files_the_same(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "x.gguf", TinyShape(weight_type="q4_1"))
    ours, theirs = gguf.read(path), reference.GGUFReader(path)
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for tensor, written in zip(theirs.tensors, tiny_tensors(TinyShape("q4_1")), strict=True):
        info = ours.tensors[tensor.name]
        assert tensor.data_offset == info.offset_bytes
        assert tuple(int(n) for n in tensor.shape[::-1]) == info.shape
        assert tensor.data.tobytes() == written.data
    tokens = theirs.fields["tokenizer.ggml.tokens"].contents()
    assert tokens == list(ours.array("tokenizer.ggml.tokens", str))


def test_a_real_model_opens_in_a_moment(smollm2: Path) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        gguf.read(smollm2)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


def test_a_real_model_is_read_whole(smollm2: Path) -> None:
    file = gguf.read(smollm2)
    assert len(file.tensors) == 272
    assert len(file.array("tokenizer.ggml.tokens", str)) == 49_152
