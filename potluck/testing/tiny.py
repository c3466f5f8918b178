"""Tiny models of each architecture with a real vocabulary and seeded random weights.

Any dimensions, so that tests meet odd sizes; the same shape and seed give the same bytes. Weights
are scaled so that attention is far from uniform and logits spread over several units: a model whose
layers did next to nothing would pass every comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potluck.testing.quantize import F32, quantize
from potluck.testing.vocabulary import vocabulary
from potluck.testing.writer import Metadata, Tensor, write_gguf


@dataclass(frozen=True, slots=True)
class TinyShape:
    """What a tiny model is. Columns must be multiples of the block of their types: 32, or 256."""

    weight_type: str = "q4_0"
    dim: int = 64
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 16
    ffn_dim: int = 96
    vocab: int = 421  # odd: the last panel of 8 rows is not full
    context_tokens: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_dim: int = 0  # 0: head_dim
    tied: bool = False
    embedding_type: str = ""  # of embedding and head; "": weight_type
    vocabulary: str = "bpe"  # or "spm", or "" for none
    seed: int = 1
    architecture: str = "llama"  # qwen2 has biases, qwen3 norms of heads
    biases: bool = False  # of q, k, v and of what attention adds; llama only
    rope_keys: tuple[tuple[str, Metadata], ...] = ()  # ("scaling.factor", 2.0) and the like
    rope_divisors: tuple[float, ...] = ()  # rope_freqs.weight, rope_dim / 2 of them


def write_tiny(
    path: Path, shape: TinyShape | None = None, *, changes: Mapping[str, int | bytes] | None = None
) -> Path:
    """Writes the model and returns `path`. `changes` damage it, as in writer.overwritten."""
    shape = shape or TinyShape()
    return write_gguf(path, tiny_metadata(shape), tiny_tensors(shape), changes=changes)


def tiny_metadata(shape: TinyShape) -> list[tuple[str, Metadata]]:
    """The header's pairs, in the order that converters write them."""
    at = shape.architecture
    pairs: list[tuple[str, Metadata]] = [
        ("general.architecture", at),
        ("general.name", f"tiny {shape.weight_type} {shape.seed}"),
        (f"{at}.block_count", shape.n_layers),
        (f"{at}.context_length", shape.context_tokens),
        (f"{at}.embedding_length", shape.dim),
        (f"{at}.feed_forward_length", shape.ffn_dim),
        (f"{at}.attention.head_count", shape.n_heads),
        (f"{at}.attention.head_count_kv", shape.n_kv_heads),
        (f"{at}.attention.layer_norm_rms_epsilon", shape.norm_eps),
        (f"{at}.rope.freq_base", shape.rope_theta),
        (f"{at}.rope.dimension_count", shape.rope_dim or shape.head_dim),
        (f"{at}.vocab_size", shape.vocab),
    ]
    if shape.head_dim * shape.n_heads != shape.dim or at == "qwen3":
        pairs.append((f"{at}.attention.key_length", shape.head_dim))
        pairs.append((f"{at}.attention.value_length", shape.head_dim))
    pairs += [(f"{at}.rope.{key}", value) for key, value in shape.rope_keys]
    if shape.vocabulary:
        pairs += vocabulary(shape.vocabulary, shape.vocab)
    return pairs


def tiny_tensors(shape: TinyShape) -> list[Tensor]:
    """All tensors, quantized. Raises ValueError if a type does not fit its columns."""
    at_ends = shape.embedding_type or shape.weight_type

    def type_of(name: str, values: F32) -> str:
        if values.ndim == 1:
            return "f32"
        return at_ends if name in ("token_embd.weight", "output.weight") else shape.weight_type

    tensors = [
        Tensor(name, type_of(name, v), v.shape, quantize(v, type_of(name, v)))
        for name, v in tiny_values(shape).items()
    ]
    if shape.rope_divisors:
        divisors = np.array(shape.rope_divisors, np.float32)
        tensors.append(Tensor("rope_freqs.weight", "f32", divisors.shape, divisors.tobytes()))
    return tensors


def tiny_values(shape: TinyShape) -> dict[str, F32]:
    """All weights before they are quantized, by their GGUF names: [rows, cols], vectors."""
    random = np.random.default_rng(shape.seed)
    q_dim, kv_dim = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    values: dict[str, F32] = {}
    # Of its own, so that a model's other weights are the same without what it draws.
    of_vectors = np.random.default_rng([shape.seed, 1])

    def matrix(name: str, rows: int, cols: int, gain: float) -> None:
        values[name] = random.normal(0, gain / np.sqrt(cols), (rows, cols)).astype(np.float32)

    def norm(name: str) -> None:
        values[name] = random.normal(1, 0.2, shape.dim).astype(np.float32)

    # Values of about 0.5: what a layer adds weighs as much as the embedding.
    matrix("token_embd.weight", shape.vocab, shape.dim, 0.5 * np.sqrt(shape.dim))
    for layer in range(shape.n_layers):
        at = f"blk.{layer}"
        norm(f"{at}.attn_norm.weight")
        matrix(f"{at}.attn_q.weight", q_dim, shape.dim, 1.5)
        matrix(f"{at}.attn_k.weight", kv_dim, shape.dim, 1.5)
        matrix(f"{at}.attn_v.weight", kv_dim, shape.dim, 1.0)
        matrix(f"{at}.attn_output.weight", shape.dim, q_dim, 1.0)
        norm(f"{at}.ffn_norm.weight")
        matrix(f"{at}.ffn_gate.weight", shape.ffn_dim, shape.dim, 1.0)
        matrix(f"{at}.ffn_up.weight", shape.ffn_dim, shape.dim, 1.0)
        matrix(f"{at}.ffn_down.weight", shape.dim, shape.ffn_dim, 1.0)
        for suffix, size, centre, spread in _vectors(shape):
            drawn = of_vectors.normal(centre, spread, size)
            values[f"{at}.{suffix}"] = drawn.astype(np.float32)
    norm("output_norm.weight")
    if not shape.tied:
        matrix("output.weight", shape.vocab, shape.dim, 3.0)
    for name, found in values.items():
        # Neighbours once tested their kernels on "random" inputs that were one constant.
        if len(np.unique(found)) < found.size // 2:
            raise AssertionError(f"{name}: the random weights do not vary")
    return values


def _vectors(shape: TinyShape) -> list[tuple[str, int, float, float]]:
    """Vectors of a layer beyond the two norms: name, values, mean and standard deviation."""
    q_dim, kv_dim = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    found: list[tuple[str, int, float, float]] = []
    if shape.biases or shape.architecture == "qwen2":
        found += [
            (f"attn_{n}.bias", d, 0, 0.5) for n, d in (("q", q_dim), ("k", kv_dim), ("v", kv_dim))
        ]
    if shape.biases:
        found.append(("attn_output.bias", shape.dim, 0, 0.3))
    if shape.architecture == "qwen3":
        found += [(f"attn_{n}_norm.weight", shape.head_dim, 1.2, 0.3) for n in "qk"]
    return found
