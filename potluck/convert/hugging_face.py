"""A Hugging Face folder as a ModelSource: names, order of rows and metadata of GGUF.

LLaMA and what shares its architecture (Mistral, TinyLlama, SmolLM2, Alpaca, Vicuna), Qwen2 and
Qwen3. Weights keep their type; the writer converts. Every tensor of the folder has its place or is
known to carry nothing, and has the shape that config.json implies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from potluck.convert.hugging_face_config import HuggingFaceConfig, config_of, metadata_of
from potluck.convert.hugging_face_names import EMBEDDING, HEAD, NORM, gguf_name, has_rotary_rows
from potluck.convert.hugging_face_weights import FLOAT_TYPES, StoredWeights, open_weights
from potluck.convert.json_file import JsonObject, read_json
from potluck.convert.lora import merged
from potluck.convert.lora_adapter import Adapter, open_adapter
from potluck.convert.tensor_views import Interleaved, Renamed, f32_vector
from potluck.convert.vocabulary import vocabulary_pairs
from potluck.cursor import shown
from potluck.errors import ModelError
from potluck.tensor_source import Metadata, ModelSource, TensorSource

# Buffers that older files carry and that follow from the configuration.
_HARMLESS = re.compile(r"(?:^|\.)(?:rotary_emb\.\w+|position_ids|masked_bias)$")
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model")

Pairs = list[tuple[str, Metadata]]


def open_hugging_face(
    folder: Path, *, lora: Path | None = None, name: str | None = None
) -> ModelSource:
    """The model in `folder`, with the adapter in `lora` merged into it. Raises ModelError.

    `name` is what the model is called; without it, as the folder.
    """
    config = config_of(_config_json(folder))
    weights = open_weights(folder)
    tensors = _tensors(config, weights)
    adapter = open_adapter(lora) if lora else None
    if adapter:
        tensors = _with_adapter(config, tensors, adapter)
    n_rows = _n_tokens(tensors, adapter.weights if adapter else weights)
    vocabulary, notes = _vocabulary(folder, lora, n_rows)
    if config.rope.factors:
        tensors.insert(1, f32_vector("rope_freqs.weight", config.rope.factors))
    parts = [weights, adapter.weights] if adapter else [weights]
    return ModelSource(
        metadata=[*metadata_of(config, name or _name(folder), n_rows), *vocabulary],
        tensors=tensors,
        identity="\n".join(part.identity for part in parts),
        paths=tuple(str(path) for part in parts for path in part.inputs()),
        notes=(*notes, *_notes(config)),
    )


def _config_json(folder: Path) -> JsonObject:
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{shown(str(folder))}: a LoRA adapter, which is no model of its own",
            remedy=f"convert its base model with --lora {shown(str(folder))}",
        )
    return read_json(folder / "config.json")


def _tensors(config: HuggingFaceConfig, weights: StoredWeights) -> list[TensorSource]:
    """All that the model needs, in the order of use; names and order of rows are GGUF's."""
    found = _by_gguf_name(config, weights)
    tensors: list[TensorSource] = []
    for name, shape in _shapes(config):
        if name not in found:
            raise weights.error(_missing(name))
        tensor = found.pop(name)
        if tensor.shape != shape:
            was = f"shape {list(tensor.shape)}, config.json implies {list(shape)}"
            raise weights.error(f"{shown(tensor.name)}: {was}")
        if tensor.type_name not in FLOAT_TYPES:
            kinds = f"type {tensor.type_name} is not supported ({', '.join(FLOAT_TYPES)})"
            raise weights.error(f"{shown(tensor.name)}: {kinds}")
        is_turned = config.architecture == "llama" and has_rotary_rows(name)
        tensors.append(Renamed(name, Interleaved(tensor, config.head_dim) if is_turned else tensor))
    if config.is_tied:
        found.pop(HEAD, None)  # a copy, which Hugging Face's library does not read either
    for tensor in found.values():
        known = f"no part of a {config.architecture} model of {config.n_layers} layers"
        raise weights.error(f"tensor {shown(tensor.name)} is {known}")
    return tensors


def _by_gguf_name(config: HuggingFaceConfig, weights: StoredWeights) -> dict[str, TensorSource]:
    found: dict[str, TensorSource] = {}
    for tensor in weights.tensors.values():
        if _HARMLESS.search(tensor.name):
            continue
        name = gguf_name(tensor.name)
        if name is None:
            known = f"no part of a {config.architecture} model"
            raise weights.error(f"tensor {shown(tensor.name)} is {known}")
        if name in found:
            both = f"{shown(found[name].name)} and {shown(tensor.name)}"
            raise weights.error(f"{both} are the same tensor")
        found[name] = tensor
    return found


def _missing(name: str) -> str:
    if name == HEAD:
        return "missing lm_head.weight, and config.json does not say tie_word_embeddings"
    return f"missing {name} (in GGUF's words)"


def _shapes(c: HuggingFaceConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor, in the order of use."""
    q_dim, kv_dim = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (c.dim,),
        "attn_q.weight": (q_dim, c.dim),
        "attn_k.weight": (kv_dim, c.dim),
        "attn_v.weight": (kv_dim, c.dim),
        "attn_output.weight": (c.dim, q_dim),
        "ffn_norm.weight": (c.dim,),
        "ffn_gate.weight": (c.ffn_dim, c.dim),
        "ffn_up.weight": (c.ffn_dim, c.dim),
        "ffn_down.weight": (c.dim, c.ffn_dim),
    }
    if c.architecture == "qwen2" or c.has_biases:
        layer |= {"attn_q.bias": (q_dim,), "attn_k.bias": (kv_dim,), "attn_v.bias": (kv_dim,)}
    if c.has_biases:
        layer["attn_output.bias"] = (c.dim,)
    if c.architecture == "qwen3":
        layer |= {"attn_q_norm.weight": (c.head_dim,), "attn_k_norm.weight": (c.head_dim,)}
    yield EMBEDDING, (c.vocab, c.dim)
    for i in range(c.n_layers):
        for suffix, shape in layer.items():
            yield f"blk.{i}.{suffix}", shape
    yield NORM, (c.dim,)
    if not c.is_tied:
        yield HEAD, (c.vocab, c.dim)


def _with_adapter(
    config: HuggingFaceConfig, tensors: Sequence[TensorSource], adapter: Adapter
) -> list[TensorSource]:
    """An embedding that is the head, too, must stay both: the adapter changes neither or both."""
    changed = {HEAD, EMBEDDING} & adapter.tensor_names
    if config.is_tied and changed:
        if len(changed) == 1:
            which = "the embedding" if EMBEDDING in changed else "the head"
            raise adapter.weights.error(
                f"changes {which} only, which in this model are the same tensor"
            )
        tensors = [*tensors, Renamed(HEAD, tensors[0])]
    head_dim = config.head_dim if config.architecture == "llama" else 0
    return merged(tensors, adapter, interleaved_head_dim=head_dim)


def _n_tokens(tensors: Sequence[TensorSource], owner: StoredWeights) -> int:
    """Rows of the embedding; the head has as many."""
    rows = {t.name: t.shape[0] for t in tensors if t.name in (EMBEDDING, HEAD)}
    if rows.get(HEAD, rows[EMBEDDING]) != rows[EMBEDDING]:
        found = f"embed_tokens has {rows[EMBEDDING]:,} rows, lm_head {rows[HEAD]:,}"
        raise owner.error(f"{found}; expected equal")
    return rows[EMBEDDING]


def _vocabulary(folder: Path, lora: Path | None, n_rows: int) -> tuple[Pairs, list[str]]:
    """The adapter's own, if it brings one that fits, else the model's; and what to say of it.

    Trainers save a vocabulary beside the adapter: with tokens and a chat template that were added,
    or, often in Alpaca's time, with a padding token that no embedding has a row for.
    """
    if lora is None or not any((lora / name).exists() for name in _VOCABULARY_FILES):
        return vocabulary_pairs(folder, n_rows), []
    try:
        return vocabulary_pairs(lora, n_rows), [f"vocabulary and template are {shown(str(lora))}'s"]
    except ModelError as e:
        unfit = f"the adapter's vocabulary does not fit, the model's is taken ({e.message})"
        return vocabulary_pairs(folder, n_rows), [unfit]


def _name(folder: Path) -> str:
    """The folder's; in Hugging Face's cache, models--ORG--NAME/snapshots/HASH, that is NAME."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return shown(folder.parent.parent.name.split("--")[-1])
    return shown(folder.name)


def _notes(config: HuggingFaceConfig) -> tuple[str, ...]:
    if not 0 < config.window_tokens < config.context_tokens:
        return ()
    trained = f"the model was trained to look back {config.window_tokens:,} tokens"
    return (f"{trained}; in longer texts it looks back further, as it does in llama.cpp",)
