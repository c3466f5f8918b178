"""What params.json of Meta's LLaMA says, and what it leaves out: its shape, and how long it reads.

Every value is checked for type and range. A key that is not known is refused: what it changes would
be lost without a word. Pure but for reading the one file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from potluck.convert.json_file import JsonObject, read_json
from potluck.convert.rope_scaling import RopeScaling, rope_scaling
from potluck.cursor import shown
from potluck.errors import ModelError

FILE = "params.json"

_KEYS = frozenset(
    (
        *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim"),
        *("multiple_of", "ffn_dim_multiplier", "norm_eps", "vocab_size", "rope_theta"),
        *("use_scaled_rope", "rope_scaling_factor", "rope_scale_factor", "rope_high_freq_factor"),
    )
)
# They size Meta's own buffers and say nothing of the weights.
_HARMLESS = frozenset(("max_batch_size", "max_seq_len", "model_parallel_size", "_name"))

# LLaMA 3.1: arXiv:2407.21783; the rest of what use_scaled_rope means stands in Meta's code only.
_TRAINED_TOKENS = 8192  # before the frequencies were scaled
_SCALED_TOKENS = 131_072
_USUAL_FACTOR = 8.0
_SMALL_FACTOR, _SMALL_DIM = 32.0, 3072  # LLaMA 3.2's two, of 2,048 and 3,072


@dataclass(frozen=True, slots=True)
class MetaParams:
    """The shape of a model. Counts and sizes as in potluck/model.py; 0: not said."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    states_head_dim: bool
    ffn_dim: int
    ffn_multiple: int  # that ffn_dim is a multiple of
    norm_eps: float
    rope: RopeScaling
    states_rope_theta: bool
    vocab: int
    context_tokens: int  # that it was trained for, by what LLaMA it must be
    context_reason: str  # why it is that: "LLaMA 2"

    @property
    def q_dim(self) -> int:
        """Values of all heads' queries."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Values of all KV heads' keys."""
        return self.n_kv_heads * self.head_dim


def read_params(path: Path) -> MetaParams:
    """The model that `path`, a params.json, describes. Raises ModelError with the key's name."""
    json = read_json(path)
    for key in json.values:
        if key not in _KEYS and key not in _HARMLESS:
            remedy = "potluck knows LLaMA 1 to 3.3; a converter of the model's makers may help"
            raise json.error(f"{shown(key)} is not supported", remedy=remedy)
    dim = json.whole("dim", 1, 2**17)
    n_heads = json.whole("n_heads", 1, 2**12)
    n_kv_heads = json.whole("n_kv_heads", 1, 2**12, n_heads)
    if n_heads % n_kv_heads:
        raise json.error(f"{n_kv_heads} KV heads do not divide {n_heads} heads")
    if not (states_head_dim := _has(json, "head_dim")) and dim % n_heads:
        raise json.error(f"{n_heads} heads do not divide dim {dim}")
    head_dim = json.whole("head_dim", 2, 2**12, dim // n_heads)
    if head_dim % 2:
        raise json.error(f"heads of {head_dim} values, expected an even number")
    json.number("ffn_dim_multiplier", 0.01, 100.0, 1.0)  # what follows from it is in the tensors
    context_tokens, reason = _context(json, dim)
    return MetaParams(
        dim=dim,
        n_layers=json.whole("n_layers", 1, 2**12),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        states_head_dim=states_head_dim,
        ffn_dim=json.whole("hidden_dim", 1, 2**20) if _has(json, "hidden_dim") else 0,
        ffn_multiple=json.whole("multiple_of", 1, 2**20, 1),
        norm_eps=json.number("norm_eps", 1e-12, 0.1),
        rope=_rope(json, dim, head_dim),
        states_rope_theta=_has(json, "rope_theta"),
        vocab=max(0, json.whole("vocab_size", -1, 2**22, -1)),
        context_tokens=context_tokens,
        context_reason=reason,
    )


def _has(json: JsonObject, key: str) -> bool:
    return json.values.get(key) is not None


def _rope(json: JsonObject, dim: int, head_dim: int) -> RopeScaling:
    """The base, and with use_scaled_rope what each frequency is divided by."""
    theta = json.number("rope_theta", 1, 1e12, 10_000.0)
    if not json.flag("use_scaled_rope"):
        return RopeScaling(theta)
    # LLaMA 3.2's params.json does not tell it from 3.1's 8; its release as Hugging Face's does.
    usual = _SMALL_FACTOR if dim <= _SMALL_DIM else _USUAL_FACTOR
    key = "rope_scale_factor" if _has(json, "rope_scale_factor") else "rope_scaling_factor"
    scaling = {
        "rope_type": "llama3",
        "factor": json.number(key, 1, 2**16, usual),
        "low_freq_factor": 1.0,
        "high_freq_factor": json.number("rope_high_freq_factor", 1.001, 1e4, 4.0),
        "original_max_position_embeddings": _TRAINED_TOKENS,
    }
    described = JsonObject(json.file, {"rope_theta": theta, "rope_scaling": scaling})
    return rope_scaling(described, head_dim, _SCALED_TOKENS)


def _context(json: JsonObject, dim: int) -> tuple[int, str]:
    """Positions that the model was trained for, which params.json never says, and why.

    LLaMA 1 and 2 differ in little else than norm_eps, 1e-6 and 1e-5; but LLaMA 1's largest, 65B
    (dim 8,192), has 1e-5 as well, and LLaMA 2's of that dim has KV heads.
    """
    if json.flag("use_scaled_rope"):
        return _SCALED_TOKENS, "LLaMA 3.1 and later"
    theta = json.number("rope_theta", 1, 1e12, 10_000.0)
    if math.isclose(theta, 500_000):
        return _TRAINED_TOKENS, "LLaMA 3"
    if math.isclose(theta, 1_000_000):
        return 16_384, "Code Llama"
    is_second = _has(json, "n_kv_heads") or (json.number("norm_eps", 0, 1) > 5e-6 and dim != 8192)
    return (4096, "LLaMA 2") if is_second else (2048, "LLaMA 1")


def check_ffn_dim(params: MetaParams, ffn_dim: int, where: str) -> None:
    """Raises ModelError: not what params.json says or implies. `where`: for the message."""
    if params.ffn_dim and ffn_dim != params.ffn_dim:
        raise ModelError(f"{where}: {ffn_dim:,} rows, {FILE} has hidden_dim {params.ffn_dim:,}")
    if ffn_dim % params.ffn_multiple:
        multiple = f"no multiple of multiple_of {params.ffn_multiple:,} in {FILE}"
        raise ModelError(f"{where}: {ffn_dim:,} rows, {multiple}")
