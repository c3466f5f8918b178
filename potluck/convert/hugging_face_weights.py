"""Which files of a Hugging Face folder, or of an adapter's, hold which tensor.

One `model.safetensors`, or shards with an index that says where each tensor is; or the same as
files of torch, which older models are published as. The index is checked against the files, which
must be in the folder itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from potluck.convert.json_file import read_json
from potluck.convert.pth_file import open_pth
from potluck.convert.safetensors_file import open_safetensors
from potluck.cursor import shown
from potluck.errors import ModelError
from potluck.stored_tensor import StoredTensor, stamp

FLOAT_TYPES = ("f32", "f16", "bf16")  # that a model's weights may have

# The files looked for, the first that is there counts.
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# What may be beside weights and say something of them.
_SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model")

_INDEX_BYTES_LIMIT = 8 * 2**20  # a model of 70,000 tensors has 7 MB
_NUMBERED = re.compile(r"-\d{5}-of-(\d{5})\.\w+")


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Tensors by the names in the files at `paths`."""

    folder: Path
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    paths: tuple[Path, ...]

    def inputs(self) -> list[Path]:
        """All files that a model made of this folder depends on. Raises ModelError."""
        small = {path for pattern in _SMALL_FILES for path in self.folder.glob(pattern)}
        return [*self.paths, *sorted(small - set(self.paths))]

    @property
    def identity(self) -> str:
        """Equal as long as all those files are. Raises ModelError: one is gone."""
        return "\n".join(stamp(path).identity for path in self.inputs())

    def error(self, message: str, *, remedy: str = "") -> ModelError:
        """A ModelError about the folder."""
        return ModelError(f"{shown(str(self.folder))}: {message}", remedy=remedy)


def open_weights(folder: Path, file_names: Sequence[str] = MODEL_FILES) -> StoredWeights:
    """The weights in `folder`: the first of `file_names`, whole or in shards. Raises ModelError.

    Where both the whole file and shards are, the whole one counts, as it does for Hugging Face's
    own library.
    """
    name = shown(str(folder))
    for file_name in file_names:
        if (folder / file_name).exists():
            return _opened(folder / file_name)
        index_path = folder / f"{file_name}.index.json"
        if index_path.exists():
            return _sharded(folder, index_path)
        stem, _, ending = file_name.rpartition(".")
        if any(folder.glob(f"{stem}-*-of-*.{ending}")):
            raise ModelError(f"{name}: shards, but no {index_path.name} that says what is in them")
    raise ModelError(
        f"{name}: no {' and no '.join(file_names)}",
        remedy="fetch the weights into this folder",
    )


def _opened(path: Path) -> StoredWeights:
    """One file, by its ending."""
    is_torch = path.suffix != ".safetensors"
    tensors = open_pth(path).tensors if is_torch else open_safetensors(path).tensors
    return StoredWeights(path.parent, tensors, (path,))


def _sharded(folder: Path, index_path: Path) -> StoredWeights:
    index = read_json(index_path, limit_bytes=_INDEX_BYTES_LIMIT)
    places = index.inner("weight_map")
    if places is None or not places.values:
        raise index.error("no weight_map, or an empty one")
    file_of = {name: places.text(name) or "" for name in places.values}
    file_names = sorted(set(file_of.values()))
    for file_name in file_names:
        _check_file_name(index_path, file_name)
    _check_all_there(folder, file_names)
    shards = [_opened(folder / file_name) for file_name in file_names]
    tensors: dict[str, StoredTensor] = {}
    for file_name, shard in zip(file_names, shards, strict=True):
        for name, tensor in shard.tensors.items():
            if (expected := file_of.get(name)) != file_name:
                belongs = f"the index says {expected}" if expected else "the index has no such"
                raise ModelError(f"{shown(str(folder / file_name))}: {shown(name)}: {belongs}")
            tensors[name] = tensor
    if absent := sorted(file_of.keys() - tensors.keys()):
        where = shown(str(folder / file_of[absent[0]]))
        raise ModelError(f"{where}: no {shown(absent[0])}, which the index says is there")
    return StoredWeights(folder, tensors, tuple(folder / file_name for file_name in file_names))


def _check_file_name(index_path: Path, file_name: str) -> None:
    """A file of the folder, of the index's kind, and nothing outside of it."""
    ending = Path(index_path.name.removesuffix(".index.json")).suffix
    is_plain = not re.search(r"[/\\\0]", file_name) and file_name.endswith(ending)
    if not is_plain or len(file_name.encode()) > 255:
        kind = f"no {ending.removeprefix('.')} file of this folder"
        raise ModelError(f"{shown(str(index_path))}: {shown(repr(file_name))} is {kind}")


def _check_all_there(folder: Path, file_names: Sequence[str]) -> None:
    """Those that the index names, and as many as their names count."""
    name = shown(str(folder))
    if missing := [n for n in file_names if not (folder / n).exists()]:
        there = f"{len(file_names) - len(missing)} of {len(file_names)} files"
        others = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise ModelError(
            f"{name}: {there}, {shown(missing[0])}{others} missing",
            remedy="fetch the missing files into this folder",
        )
    for file_name in file_names:
        found = _NUMBERED.search(file_name)
        if found and int(found[1]) != len(file_names):
            raise ModelError(f"{name}: {shown(file_name)}, but the index names {len(file_names)}")
