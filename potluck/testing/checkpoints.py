"""Checkpoints as their makers publish them, of the weights of tiny models: Meta's, Hugging Face's.

The same TinyShape gives the same weights as `write_tiny`, so what a converter makes of these files
can be compared value by value. Meta's shards are split as fairscale split LLaMA 1 and 2 (the
embedding by columns) or LLaMA 3 (by rows); Hugging Face's q and k have their rotary pairs apart.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from potluck.testing.quantize import F32, quantize
from potluck.testing.sentence_piece_file import write_sentence_pieces
from potluck.testing.tiny import TinyShape, tiny_values
from potluck.testing.torch_file import TorchTensor, write_torch
from potluck.testing.vocabulary import INSTRUCTIONS

# After `blk.N.` in GGUF: after `layers.N.` in Meta's files, how shards are cut, and after
# `model.layers.N.` in Hugging Face's.
_LAYER = {
    "attn_norm.weight": ("attention_norm.weight", "whole", "input_layernorm.weight"),
    "attn_q.weight": ("attention.wq.weight", "rows", "self_attn.q_proj.weight"),
    "attn_k.weight": ("attention.wk.weight", "rows", "self_attn.k_proj.weight"),
    "attn_v.weight": ("attention.wv.weight", "rows", "self_attn.v_proj.weight"),
    "attn_output.weight": ("attention.wo.weight", "columns", "self_attn.o_proj.weight"),
    "ffn_norm.weight": ("ffn_norm.weight", "whole", "post_attention_layernorm.weight"),
    "ffn_gate.weight": ("feed_forward.w1.weight", "rows", "mlp.gate_proj.weight"),
    "ffn_up.weight": ("feed_forward.w3.weight", "rows", "mlp.up_proj.weight"),
    "ffn_down.weight": ("feed_forward.w2.weight", "columns", "mlp.down_proj.weight"),
}
# What Qwen2 (and some LLaMAs) and Qwen3 have besides; Meta publishes no such models.
_EXTRA = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.bias": "self_attn.o_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ENDS = {
    "token_embd.weight": ("tok_embeddings.weight", "columns", "model.embed_tokens.weight"),
    "output_norm.weight": ("norm.weight", "whole", "model.norm.weight"),
    "output.weight": ("output.weight", "rows", "lm_head.weight"),
}
_SAFETENSORS_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}

# Heads, ffn and vocabulary can be cut into 8, as 65B's; LLaMA 1's context and epsilon.
CUT_IN_8 = TinyShape(
    "f16",
    dim=64,
    n_heads=8,
    n_kv_heads=8,
    head_dim=8,
    ffn_dim=192,
    vocab=424,
    context_tokens=2048,
    vocabulary="spm",
    norm_eps=1e-6,
)


def write_meta(
    folder: Path,
    shape: TinyShape,
    *,
    n_shards: int = 1,
    params: Mapping[str, object] | None = None,
    embedding_by_rows: bool = False,
    tokenizer_above: bool = False,
    n_tokens: int | None = None,
) -> Path:
    """A folder as Meta published LLaMA: params.json, shards, tokenizer.model. Returns `folder`.

    Of `shape`, weight_type must be f32, f16 or bf16. `params` changes keys of params.json; a value
    of None leaves the key out. `tokenizer_above`: it lies beside the folder, as in LLaMA 1.
    `n_tokens`: of the tokenizer, if it is not to fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(meta_params(shape, params)))
    place = folder.parent if tokenizer_above else folder
    _write_tokenizer(place / "tokenizer.model", shape, n_tokens)
    for shard in range(n_shards):
        tensors = meta_tensors(shape, shard, n_shards, embedding_by_rows=embedding_by_rows)
        write_torch(folder / f"consolidated.{shard:02}.pth", tensors)
    return folder


def meta_params(shape: TinyShape, changes: Mapping[str, object] | None = None) -> dict[str, object]:
    """params.json of LLaMA 1 and 2; rope_theta and n_kv_heads only where they are not usual."""
    params: dict[str, object] = {
        "dim": shape.dim,
        "multiple_of": 32,
        "n_heads": shape.n_heads,
        "n_layers": shape.n_layers,
        "norm_eps": shape.norm_eps,
        "vocab_size": -1,
    }
    if shape.n_kv_heads != shape.n_heads:
        params["n_kv_heads"] = shape.n_kv_heads
    if shape.rope_theta != 10_000.0:
        params["rope_theta"] = shape.rope_theta
    if shape.head_dim * shape.n_heads != shape.dim:
        params["head_dim"] = shape.head_dim
    params |= changes or {}
    return {key: value for key, value in params.items() if value is not None}


def meta_tensors(
    shape: TinyShape, shard: int, n_shards: int, *, embedding_by_rows: bool = False
) -> list[TorchTensor]:
    """What shard `shard` of `n_shards` holds. Raises ValueError: it can't be cut so."""
    tensors = []
    for name, values in tiny_values(shape).items():
        at, cut = _meta_name(name)
        if name == "token_embd.weight" and embedding_by_rows:
            cut = "rows"
        part = _cut(values, cut, shard, n_shards)
        data = quantize(part, shape.weight_type)
        tensors.append(TorchTensor(at, shape.weight_type, part.shape, data))
    freqs = shape.rope_theta ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
    data = quantize(freqs, shape.weight_type)
    tensors.append(TorchTensor("rope.freqs", shape.weight_type, freqs.shape, data))
    return tensors


def write_hugging_face(
    folder: Path,
    shape: TinyShape,
    *,
    n_files: int = 1,
    config: Mapping[str, object] | None = None,
    n_tokens: int | None = None,
) -> Path:
    """The same weights as a Hugging Face folder: config.json, safetensors, tokenizer.model.

    With more than one file there is an index. `config` changes keys of config.json; None leaves a
    key out. Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(shape, config)))
    _write_tokenizer(folder / "tokenizer.model", shape, n_tokens)
    settings = {"add_bos_token": True, "add_eos_token": False, "chat_template": INSTRUCTIONS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tensors = list(hugging_face_tensors(shape).items())
    if n_files == 1:
        write_safetensors(folder / "model.safetensors", dict(tensors), shape.weight_type)
        return folder
    places: dict[str, str] = {}
    for i in range(n_files):
        part = dict(tensors[i * len(tensors) // n_files : (i + 1) * len(tensors) // n_files])
        file_name = f"model-{i + 1:05}-of-{n_files:05}.safetensors"
        write_safetensors(folder / file_name, part, shape.weight_type)
        places |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def hugging_face_config(
    shape: TinyShape, changes: Mapping[str, object] | None = None
) -> dict[str, object]:
    """config.json of LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM."""
    config: dict[str, object] = {
        "architectures": [_ARCHITECTURES[shape.architecture]],
        "model_type": shape.architecture,
        "hidden_act": "silu",
        "hidden_size": shape.dim,
        "intermediate_size": shape.ffn_dim,
        "max_position_embeddings": shape.context_tokens,
        "num_attention_heads": shape.n_heads,
        "num_hidden_layers": shape.n_layers,
        "num_key_value_heads": shape.n_kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[shape.weight_type],
        "vocab_size": shape.vocab,
    }
    if shape.head_dim * shape.n_heads != shape.dim or shape.architecture == "qwen3":
        config["head_dim"] = shape.head_dim
    if shape.biases:
        config["attention_bias"] = True
    for key, value in (changes or {}).items():
        config[key] = value
        if value is None:
            del config[key]
    return config


def hugging_face_tensors(shape: TinyShape) -> dict[str, F32]:
    """Weights by Hugging Face's names, rows of q and k in its order.

    GGUF has that order, too, but for LLaMA.
    """
    tensors = {}
    turned = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")
    for name, values in tiny_values(shape).items():
        if shape.architecture == "llama" and name.endswith(turned):
            values = halves(values, shape.head_dim)
        tensors[_hugging_face_name(name)] = values
    return tensors


def halves(values: F32, head_dim: int) -> F32:
    """Rows of q or k, [heads * head_dim, ...], with the first of each rotary pair in front.

    Row 2i + j of a head goes to j * head_dim / 2 + i: Hugging Face turns values i and
    i + head_dim / 2 together, Meta and GGUF values 2i and 2i + 1.
    """
    by_pair = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(by_pair.swapaxes(1, 2).reshape(values.shape))


def write_safetensors(path: Path, tensors: Mapping[str, F32], type_name: str) -> Path:
    """One file of tensors of one type: a length, a JSON header, the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        encoded = quantize(values, type_name)
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[type_name],
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(encoded)],
        }
        data += encoded
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _write_tokenizer(path: Path, shape: TinyShape, n_tokens: int | None) -> None:
    n_tokens = shape.vocab if n_tokens is None else n_tokens
    write_sentence_pieces(path, max(n_tokens, shape.vocab), keep=n_tokens)


def _meta_name(name: str) -> tuple[str, str]:
    """Meta's name of a tensor, and how it is cut over shards."""
    if name in _ENDS:
        return _ENDS[name][0], _ENDS[name][1]
    _, layer, rest = name.split(".", 2)
    return f"layers.{layer}.{_LAYER[rest][0]}", _LAYER[rest][1]


def _hugging_face_name(name: str) -> str:
    if name in _ENDS:
        return _ENDS[name][2]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{_EXTRA[rest] if rest in _EXTRA else _LAYER[rest][2]}"


def _cut(values: F32, cut: str, shard: int, n_shards: int) -> F32:
    if cut == "whole":
        return values
    axis = 0 if cut == "rows" else 1
    if values.shape[axis] % n_shards:
        raise ValueError(f"{values.shape[axis]} {cut} can't be cut into {n_shards}")
    parts: Sequence[F32] = np.split(values, n_shards, axis=axis)
    return np.ascontiguousarray(parts[shard])


def changed_config(folder: Path, **changes: object) -> Path:
    """Changes keys of a Hugging Face folder's config.json. Returns `folder`."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder
