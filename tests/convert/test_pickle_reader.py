"""Files of torch: what is read from right ones, and what is refused of all others.

Nothing that a file says is ever run: a canary file tells. Damaged files come from a right one with
one thing changed, and from seeded mutations.
"""

from __future__ import annotations

import contextlib
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from potluck.convert import pickle_reader, pth_file, stored_zip
from potluck.convert.pth_file import PthFile, open_pth
from potluck.errors import ModelError
from potluck.testing.torch_file import Opcodes, TorchTensor, tensors_pickled, write_torch

VALUES = np.arange(24, dtype="<f2").reshape(6, 4)
TENSORS = [
    TorchTensor("a.weight", "f16", (6, 4), VALUES.tobytes()),
    TorchTensor("b", "f32", (3,), np.array([1, 2, 3], "<f4").tobytes()),
    TorchTensor("c", "bf16", (2, 1), b"\x80\x3f\x00\x40"),
]


@pytest.fixture
def right(tmp_path: Path) -> Path:
    return write_torch(tmp_path / "consolidated.00.pth", TENSORS)


def with_pickle(folder: Path, pickled: bytes) -> Path:
    return write_torch(folder / "consolidated.00.pth", TENSORS, pickled=pickled)


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_pth(path)
    assert "\n" not in caught.value.message
    return caught.value.message


def rows_of(file: PthFile, name: str, first_row: int, n_rows: int) -> bytes:
    return file.tensors[name].read(first_row, n_rows)


@pytest.mark.parametrize("is_state_dict", [False, True])
@pytest.mark.parametrize("byte_order", [None, b"little"])
def test_tensors_are_read_by_rows(
    tmp_path: Path, *, is_state_dict: bool, byte_order: bytes | None
) -> None:
    path = tmp_path / "x.pth"
    write_torch(path, TENSORS, is_state_dict=is_state_dict, byte_order=byte_order)
    file = open_pth(path)
    assert [(t.name, t.type_name, t.shape) for t in file.tensors.values()] == [
        (t.name, t.type_name, t.shape) for t in TENSORS
    ]
    assert rows_of(file, "a.weight", 2, 3) == VALUES[2:5].tobytes()
    assert rows_of(file, "b", 0, 1) == TENSORS[1].data
    assert rows_of(file, "c", 1, 1) == b"\x00\x40"


def test_many_tensors_and_long_memos_are_read(tmp_path: Path) -> None:
    """More than 256 memo entries and storages of more than 2 GB take other opcodes."""
    many = [TorchTensor(f"t{i}", "f16", (3,), struct.pack("<3e", i, 1, 2)) for i in range(300)]
    many.append(TorchTensor("huge", "f16", (70_000, 40_000), None))
    file = open_pth(write_torch(tmp_path / "x.pth", many))
    assert rows_of(file, "t299", 0, 1) == many[299].data
    assert file.tensors["huge"].size_bytes == 5_600_000_000
    assert rows_of(file, "huge", 69_999, 1) == bytes(80_000)


def test_tensors_may_share_a_storage(tmp_path: Path) -> None:
    """A tied head, and a part of a storage: as torch writes views."""
    pickled = tensors_pickled(TENSORS).replace(
        # b, [3] at value 0 of its storage, becomes [2] at value 1.
        b"K\x00K\x03\x85",
        b"K\x01K\x02\x85",
    )
    file = open_pth(with_pickle(tmp_path, pickled))
    assert rows_of(file, "b", 0, 1) == struct.pack("<2f", 2, 3)


def calls(module: str, name: str, argument: str) -> bytes:
    encoded = argument.encode()
    return (
        f"\x80\x02c{module}\n{name}\n".encode("latin-1")
        + b"X"
        + struct.pack("<I", len(encoded))
        + encoded
        + b"\x85R."
    )


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"),
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("collections", "OrderedDict.__class__"),
        ("_codecs", "encode"),
        ("numpy.core.multiarray", "_reconstruct"),
    ],
)
def test_a_name_that_makes_no_tensor_is_refused_and_nothing_runs(
    tmp_path: Path, module: str, name: str
) -> None:
    canary = tmp_path / "canary"
    path = with_pickle(tmp_path, calls(module, name, f"touch {canary}"))
    assert refused(path) == f"refusing {module}.{name} in consolidated.00.pth"
    assert not canary.exists()


def test_the_same_inside_a_right_file_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = calls("posix", "system", f"touch {canary}")[2:-1]
    pickled = tensors_pickled(TENSORS)
    assert pickled.endswith(b"u.")
    pickled = pickled[:-2] + b"X\x01\x00\x00\x00z" + evil + b"u."
    assert refused(with_pickle(tmp_path, pickled)) == "refusing posix.system in consolidated.00.pth"
    assert not canary.exists()


@pytest.mark.parametrize(
    ("opcodes", "found"),
    [
        (b"(S'true'\nios\nsystem\n.", "refusing os.system"),  # INST
        (b"(cos\nsystem\nS'true'\no.", "refusing os.system"),  # OBJ: its class first
        (b"ccollections\nOrderedDict\n)\x81.", "refusing the pickle operation NEWOBJ"),
        (b"\x82\x01.", "refusing the pickle operation EXT1"),
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.", "refusing os.system"),
        (b"K\x01K\x02b.", "refusing a state set on a value of type int"),
        (b"K\x01)R.", "refusing a call of a value of type int"),
        (b"ccollections\nOrderedDict\nK\x01\x85R.", "arguments of OrderedDict"),
        (b"]K\x01a.", "holds a value of type list"),
        (b"K\x05.", "holds a value of type int"),
        (b"}X\x01\x00\x00\x00aK\x05s.", "a is a value of type int, expected a tensor"),
        (b"}K\x05K\x05s.", "a value of type int as the name of a tensor"),
        (b"}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.", "a stands twice"),
        (b"h\x07.", "memo 7 was never put"),
        (b"u.", "is damaged"),
        (b"t.", "is damaged"),
        (b"q\x00.", "is damaged"),
        (b"(K\x01\x85u.", "is damaged"),
        (b"K\x01Q.", "a persistent id that is no storage"),
        (b".", "is damaged"),
        (b"", "is damaged"),
        (b"K\x01", "is damaged"),
        (b"X\xff\xff\xff\x7fa.", "is damaged"),
        (b"\xff.", "is damaged"),
        (b"\x8b\xff\xff\xff\x7f.", "is damaged"),
    ],
)
def test_opcodes_that_torch_does_not_write_are_refused(
    tmp_path: Path, opcodes: bytes, found: str
) -> None:
    assert found in refused(with_pickle(tmp_path, b"\x80\x02" + opcodes))


def test_a_value_without_end_takes_no_time(tmp_path: Path) -> None:
    """Tuples of tuples: 2^60 values if anything walked them."""
    deep = b"}X\x01\x00\x00\x00aK\x01" + b"q\x01h\x01\x86" * 60 + b"s."
    assert "a is a value of type tuple" in refused(with_pickle(tmp_path, b"\x80\x02" + deep))
    as_key = b"}K\x01" + b"q\x01h\x01\x86" * 60 + b"Ns."
    assert "as the name of a tensor" in refused(with_pickle(tmp_path, b"\x80\x02" + as_key))


def test_operations_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_reader, "OPERATIONS_LIMIT", 100)
    path = with_pickle(tmp_path, b"\x80\x02" + b"N" * 200 + b".")
    assert "more than 100 operations" in refused(path)
    monkeypatch.setattr(pth_file, "PICKLE_BYTES_LIMIT", 100)
    assert "203 bytes, at most 100" in refused(path)


def tensor_pickled(shape: bytes, strides: bytes, first: bytes = b"K\x00", n: int = 24) -> bytes:
    """One tensor on storage 0 with this shape and these strides, as opcodes."""
    p = Opcodes()
    p.raw(b"}(")
    p.text("a")
    p.name("torch._utils", "_rebuild_tensor_v2")
    p.raw(b"((")
    p.text("storage")
    p.name("torch", "HalfStorage")
    p.text("0")
    p.text("cpu")
    p.whole(n)
    p.raw(b"tQ" + first + shape + strides + b"\x89")
    p.ordered_dict()
    p.raw(b"tRu.")
    return bytes(p.data)


@pytest.mark.parametrize(
    ("pickled", "found"),
    [
        (tensor_pickled(b"K\x04K\x06\x86", b"K\x01K\x04\x86"), "a transposed or cut view"),
        (tensor_pickled(b"K\x03K\x04\x86", b"K\x08K\x01\x86"), "a transposed or cut view"),
        (tensor_pickled(b"K\x06K\x04\x86", b"K\x00K\x01\x86"), "a transposed or cut view"),
        (tensor_pickled(b"K\x07K\x04\x86", b"K\x04K\x01\x86"), "4 values behind the end"),
        (tensor_pickled(b"K\x06K\x04\x86", b"K\x04K\x01\x86", b"K\x01"), "1 values behind the end"),
        (tensor_pickled(b"J\xff\xff\xff\x7fK\x04\x86", b"K\x04K\x01\x86"), "behind the end"),
        (tensor_pickled(b"J\xff\xff\xff\xffK\x04\x86", b"K\x04K\x01\x86"), "not whole numbers"),
        (tensor_pickled(b"K\x06K\x04\x86", b"K\x01\x85"), "not whole numbers"),
        (tensor_pickled(b"X\x01\x00\x00\x006K\x04\x86", b"K\x04K\x01\x86"), "not whole numbers"),
        (tensor_pickled(b"(" + b"K\x01" * 9 + b"t", b"(" + b"K\x01" * 9 + b"t"), "9 dimensions"),
        (tensor_pickled(b"K\x00K\x04\x86", b"K\x04K\x01\x86"), "at least one value"),
        (tensor_pickled(b")", b")"), "at least one value"),
        (tensor_pickled(b"K\x06K\x04\x86", b"K\x04K\x01\x86", n=25), "has 48 bytes, expected 25"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_named(
    tmp_path: Path, pickled: bytes, found: str
) -> None:
    message = refused(with_pickle(tmp_path, pickled))
    assert found in message
    assert "tensor a" in message or "damaged" in message


def test_a_dimension_of_one_may_have_any_stride(tmp_path: Path) -> None:
    file = open_pth(with_pickle(tmp_path, tensor_pickled(b"K\x01K\x04\x86", b"K\x63K\x01\x86")))
    assert file.tensors["a"].shape == (1, 4)


def zipped(path: Path, contents: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def test_a_zip_bomb_is_refused_by_name_and_never_unpacked(tmp_path: Path) -> None:
    bomb = {"x/data.pkl": bytes(50_000_000)}
    message = refused(zipped(tmp_path / "x.pth", bomb, zipfile.ZIP_DEFLATED))
    assert "entry x/data.pkl is compressed: 48,6" in message
    assert "claim to be 50,000,000" in message


@pytest.mark.parametrize(
    "name", ["../x", "x/../../y", "/etc/x", "x\\y", "c:/x", "x/data.pkl\0y", "..", ""]
)
def test_an_entry_that_leads_out_of_the_zip_is_refused(tmp_path: Path, name: str) -> None:
    good = zipped(tmp_path / "x.pth", {"x/longer-name-1": b"1"})
    data = good.read_bytes()
    new = name.encode()
    # The name at both places, and its length.
    local, listed = data.find(b"PK\x03\x04"), data.find(b"PK\x01\x02")
    head = bytearray(data[local : local + 30])
    head[26:28] = struct.pack("<H", len(new))
    entry = bytearray(data[listed : listed + 46])
    entry[28:30] = struct.pack("<H", len(new))
    body = bytes(head) + new + b"1"
    tail = bytes(entry) + new
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, len(tail), len(body), 0)
    good.write_bytes(body + tail + end)
    assert "leads out of the zip" in refused(good)


def test_what_is_no_zip_of_torch_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    cases = {
        b"": "0 bytes, not a file of torch.save",
        b"GGUF" * 10: "40 bytes, not a file of torch.save",
        bytes.fromhex("80028a0a6cfc9c46f9206aa85019") + b"...": "written by torch before 1.6",
        bytes(257) + b"ustar" + bytes(250): "a tar",
        b"version https://git-lfs.github.com/spec/v1\n": "a pointer of Git LFS",
        b"PK\x03\x04": "the end of the zip is missing",
        b"PK\x03\x04" + bytes(100): "the end of the zip is missing",
    }
    for data, found in cases.items():
        path.write_bytes(data)
        assert found in refused(path)
    zipped(path, {"word/document.xml": b"1"})
    assert "word/data.pkl is missing" in refused(path)
    zipped(path, {"x/data.pkl": b"1", "y/1": b""})
    assert "the zip holds x, y" in refused(path)
    assert "a folder, not a model file" in refused(tmp_path)


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "x.pth", TENSORS, byte_order=b"big")
    assert "byte order" in refused(path)


def test_a_missing_storage_and_too_many_entries_are_named(
    tmp_path: Path, right: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled = tensors_pickled(TENSORS)
    path = write_torch(tmp_path / "x.pth", TENSORS[:2], pickled=pickled)
    assert "tensor c: storage 2 is missing" in refused(path)
    monkeypatch.setattr(stored_zip, "ENTRIES_LIMIT", 4)
    assert "5 entries listed" in refused(right)


def test_a_file_cut_short_is_refused_at_any_place(right: Path) -> None:
    data = right.read_bytes()
    for size in [*range(0, len(data), 37), *range(len(data) - 60, len(data))]:
        right.write_bytes(data[:size])
        refused(right)


def test_a_file_that_changes_while_it_is_read_is_an_error(right: Path) -> None:
    file = open_pth(right)
    right.write_bytes(right.read_bytes()[:500])
    with pytest.raises(ModelError, match="changed while it was read"):
        rows_of(file, "b", 0, 1)


def test_entries_that_overlap_are_refused(right: Path) -> None:
    """One storage's bytes given out as another's, as quoted zip bombs do."""
    data = bytearray(right.read_bytes())
    first = data.find(b"PK\x01\x02", data.find(b"consolidated.00/data/0", 700))
    offsets = []
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        offsets.append(at)
        at = data.find(b"PK\x01\x02", at + 4)
    assert first in offsets
    data[offsets[2] + 42 : offsets[2] + 46] = data[offsets[1] + 42 : offsets[1] + 46]
    right.write_bytes(data)
    assert "overlaps" in refused(right) or "is not what" in refused(right)


@pytest.mark.parametrize("seed", range(8))
def test_mutated_files_only_ever_raise_model_errors(tmp_path: Path, seed: int) -> None:
    """Bytes flipped, pieces cut out, moved or doubled; most in the pickle and the directory."""
    chance = random.Random(seed)
    state_dict = write_torch(tmp_path / "y.pth", TENSORS, is_state_dict=True).read_bytes()
    n_refused = 0
    for _ in range(250):
        data = bytearray(state_dict)
        for _ in range(chance.randint(1, 4)):
            at, n = chance.randrange(len(data)), chance.randint(1, 40)
            kind = chance.randrange(4)
            if kind == 0:
                data[at] = chance.randrange(256)
            elif kind == 1:
                del data[at : at + n]
            elif kind == 2:
                data[at:at] = data[at : at + n]
            else:
                data[at : at + 4] = chance.choice([b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f"])
        path = tmp_path / "x.pth"
        path.write_bytes(data)
        try:
            file = open_pth(path)
            for tensor in file.tensors.values():
                tensor.read(0, 1)
        except ModelError:
            n_refused += 1
    assert n_refused > 100


@pytest.mark.parametrize("seed", range(8))
def test_mutated_pickles_only_ever_raise_model_errors(seed: int) -> None:
    chance = random.Random(seed)
    right = tensors_pickled(TENSORS, is_state_dict=True)
    letters = b"()}].0123NIJKLMQRSTVXacdehijloqrstu\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x93\x94"
    for _ in range(1500):
        data = bytearray(right)
        for _ in range(chance.randint(1, 5)):
            data[chance.randrange(2, len(data))] = chance.choice(letters)
        with contextlib.suppress(ModelError):
            pickle_reader.read_tensors(bytes(data), "x.pth")
