"""A GGUF file as a source of tensors, to be written again in other types.

Metadata is carried over as it is, in the file's order and with its exact types. Rows are read from
the file as they are asked for; nothing is held. Those of a synthetic model are made then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from potluck.engine import Synthetic, origin_of
from potluck.errors import ModelError
from potluck.gguf import GgufFile, TensorInfo
from potluck.tensor_source import Metadata, ModelSource, Typed

# ggml's own types of fewer bits, which nothing here can turn into values.
_UNREADABLE = ("iq", "tq", "mxfp", "nvfp", "q1_", "q8_1", "q8_k")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A TensorSource: one tensor of a file."""

    path: Path
    info: TensorInfo

    @property
    def name(self) -> str:
        """Its name in the file."""
        return self.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Slowest dimension first."""
        return self.info.shape

    @property
    def type_name(self) -> str:
        """Its type in the file."""
        return self.info.type_name

    def read(self, first_row: int, n_rows: int) -> bytes:
        """Rows as they lie in the file. Raises ModelError: it changed since its header was read."""
        row_bytes = self.info.size_bytes // self.info.rows
        wanted = n_rows * row_bytes
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.info.offset_bytes + first_row * row_bytes)
                data = file.read(wanted) or b""
                while len(data) < wanted and (more := file.read(wanted - len(data))):
                    data += more
        except OSError as e:
            raise ModelError(f"{self.path}: can't be read ({e.strerror})") from e
        if len(data) != wanted:
            raise ModelError(f"{self.path}: {self.name} ends early: the file shrank")
        return data


@dataclass(frozen=True, slots=True)
class MadeTensor:
    """A TensorSource: one tensor of a synthetic model."""

    maker: Synthetic
    info: TensorInfo

    @property
    def name(self) -> str:
        """As a file would have it."""
        return self.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Slowest dimension first."""
        return self.info.shape

    @property
    def type_name(self) -> str:
        """As a file would have it."""
        return self.info.type_name

    def read(self, first_row: int, n_rows: int) -> bytes:
        """The same rows whenever they are asked for."""
        info = self.info
        return self.maker.rows(info.name, info.type_name, info.cols, first_row, n_rows)


def gguf_source(file: GgufFile) -> ModelSource:
    """`file` as it is. Raises ModelError: one of several parts, or a type that can't be read."""
    if (n_parts := file.integer("split.count", 1)) > 1:
        raise file.error(f"one of {n_parts} parts of a model; join them (llama-gguf-split --merge)")
    for tensor in file.tensors.values():
        if tensor.type_name.startswith(_UNREADABLE):
            raise file.error(f"{tensor.name}: type {tensor.type_name} can't be converted")
    metadata = [(key, _exact(file, key)) for key in file.metadata]
    origin = origin_of(file)
    if isinstance(origin, Synthetic):
        made = [MadeTensor(origin, info) for info in file.tensors.values()]
        return ModelSource(metadata, made, identity=f"{file.path} {file.header_sha256}")
    status = file.path.stat()
    whole = file.path.resolve()
    return ModelSource(
        metadata=metadata,
        tensors=[GgufTensor(file.path, info) for info in file.tensors.values()],
        identity=f"gguf {whole} {file.header_sha256} {status.st_size} {status.st_mtime_ns}",
        paths=(str(file.path),),
    )


def _exact(file: GgufFile, key: str) -> Metadata:
    """The value with the type that it has in the file."""
    value, kind = file.metadata[key], file.kinds[key]
    if kind == "str":
        return value if isinstance(value, str) else cast("Sequence[str]", value)
    return Typed(kind, cast("bool | int | float | Sequence[int]", value))
