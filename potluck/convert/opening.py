"""Which kind of model a path is, and its source.

Understood are Meta's folders, Hugging Face's folders, GGUF files and synthetic models, which are no
path at all; a file of a folder stands for the folder. What is taken where a folder holds two kinds
is said in the source's notes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from potluck import gguf
from potluck.convert.hugging_face import open_hugging_face
from potluck.convert.lora import with_lora
from potluck.convert.meta import open_meta
from potluck.cursor import opened, shown
from potluck.errors import ModelError, UnknownModel
from potluck.gguf_source import gguf_source
from potluck.synthetic import is_synthetic, open_synthetic
from potluck.tensor_source import Metadata, ModelSource

UNDERSTOOD = (
    "a folder of Meta's (params.json, consolidated.00.pth), one of Hugging Face's (config.json,"
    " model.safetensors) or a GGUF file"
)
# A file by whose name its folder is meant.
_OF_A_FOLDER = (".pth", ".safetensors", ".bin", ".json")


def open_source(
    path: Path,
    *,
    lora: Path | None = None,
    context_tokens: int | None = None,
    name: str | None = None,
) -> ModelSource:
    """The model at `path`; no weights are read but norms. Raises ModelError, UnknownModel.

    lora: an adapter's folder, merged into the weights. context_tokens and name: instead of what the
    model's files say.
    """
    try:
        source = _opened(path, lora, context_tokens, name)
    except OSError as e:  # a folder that may not be read, a name that is too long
        raise ModelError(f"{shown(str(path))}: can't be read ({e.strerror})") from e
    return replace(source, metadata=_changed(source.metadata, context_tokens, name))


def _opened(
    path: Path, lora: Path | None, context_tokens: int | None, name: str | None
) -> ModelSource:
    if is_synthetic(str(path)):
        source = gguf_source(open_synthetic(str(path)))
        return with_lora(source, lora) if lora else source
    if not path.exists():
        found = f"{shown(str(path))}: no such file or folder"
        raise UnknownModel(found, remedy=f"give {UNDERSTOOD}")
    folder = path if path.is_dir() else path.parent
    if path.is_file() and (not path.name.endswith(_OF_A_FOLDER) or _is_ggml(path)):
        source = gguf_source(gguf.read(path))
        return with_lora(source, lora) if lora else source
    if _is_hugging_face(folder) and path.suffix != ".pth":
        source = open_hugging_face(folder, lora=lora, name=name)
        if _is_meta(folder):
            ignored = "this folder holds Meta's files, too: taken are those of Hugging Face"
            return replace(source, notes=(*source.notes, ignored))
        return source
    if _is_meta(folder):
        source = open_meta(folder, context_tokens=context_tokens, name=name)
        return with_lora(source, lora) if lora else source
    raise ModelError(f"{shown(str(path))}: {_reason(folder)}", remedy=f"give {UNDERSTOOD}")


def _is_ggml(path: Path) -> bool:
    """GGUF or older, whatever it is called: ggml-model-q4_0.bin was usual once."""
    with opened(path, limit_bytes=len(gguf.MAGIC)) as file:
        return file.read_at(0, min(file.size_bytes, 4)) in (gguf.MAGIC, *gguf.OLD_MAGICS)


def _is_meta(folder: Path) -> bool:
    return any(folder.glob("consolidated.*.pth")) or (folder / "params.json").exists()


def _is_hugging_face(folder: Path) -> bool:
    """Also with weights missing, so that it is said which."""
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))
    return (folder / "config.json").exists() and (has_weights or not _is_meta(folder))


def _reason(folder: Path) -> str:
    """Why a folder is no model; one line."""
    if (folder / "adapter_config.json").exists():
        return "a LoRA adapter, no model of its own; convert its base model with --lora"
    if any(folder.glob("*.safetensors")):
        return "safetensors without config.json, which says what they are"
    if any(folder.glob("*.gguf")):
        return "a folder with GGUF files; name one of them"
    return "no model that potluck understands"


def _changed(
    metadata: Sequence[tuple[str, Metadata]], context_tokens: int | None, name: str | None
) -> list[tuple[str, Metadata]]:
    """The pairs with another context and name."""
    architecture = dict(metadata).get("general.architecture")
    changes: dict[str, Metadata] = {}
    if context_tokens is not None:
        changes[f"{architecture}.context_length"] = context_tokens
    if name is not None:
        changes["general.name"] = name
    return [(key, changes.get(key, value)) for key, value in metadata]
