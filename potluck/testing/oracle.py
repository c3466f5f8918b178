"""What a LLaMA model says, in plain numpy and float64: a second implementation, to judge the first.

Reads like the paper and shares nothing with the engine: weights dequantized by dequantize.py,
activations never quantized, KV not rounded. All positions of a timeline at once, one matrix in
memory at a time: 2,000 positions of SmolLM2 take 12 s on two cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from potluck.gguf import GgufFile
from potluck.model import EMBEDDING, HEAD, HEAD_NORM, ModelConfig
from potluck.testing.dequantize import F64, tensor_values

I64 = NDArray[np.int64]


@dataclass
class OracleKv:
    """Keys (rotated) and values of a timeline, for each layer [positions, n_kv_heads, head_dim]."""

    keys: dict[int, F64] = field(default_factory=dict)
    values: dict[int, F64] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Positions so far."""
        return len(self.keys[0]) if self.keys else 0


def oracle_logits(file: GgufFile, config: ModelConfig, tokens: Sequence[int]) -> F64:
    """Logits [n, vocab] after each of n tokens from position 0 on."""
    return oracle_head(file, config, oracle_hidden(file, config, tokens))


def oracle_hidden(
    file: GgufFile, config: ModelConfig, tokens: Sequence[int], kv: OracleKv | None = None
) -> F64:
    """Hidden states [n, dim] after the last layer; `tokens` continue the timeline in `kv`."""
    kv = kv or OracleKv()
    positions = kv.length + np.arange(len(tokens))
    x: F64 = tensor_values(file, EMBEDDING)[np.asarray(tokens)]
    for layer in range(config.n_layers):
        x = x + _attention(file, config, layer, x, positions, kv)
        x = x + _feed_forward(file, config, layer, x)
    return x


def oracle_head(file: GgufFile, config: ModelConfig, x: F64) -> F64:
    """Hidden states [n, dim] to logits [n, vocab]."""
    weights = tensor_values(file, EMBEDDING if config.tied_embeddings else HEAD)
    logits: F64 = normed(x, tensor_values(file, HEAD_NORM), config.norm_eps) @ weights.T
    return logits


def normed(x: F64, weight: F64, eps: float) -> F64:
    """Root mean square norm of each row of [n, dim], times weight [dim]."""
    out: F64 = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return out


def rotated(x: F64, positions: I64, config: ModelConfig) -> F64:
    """Turn the value pairs of each head by their position (rotary embedding, arXiv:2104.09864).

    x is [n, heads, head_dim], positions [n]. Pair i of the first rope_dim values is turned by
    position * rope_theta**(-2i / rope_dim) rad: values 2i and 2i + 1 if the layout is interleaved,
    else i and i + rope_dim / 2. Values from rope_dim on stay.
    """
    half = config.rope_dim // 2
    angles = positions[:, None] * config.rope_theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    if config.rope_interleaved:
        first, second = slice(0, config.rope_dim, 2), slice(1, config.rope_dim, 2)
    else:
        first, second = slice(0, half), slice(half, config.rope_dim)
    a, b = x[..., first], x[..., second]
    out = x.copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out


def _attention(
    file: GgufFile, config: ModelConfig, layer: int, x: F64, positions: I64, kv: OracleKv
) -> F64:
    """What attention adds to x [n, dim]; appends to `kv`."""
    n = len(x)
    at = f"blk.{layer}"
    h = normed(x, tensor_values(file, f"{at}.attn_norm.weight"), config.norm_eps)

    def projected(name: str, n_heads: int) -> F64:
        weights = tensor_values(file, f"{at}.{name}.weight")
        return (h @ weights.T).reshape(n, n_heads, config.head_dim)

    q = rotated(projected("attn_q", config.n_heads), positions, config)
    k = rotated(projected("attn_k", config.n_kv_heads), positions, config)
    v = projected("attn_v", config.n_kv_heads)
    if layer in kv.keys:
        k, v = np.concatenate([kv.keys[layer], k]), np.concatenate([kv.values[layer], v])
    kv.keys[layer], kv.values[layer] = k, v

    hidden = np.arange(len(k)) > positions[:, None]  # [n, positions]: what lies in the future
    mixed = np.empty((n, config.n_heads, config.head_dim))
    for head in range(config.n_heads):
        shared = head // (config.n_heads // config.n_kv_heads)
        scores = q[:, head] @ k[:, shared].T / np.sqrt(config.head_dim)
        scores[hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, shared]
    return mixed.reshape(n, -1) @ tensor_values(file, f"{at}.attn_output.weight").T


def _feed_forward(file: GgufFile, config: ModelConfig, layer: int, x: F64) -> F64:
    """What the SwiGLU network adds to x [n, dim]."""
    at = f"blk.{layer}"
    h = normed(x, tensor_values(file, f"{at}.ffn_norm.weight"), config.norm_eps)
    gate = h @ tensor_values(file, f"{at}.ffn_gate.weight").T
    up = h @ tensor_values(file, f"{at}.ffn_up.weight").T
    hidden = gate / (1 + np.exp(-gate)) * up  # [n, ffn_dim]
    added: F64 = hidden @ tensor_values(file, f"{at}.ffn_down.weight").T
    return added
