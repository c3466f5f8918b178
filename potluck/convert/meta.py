"""A folder of Meta's LLaMA as a ModelSource: params.json, consolidated.NN.pth, tokenizer.model.

LLaMA 1 to 3.3 and what is published in their layout. Rows of wq and wk stay as they are: Meta turns
values 2i and 2i + 1 of a head together, and so does GGUF's `llama`. Weights keep their type; the
writer converts. Every tensor of the files has its place, or is known to carry nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from potluck.convert.meta_params import FILE, MetaParams, check_ffn_dim, read_params
from potluck.convert.meta_shards import (
    Cut,
    Joined,
    check_count,
    copies_differ,
    joined,
    open_shards,
    shard_paths,
)
from potluck.convert.pth_file import PthFile
from potluck.convert.tensor_views import f32_vector
from potluck.convert.vocabulary import vocabulary_pairs
from potluck.cursor import shown
from potluck.errors import ModelError
from potluck.tensor_source import Metadata, ModelSource, TensorSource

# Rotary frequencies, which follow from rope_theta.
_HARMLESS = frozenset(("rope.freqs",))
_SIZE_NAME = re.compile(r"\d+(\.\d+)?[Bb]")

# After `layers.N.` and after `blk.N.`, how it is cut, and its shape in words of MetaParams.
_LAYER: Sequence[tuple[str, str, Cut, tuple[str, ...]]] = (
    ("attention_norm", "attn_norm", Cut.COPIES, ("dim",)),
    ("attention.wq", "attn_q", Cut.ROWS, ("q_dim", "dim")),
    ("attention.wk", "attn_k", Cut.ROWS, ("kv_dim", "dim")),
    ("attention.wv", "attn_v", Cut.ROWS, ("kv_dim", "dim")),
    ("attention.wo", "attn_output", Cut.COLUMNS, ("dim", "q_dim")),
    ("ffn_norm", "ffn_norm", Cut.COPIES, ("dim",)),
    ("feed_forward.w1", "ffn_gate", Cut.ROWS, ("ffn_dim", "dim")),
    ("feed_forward.w3", "ffn_up", Cut.ROWS, ("ffn_dim", "dim")),
    ("feed_forward.w2", "ffn_down", Cut.COLUMNS, ("dim", "ffn_dim")),
)
_EMBEDDING, _NORM, _HEAD = "tok_embeddings.weight", "norm.weight", "output.weight"
_FIRST_Q, _FIRST_GATE = "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight"


def open_meta(
    folder: Path,
    *,
    context_tokens: int | None = None,
    name: str | None = None,
) -> ModelSource:
    """The model in `folder`; no weights are read but its norms. Raises ModelError.

    context_tokens: instead of the length that follows from which LLaMA it is, as params.json does
    not say it. What was assumed is in the source's notes.
    """
    if not (folder / FILE).exists():
        remedy = "it lies beside consolidated.00.pth where Meta publishes it"
        raise ModelError(f"{shown(str(folder))}: no {FILE}", remedy=remedy)
    params = read_params(folder / FILE)
    paths = shard_paths(folder)
    files = open_shards(paths)
    _check_implied_count(folder, params, files)
    tensors = _tensors(files, params)
    embedding, gate = tensors[0], next(t for t in tensors if t.name == "blk.0.ffn_gate.weight")
    n_rows, ffn_dim = embedding.shape[0], gate.shape[0]
    notes = _differing(tensors)
    if context_tokens is None:
        context_tokens = params.context_tokens
        notes.append(
            f"{FILE} does not say the context's length: assumed are {context_tokens:,} tokens,"
            f" those of {params.context_reason} (--context N changes it)"
        )
    metadata = _metadata(params, name or _name(folder), n_rows, ffn_dim, context_tokens)
    all_tensors: list[TensorSource] = list(tensors)
    if params.rope.factors:
        all_tensors.insert(1, f32_vector("rope_freqs.weight", params.rope.factors))
    return ModelSource(
        metadata=[*metadata, *vocabulary_pairs(folder, n_rows)],
        tensors=all_tensors,
        identity="\n".join(file.stamp.identity for file in files),
        paths=tuple(str(p) for p in (*paths, folder / FILE, *_tokenizers(folder))),
        notes=tuple(notes),
    )


def _check_implied_count(folder: Path, params: MetaParams, files: Sequence[PthFile]) -> None:
    """As many files as the queries' rows of the first one are a part of."""
    if _FIRST_Q not in files[0].tensors:
        raise files[0].error(f"{_FIRST_Q} is missing, so no LLaMA of Meta's")
    rows = files[0].tensors[_FIRST_Q].shape[0]
    if params.q_dim % rows == 0:
        check_count(folder, range(len(files)), params.q_dim // rows)


def _tensors(files: Sequence[PthFile], params: MetaParams) -> list[Joined]:
    """All tensors in GGUF's order, their shapes checked."""
    _check_known(files[0], params)
    gate = joined(files, _FIRST_GATE, "", Cut.ROWS, (0, params.dim))
    check_ffn_dim(params, gate.shape[0], _FIRST_GATE)
    sizes = {
        "dim": params.dim,
        "q_dim": params.q_dim,
        "kv_dim": params.kv_dim,
        "ffn_dim": gate.shape[0],
    }
    embedding = _embedding(files, params)
    tensors = [embedding]
    for layer in range(params.n_layers):
        for theirs, ours, cut, shape in _LAYER:
            name, gguf_name = f"layers.{layer}.{theirs}.weight", f"blk.{layer}.{ours}.weight"
            expected = tuple(sizes[word] for word in shape)
            tensors.append(joined(files, name, gguf_name, cut, expected))
    tensors.append(joined(files, _NORM, "output_norm.weight", Cut.COPIES, (params.dim,)))
    if _HEAD in files[0].tensors:
        rows = embedding.shape[0]
        tensors.append(joined(files, _HEAD, "output.weight", Cut.ROWS, (rows, params.dim)))
    return tensors


def _differing(tensors: Sequence[Joined]) -> list[str]:
    """A note if vectors that should be copies are not: the first file's count, as for Meta."""
    found = [t.pieces[0] for t in tensors if t.cut is Cut.COPIES and copies_differ(t)]
    if not found:
        return []
    others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    name, taken = f"{found[0].name}{others}", found[0].stamp.path.name
    return [f"{name} differs from file to file: those of {taken} are taken"]


def _embedding(files: Sequence[PthFile], params: MetaParams) -> Joined:
    """LLaMA 1 and 2 cut it by columns, LLaMA 3 by rows: the width of a piece tells."""
    if _EMBEDDING not in files[0].tensors:
        raise files[0].error(f"{_EMBEDDING} is missing")
    by_rows = files[0].tensors[_EMBEDDING].shape[-1] == params.dim
    cut = Cut.ROWS if by_rows else Cut.COLUMNS
    return joined(files, _EMBEDDING, "token_embd.weight", cut, (params.vocab, params.dim))


def _check_known(file: PthFile, params: MetaParams) -> None:
    """Nothing in the file would be left out."""
    known = {_EMBEDDING, _NORM, _HEAD} | _HARMLESS
    for layer in range(params.n_layers):
        known |= {f"layers.{layer}.{theirs}.weight" for theirs, *_ in _LAYER}
    if unknown := [name for name in file.tensors if name not in known]:
        raise file.error(f"{shown(unknown[0])} is no part of a LLaMA of {params.n_layers} layers")


def _metadata(
    params: MetaParams, name: str, vocab: int, ffn_dim: int, context_tokens: int
) -> list[tuple[str, Metadata]]:
    """The pairs that llama.cpp's converter writes, without the vocabulary."""
    own: list[tuple[str, Metadata]] = [
        ("block_count", params.n_layers),
        ("context_length", context_tokens),
        ("embedding_length", params.dim),
        ("feed_forward_length", ffn_dim),
        ("attention.head_count", params.n_heads),
        ("attention.head_count_kv", params.n_kv_heads),
    ]
    if params.states_rope_theta:
        own.append(("rope.freq_base", params.rope.theta))
    own.append(("attention.layer_norm_rms_epsilon", params.norm_eps))
    if params.states_head_dim:
        own.append(("attention.key_length", params.head_dim))
        own.append(("attention.value_length", params.head_dim))
    own.append(("vocab_size", vocab))
    own.append(("rope.dimension_count", params.head_dim))
    return [
        ("general.architecture", "llama"),
        ("general.type", "model"),
        ("general.name", name),
        *((f"llama.{key}", value) for key, value in own),
    ]


def _tokenizers(folder: Path) -> list[Path]:
    """What vocabulary_pairs may have read."""
    places = (folder, folder.resolve().parent)
    names = ("tokenizer.model", "tokenizer.json")
    return [path for p in places for name in names if (path := p / name).exists()]


def _name(folder: Path) -> str:
    """The folder's; "LLaMA 7B" for Meta's "7B"."""
    name = shown(folder.resolve().name)
    return f"LLaMA {name}" if _SIZE_NAME.fullmatch(name) else name
