"""A GGUF file as a source of tensors, to be written again in other types.

Metadata is carried over as it is, in the file's order and with its exact types. Rows are read from
the file as they are asked for; nothing is held. Those of a synthetic model are made then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from potluck import stored_tensor
from potluck.engine import Synthetic, origin_of
from potluck.gguf import GgufFile
from potluck.stored_tensor import StoredTensor
from potluck.tensor_source import Metadata, ModelSource, Typed

# ggml's own types of fewer bits, which nothing here can turn into values.
_UNREADABLE = ("iq", "tq", "mxfp", "nvfp", "q1_", "q8_1", "q8_k")


@dataclass(frozen=True, slots=True)
class MadeTensor:
    """A TensorSource: one tensor of a synthetic model, as a file would have it."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    maker: Synthetic

    def read(self, first_row: int, n_rows: int) -> bytes:
        """The same rows whenever they are asked for."""
        return self.maker.rows(self.name, self.type_name, self.shape[-1], first_row, n_rows)


def gguf_source(file: GgufFile) -> ModelSource:
    """`file` as it is. Raises ModelError: one of several parts, or a type that can't be read."""
    if (n_parts := file.integer("split.count", 1)) > 1:
        raise file.error(f"one of {n_parts} parts of a model; join them (llama-gguf-split --merge)")
    if file.stored is not None:
        raise file.error("only the header of a model is here")
    for tensor in file.tensors.values():
        if tensor.type_name.startswith(_UNREADABLE):
            raise file.error(f"{tensor.name}: type {tensor.type_name} can't be converted")
    metadata = [(key, _exact(file, key)) for key in file.metadata]
    origin = origin_of(file)
    if isinstance(origin, Synthetic):
        made = [MadeTensor(t.name, t.type_name, t.shape, origin) for t in file.tensors.values()]
        return ModelSource(metadata, made, identity=f"{file.path} {file.header_sha256}")
    stamp = stored_tensor.stamp(file.path)
    stored = [
        StoredTensor(t.name, t.type_name, t.shape, stamp, t.offset_bytes, t.size_bytes)
        for t in file.tensors.values()
    ]
    whole = file.path.resolve()
    return ModelSource(
        metadata=metadata,
        tensors=stored,
        identity=f"gguf {whole} {file.header_sha256} {stamp.size_bytes} {stamp.changed_ns}",
        paths=(str(file.path),),
    )


def _exact(file: GgufFile, key: str) -> Metadata:
    """The value with the type that it has in the file."""
    value, kind = file.metadata[key], file.kinds[key]
    if kind == "str":
        return value if isinstance(value, str) else cast("Sequence[str]", value)
    return Typed(kind, cast("bool | int | float | Sequence[int]", value))
