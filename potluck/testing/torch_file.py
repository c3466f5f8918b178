"""Writes `.pth` files as torch.save lays them out, without torch and without pickle.

A zip of stored entries: `data.pkl` (opcodes of pickle protocol 2, written one by one), a storage a
tensor under `data/`, and `version`; contents start at multiples of 64 bytes. A storage may be a
hole: a file of true size that takes no disk, for benches. PyTorch's serialization notes; APPNOTE.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

STORAGE_TYPES = {"f32": "FloatStorage", "f16": "HalfStorage", "bf16": "BFloat16Storage"}
VALUE_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_ALIGNMENT = 64
_MOST_32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """One tensor; `data` None: a hole of its size, which reads as zeros."""

    name: str
    type_name: str  # "f32", "f16" or "bf16"
    shape: tuple[int, ...]  # slowest dimension first
    data: bytes | None

    @property
    def n_values(self) -> int:
        """Of the tensor, and of its storage."""
        n = 1
        for size in self.shape:
            n *= size
        return n


def write_torch(
    path: Path,
    tensors: Sequence[TorchTensor],
    *,
    pickled: bytes | None = None,
    is_state_dict: bool = False,
    byte_order: bytes | None = None,
) -> Path:
    """Writes the file and returns `path`. `pickled` takes the place of the right `data.pkl`.

    is_state_dict: an OrderedDict with an attribute, as `model.state_dict()` is; otherwise a dict.
    byte_order: what newer versions of torch write into an entry of that name.
    """
    folder = path.stem
    with path.open("wb") as file:
        zip_ = _Zip(file)
        right = tensors_pickled(tensors, is_state_dict=is_state_dict)
        zip_.add(f"{folder}/data.pkl", right if pickled is None else pickled)
        if byte_order is not None:
            zip_.add(f"{folder}/byteorder", byte_order)
        for key, tensor in enumerate(tensors):
            size_bytes = tensor.n_values * VALUE_BYTES[tensor.type_name]
            zip_.add(f"{folder}/data/{key}", tensor.data, size_bytes)
        zip_.add(f"{folder}/version", b"3\n")
        zip_.finish()
    return path


def tensors_pickled(tensors: Sequence[TorchTensor], *, is_state_dict: bool = False) -> bytes:
    """The `data.pkl` of these tensors; tensor i has storage i to itself."""
    p = Opcodes()
    if is_state_dict:
        p.ordered_dict()
    else:
        p.raw(b"}")
        p.memoize()
    p.raw(b"(")
    for key, tensor in enumerate(tensors):
        p.text(tensor.name)
        p.tensor(tensor, key)
    p.raw(b"u")
    if is_state_dict:
        p.metadata()
    p.raw(b".")
    return bytes(p.data)


class Opcodes:
    """A pickle under construction: the few opcodes that torch.save writes."""

    def __init__(self) -> None:
        self.data = bytearray(b"\x80\x02")
        self._memo: dict[str, int] = {}
        self._n_memoized = 0

    def raw(self, data: bytes) -> None:
        """Opcodes as they are."""
        self.data += data

    def memoize(self, known_as: str = "") -> None:
        """BINPUT; what has a name is fetched from the memo when it is written again."""
        n = self._n_memoized
        self.data += b"q" + bytes([n]) if n < 256 else b"r" + struct.pack("<I", n)
        if known_as:
            self._memo[known_as] = n
        self._n_memoized += 1

    def name(self, module: str, name: str) -> None:
        """A class or function by its name: GLOBAL."""
        if not self._recalled(f"{module}.{name}"):
            self.raw(f"c{module}\n{name}\n".encode())
            self.memoize(f"{module}.{name}")

    def text(self, text: str, *, is_constant: bool = False) -> None:
        """A string; constants of torch's source are one object, and so written once."""
        if is_constant and self._recalled(f"'{text}"):
            return
        encoded = text.encode()
        self.raw(b"X" + struct.pack("<I", len(encoded)) + encoded)
        self.memoize(f"'{text}" if is_constant else "")

    def whole(self, value: int) -> None:
        """A whole number that is not negative."""
        if value < 256:
            self.raw(b"K" + bytes([value]))
        elif value < 65536:
            self.raw(b"M" + struct.pack("<H", value))
        elif value < 2**31:
            self.raw(b"J" + struct.pack("<i", value))
        else:
            size = value.bit_length() // 8 + 1
            self.raw(b"\x8a" + bytes([size]) + value.to_bytes(size, "little"))

    def wholes(self, values: Sequence[int]) -> None:
        """A tuple of whole numbers."""
        if not values:
            self.raw(b")")
            return
        if len(values) > 3:
            self.raw(b"(")
        for value in values:
            self.whole(value)
        self.raw([b"", b"\x85", b"\x86", b"\x87"][len(values)] if len(values) <= 3 else b"t")
        self.memoize()

    def tensor(self, tensor: TorchTensor, key: int) -> None:
        """A whole tensor at the start of storage `key`: _rebuild_tensor_v2 and its arguments."""
        self.name("torch._utils", "_rebuild_tensor_v2")
        self.raw(b"((")
        self.text("storage", is_constant=True)
        self.name("torch", STORAGE_TYPES[tensor.type_name])
        self.text(str(key))
        self.text("cpu", is_constant=True)
        self.whole(tensor.n_values)
        self.raw(b"t")
        self.memoize()
        self.raw(b"Q")
        self.whole(0)
        self.wholes(tensor.shape)
        self.wholes(contiguous_strides(tensor.shape))
        self.raw(b"\x89")
        self.ordered_dict()
        self.raw(b"t")
        self.memoize()
        self.raw(b"R")
        self.memoize()

    def ordered_dict(self) -> None:
        """An empty OrderedDict."""
        self.name("collections", "OrderedDict")
        self.raw(b")R")
        self.memoize()

    def metadata(self) -> None:
        """The attribute `_metadata` of a state_dict: versions of its modules."""
        self.raw(b"}")
        self.memoize()
        self.text("_metadata")
        self.ordered_dict()
        self.raw(b"sb")

    def _recalled(self, known_as: str) -> bool:
        n = self._memo.get(known_as)
        if n is not None:
            self.raw(b"h" + bytes([n]) if n < 256 else b"j" + struct.pack("<I", n))
        return n is not None


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Values from one index to the next, of each dimension of an array without gaps."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class _Zip:
    """Stored entries, aligned by an extra field "FB", each with a data descriptor behind it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._directory = bytearray()
        self._n_entries = 0

    def add(self, name: str, data: bytes | None, size_bytes: int | None = None) -> None:
        """An entry; without data a hole of `size_bytes`, whose checksum is left 0."""
        size = len(data) if data is not None else size_bytes or 0
        crc = zlib.crc32(data) if data is not None else 0
        start, encoded = self._file.tell(), name.encode()
        self._file.write(_local_header(encoded, start, size))
        if data is None:
            self._file.seek(size, 1)
        else:
            self._file.write(data)
        sizes = struct.pack("<QQ" if size >= _MOST_32 else "<II", size, size)
        self._file.write(b"PK\x07\x08" + struct.pack("<I", crc) + sizes)
        wide = b"".join(struct.pack("<Q", n) for n in (size, size, start) if n >= _MOST_32)
        extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
        short, at = min(size, _MOST_32), min(start, _MOST_32)
        self._directory += b"PK\x01\x02" + struct.pack(
            "<HHHHHHIIIHHHHHII",
            *(0, 0, 0x0808, 0, 0, 0, crc, short, short, len(encoded), len(extra), 0, 0, 0, 0, at),
        )
        self._directory += encoded + extra
        self._n_entries += 1

    def finish(self) -> None:
        """The directory and its end, in 64 bits where they are needed."""
        start, size, n = self._file.tell(), len(self._directory), self._n_entries
        self._file.write(self._directory)
        if start >= _MOST_32 or n >= 0xFFFF:
            fields = (44, 45, 45, 0, 0, n, n, size, start)
            end = self._file.tell()
            self._file.write(b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", *fields))
            self._file.write(b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1))
        few, at = min(n, 0xFFFF), min(start, _MOST_32)
        self._file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, few, few, size, at, 0))


def _local_header(name: bytes, start: int, size: int) -> bytes:
    """Sizes and checksum stand in the descriptor and the directory; the padding is in `extra`."""
    wide = b""
    if size >= _MOST_32 or start >= _MOST_32:
        numbers = [size, size] if size >= _MOST_32 else []
        numbers += [start] if start >= _MOST_32 else []
        wide = struct.pack("<HH", 1, 8 * len(numbers)) + struct.pack(f"<{len(numbers)}Q", *numbers)
    before = start + 30 + len(name) + len(wide) + 4
    n_padding = -before % _ALIGNMENT
    extra = wide + b"FB" + struct.pack("<H", n_padding) + b"Z" * n_padding
    short = _MOST_32 if size >= _MOST_32 else 0
    fields = (0, 0x0808, 0, 0, 0, 0, short, short, len(name), len(extra))
    return b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", *fields) + name + extra
