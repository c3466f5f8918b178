"""What a model says, in plain numpy and float64: a second implementation, to judge the first.

Reads like the paper and shares nothing with the engine: weights by dequantize.py, nothing rounded.
`rounds` makes it round what the engine rounds by design (activations to 8 bits where the
weights have blocks, the KV to f16) and nothing else: close enough to the engine to show a wrong
minimum or centre that hides in that rounding. All positions of a timeline at once, one matrix in
memory at a time: 2,000 positions of SmolLM2 take 12 s on two cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from potluck.blocks import BY_NAME
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


class Oracle:
    """The model in `file`, with the shape `config` (whose RoPE layout a test may change)."""

    def __init__(self, file: GgufFile, config: ModelConfig, *, rounds: bool = False) -> None:
        self.file = file
        self.config = config
        self.rounds = rounds

    def logits(self, tokens: Sequence[int]) -> F64:
        """Logits [n, vocab] after each of n tokens from position 0 on."""
        return self.head(self.hidden(tokens))

    def hidden(self, tokens: Sequence[int], kv: OracleKv | None = None) -> F64:
        """Hidden states [n, dim] after the last layer; `tokens` continue the timeline in `kv`."""
        kv = kv or OracleKv()
        x: F64 = self._values(EMBEDDING)[np.asarray(tokens)]
        for layer in range(self.config.n_layers):
            x = self.layer(layer, x, kv)
        return x

    def layer(self, layer: int, x: F64, kv: OracleKv) -> F64:
        """Hidden states [n, dim] after one layer; x continues that layer's timeline in `kv`."""
        positions = len(kv.keys.get(layer, ())) + np.arange(len(x))
        x = x + self._attention(layer, x, positions, kv)
        return x + self._feed_forward(layer, x)

    def head(self, x: F64) -> F64:
        """Hidden states [n, dim] to logits [n, vocab]."""
        normed = norm(x, self._values(HEAD_NORM), self.config.norm_eps)
        return self._product(normed, EMBEDDING if self.config.tied_embeddings else HEAD)

    def _attention(self, layer: int, x: F64, positions: I64, kv: OracleKv) -> F64:
        """What attention adds to x [n, dim]; appends to `kv`."""
        c, n, at = self.config, len(x), f"blk.{layer}"
        h = norm(x, self._values(f"{at}.attn_norm.weight"), c.norm_eps)
        q = self._biased(h, f"{at}.attn_q").reshape(n, c.n_heads, c.head_dim)
        k = self._biased(h, f"{at}.attn_k").reshape(n, c.n_kv_heads, c.head_dim)
        v = self._biased(h, f"{at}.attn_v").reshape(n, c.n_kv_heads, c.head_dim)
        if f"{at}.attn_q_norm.weight" in self.file.tensors:
            q = norm(q, self._values(f"{at}.attn_q_norm.weight"), c.norm_eps)
            k = norm(k, self._values(f"{at}.attn_k_norm.weight"), c.norm_eps)
        q, k = rotate(q, positions, c), rotate(k, positions, c)
        if self.rounds:
            k, v = k.astype(np.float16).astype(np.float64), v.astype(np.float16).astype(np.float64)
        if layer in kv.keys:
            k, v = np.concatenate([kv.keys[layer], k]), np.concatenate([kv.values[layer], v])
        kv.keys[layer], kv.values[layer] = k, v
        return self._biased(attend(q, k, v, positions), f"{at}.attn_output")

    def _feed_forward(self, layer: int, x: F64) -> F64:
        """What the SwiGLU network adds to x [n, dim]."""
        at = f"blk.{layer}"
        h = norm(x, self._values(f"{at}.ffn_norm.weight"), self.config.norm_eps)
        gate = self._product(h, f"{at}.ffn_gate.weight")
        up = self._product(h, f"{at}.ffn_up.weight")
        return self._product(gate / (1 + np.exp(-gate)) * up, f"{at}.ffn_down.weight")

    def _biased(self, x: F64, name: str) -> F64:
        """x [n, cols] times `name`.weight, plus `name`.bias [rows] if the file has it."""
        product = self._product(x, f"{name}.weight")
        if f"{name}.bias" in self.file.tensors:
            product = product + self._values(f"{name}.bias")
        return product

    def _product(self, x: F64, name: str) -> F64:
        """x [n, cols] times the matrix `name` [rows, cols], transposed; [n, rows]."""
        block = BY_NAME[self.file.tensors[name].type_name].values
        if self.rounds and block > 1:
            x = rounded_to_int8(x, block)
        product: F64 = x @ self._values(name).T
        return product

    def _values(self, name: str) -> F64:
        return tensor_values(self.file, name)


def norm(x: F64, weight: F64, eps: float) -> F64:
    """Root mean square norm over the last axis of [..., dim], times weight [dim]."""
    out: F64 = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return out


def rotate(x: F64, positions: I64, config: ModelConfig) -> F64:
    """Turn the value pairs of each head by their position (rotary embedding, arXiv:2104.09864).

    x is [n, heads, head_dim], positions [n]. Pair i of the first rope_dim values is turned by
    position * frequency i: values 2i and 2i + 1 if the layout is interleaved, else i and
    i + rope_dim / 2, and made longer by YaRN's factor. Values from rope_dim on stay.
    """
    half = config.rope_dim // 2
    angles = positions[:, None] * frequencies(config)
    scaling = config.rope_scaling
    length = scaling.magnitude * (1 + 0.1 * np.log(scaling.factor) * scaling.is_yarn)
    cos, sin = length * np.cos(angles)[:, None, :], length * np.sin(angles)[:, None, :]
    if config.rope_interleaved:
        first, second = slice(0, config.rope_dim, 2), slice(1, config.rope_dim, 2)
    else:
        first, second = slice(0, half), slice(half, config.rope_dim)
    a, b = x[..., first], x[..., second]
    out = x.copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out


def frequencies(config: ModelConfig) -> F64:
    """Radians a position of each pair, [rope_dim / 2]: rope_theta**(-2i / rope_dim), stretched.

    YaRN as its paper has it (arXiv:2309.00071): by r, the turns of a pair within the
    first context, a pair is stretched by the factor (r small), kept (r large), or a mix of both;
    the mix is linear in the pair's number, between whole pairs, as everybody computes it.
    """
    scaling, half = config.rope_scaling, config.rope_dim // 2
    kept: F64 = config.rope_theta ** (-np.arange(half) / half)
    if scaling.divisors:
        kept = kept / np.array(scaling.divisors)
    stretched = kept / scaling.factor
    if not scaling.extrapolation:
        return stretched

    def pair_of(turns: float) -> float:
        wavelength = scaling.original_tokens / turns
        return float(half * np.log(wavelength / (2 * np.pi)) / np.log(config.rope_theta))

    first = max(np.floor(pair_of(scaling.beta_fast)), 0.0)
    last = min(np.ceil(pair_of(scaling.beta_slow)), config.rope_dim - 1.0)
    mix = np.interp(np.arange(half), [first, max(last, first + 0.001)], [scaling.extrapolation, 0])
    return kept * mix + stretched * (1 - mix)


def attend(q: F64, k: F64, v: F64, positions: I64) -> F64:
    """Each query of [n, n_heads, head_dim] at its position over keys and values up to there.

    k, v are [positions, n_kv_heads, head_dim], from position 0 on. Gives [n, n_heads * head_dim].
    """
    n_shared = q.shape[1] // k.shape[1]  # query heads of one KV head
    mixed = np.empty_like(q)
    for start in range(0, len(q), 256):
        rows = slice(start, start + 256)
        n_seen = int(positions[rows][-1]) + 1  # all later keys are future to these rows
        is_future = np.arange(n_seen) > positions[rows, None]  # [rows, n_seen]
        for head in range(q.shape[1]):
            shared = head // n_shared
            scores = q[rows, head] @ k[:n_seen, shared].T / np.sqrt(q.shape[2])
            scores[is_future] = -np.inf
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            mixed[rows, head] = shares @ v[:n_seen, shared] / shares.sum(axis=1, keepdims=True)
    return mixed.reshape(len(q), -1)


def rounded_to_int8(x: F64, block: int) -> F64:
    """Each block of a row to 127 steps of its largest magnitude, as the engine does."""
    blocks = x.reshape(-1, block)
    step = np.abs(blocks).max(axis=1, keepdims=True) / 127
    step[step == 0] = 1
    rounded: F64 = np.rint(blocks / step) * step
    return rounded.reshape(x.shape)
