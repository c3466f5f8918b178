"""What a model is: its shape from a file's metadata, which tensors a span needs, and their bytes.

`config_of` is the gate: what passes it has every tensor, each of the shape that follows from the
metadata and of a type the engine computes with, so nothing later asks again. Pure, given a
GgufFile; a ModelError names the file and the key or tensor, what was found and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from potluck.cursor import shown
from potluck.errors import ModelError, PlanError
from potluck.gguf import GgufFile, TensorInfo
from potluck.plan import Span
from potluck.refused import check_metadata
from potluck.rope import DIVISORS, UNSCALED, RopeScaling, scaling_of

# The engine's weight types; KERNELS section 2 has their layouts. Norms are always f32.
WEIGHT_TYPES = (
    *("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
)
# llama: LLaMA 1 to 3, Mistral, TinyLlama, SmolLM2 and others; biases if the file has them.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
KV_PAGE_TOKENS = 16  # positions of one session in one page of the KV
# Beside mapped weights and KV: the buffers of the largest batch, a slab a thread.
SCRATCH_BYTES = 150 * 10**6

EMBEDDING = "token_embd.weight"
HEAD_NORM = "output_norm.weight"
HEAD = "output.weight"

# Rotary frequencies that old converters stored beside each layer; they follow from rope_theta.
_HARMLESS = ("attn_rot_embd.weight", "rope.freqs")
_QKV_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")


class KvType(Enum):
    """How the KV is kept; an option of the plan, never of one worker."""

    F16 = "f16"
    Q8 = "q8"  # a byte a value, and a scale for each key and each value of a head

    def head_bytes(self, head_dim: int) -> int:
        """Of one position's key, or value, of one KV head.

        head_dim 128: 256 (F16), 132 (Q8).
        """
        if self is KvType.F16:
            return 2 * head_dim
        return (head_dim + 3) // 4 * 4 + 4  # the codes lie in fours


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a model. Refuses to be wrong: raises ModelError."""

    name: str
    architecture: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int  # each serves n_heads / n_kv_heads query heads
    head_dim: int
    ffn_dim: int
    vocab: int
    context_tokens: int  # that the model was trained for
    norm_eps: float
    rope_theta: float
    rope_dim: int  # values of a head that are rotated, from its start
    rope_interleaved: bool  # pairs (2i, 2i+1) and not (i, i + rope_dim/2); LLaMA's GGUF: True
    tied_embeddings: bool  # token_embd.weight is the head, too
    rope_scaling: RopeScaling = UNSCALED
    qkv_bias: bool = False  # q, k and v are products plus a bias,
    output_bias: bool = False  # and so is what attention adds
    qk_norm: bool = False  # each head of q and k is normed before it is rotated

    def __post_init__(self) -> None:
        for key, found, most in (
            ("embedding_length", self.dim, 2**17),
            ("block_count", self.n_layers, 2**12),
            ("attention.head_count", self.n_heads, 2**12),
            ("attention.head_count_kv", self.n_kv_heads, 2**12),
            ("attention.key_length", self.head_dim, 2**12),
            ("feed_forward_length", self.ffn_dim, 2**20),
            ("vocab_size", self.vocab, 2**22),
            ("context_length", self.context_tokens, 2**24),
            ("rope.dimension_count", self.rope_dim, 2**12),
        ):
            if not 1 <= found <= most:
                raise ModelError(f"{key} is {found}, expected 1 to {most:,}")
        if self.n_heads % self.n_kv_heads:
            raise ModelError(f"{self.n_kv_heads} KV heads do not divide {self.n_heads} heads")
        if self.head_dim % 2 or self.rope_dim % 2 or self.rope_dim > self.head_dim:
            heads = f"heads of {self.head_dim} values, {self.rope_dim} of them rotated"
            raise ModelError(f"{heads}; expected even numbers, the second not above the first")
        if not 0 < self.norm_eps < 1:
            raise ModelError(f"norm epsilon {self.norm_eps}, expected more than 0 and less than 1")
        if not 1 <= self.rope_theta <= 1e12:
            raise ModelError(f"rope base {self.rope_theta}, expected 1 to 1e12")
        if self.rope_scaling.is_yarn and self.rope_theta < 1.5:
            raise ModelError(f"rope base {self.rope_theta}, with YaRN expected 1.5 to 1e12")
        n_divisors = len(self.rope_scaling.divisors)
        if n_divisors not in (0, self.rope_dim // 2):
            expected = f"expected {self.rope_dim // 2}"
            raise ModelError(f"{n_divisors} divisors of rope frequencies, {expected}")


def config_of(file: GgufFile) -> ModelConfig:
    """The model in `file`; presence, shape and type of each tensor checked. Raises ModelError."""
    architecture = file.text("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise file.error(f"architecture {shown(architecture)} is not supported ({known})")
    check_metadata(file, architecture)
    config = _config(file, architecture)
    _check_tokens(file, config)
    _check_tensors(file, config)
    return config


def span_tensors(
    file: GgufFile, config: ModelConfig, span: Span, *, embeds: bool, has_head: bool
) -> list[TensorInfo]:
    """What a worker loads for `span`, in the order of use; each once, a tied embedding too.

    Raises PlanError if `span` ends beyond the model.
    """
    _check_span(config, span)
    names = [EMBEDDING] if embeds else []
    for layer in range(span.start, span.stop):
        names += [f"blk.{layer}.{suffix}" for suffix in layer_shapes(config)]
    if has_head:
        names += _head_names(config)
    return [file.tensors[name] for name in dict.fromkeys(names)]


def layer_bytes(file: GgufFile, config: ModelConfig, layer: int) -> int:
    """Weights of one layer as they lie in the file. Raises PlanError: no such layer."""
    span = Span(layer, layer + 1)
    return _sum_bytes(span_tensors(file, config, span, embeds=False, has_head=False))


def embedding_bytes(file: GgufFile, config: ModelConfig) -> int:  # noqa: ARG001  like its siblings
    """What embedding tokens adds to the first stage."""
    return file.tensors[EMBEDDING].size_bytes


def head_bytes(file: GgufFile, config: ModelConfig) -> int:
    """What norm and head add to the last stage; a tied embedding counts unless the stage has it."""
    return _sum_bytes([file.tensors[name] for name in _head_names(config)])


def kv_bytes_per_token(config: ModelConfig, span: Span, kv_type: KvType = KvType.F16) -> int:
    """Bytes that one position of one session takes in the KV of `span`.

    2 (keys, values) * layers of the span * n_kv_heads * KvType.head_bytes. LLaMA-7B, all 32 layers:
    524,288 (f16), 270,336 (q8). Raises PlanError if `span` ends beyond the model.
    """
    _check_span(config, span)
    return 2 * span.n_layers * config.n_kv_heads * kv_type.head_bytes(config.head_dim)


def layer_macs(config: ModelConfig) -> int:
    """Multiply-adds of one row in the matrices of one layer; LLaMA-65B: 809,500,672."""
    shapes = layer_shapes(config).values()
    return sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)


def scratch_bytes(config: ModelConfig, step_tokens: int) -> int:
    """Buffers of a step of so many rows: about six vectors of dim and two of ffn_dim each, in f32,
    and one row of logits.

    LLaMA-7B, 512 rows: 95.5 MB.
    """
    row_values = 6 * config.dim + 2 * config.ffn_dim
    return 4 * (step_tokens * row_values + config.vocab)


def passing_bytes(units: Sequence[int]) -> int:
    """What must be in memory of mapped layers (and a head) of these sizes: one in use, one that is
    read ahead of its use.
    """
    return min(sum(units), 2 * max(units, default=0))


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name after `blk.N.` and shape of each tensor of a layer, in the order of use."""
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    head_dim = config.head_dim
    biases = dict(zip(_QKV_BIASES, ((q_dim,), (kv_dim,), (kv_dim,)), strict=True))
    norms = {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    return {
        "attn_norm.weight": (config.dim,),
        "attn_q.weight": (q_dim, config.dim),
        "attn_k.weight": (kv_dim, config.dim),
        "attn_v.weight": (kv_dim, config.dim),
        **(biases if config.qkv_bias else {}),
        **(norms if config.qk_norm else {}),
        "attn_output.weight": (config.dim, q_dim),
        **({"attn_output.bias": (config.dim,)} if config.output_bias else {}),
        "ffn_norm.weight": (config.dim,),
        "ffn_gate.weight": (config.ffn_dim, config.dim),
        "ffn_up.weight": (config.ffn_dim, config.dim),
        "ffn_down.weight": (config.dim, config.ffn_dim),
    }


def _config(file: GgufFile, architecture: str) -> ModelConfig:
    def whole(suffix: str, default: int | None = None) -> int:
        return file.integer(f"{architecture}.{suffix}", default)

    vocab = _tensor(file, EMBEDDING).rows
    name = file.text("general.name", file.path.stem)
    dim = whole("embedding_length")
    n_layers = whole("block_count")
    n_heads = whole("attention.head_count")
    n_kv_heads = whole("attention.head_count_kv", n_heads)
    ffn_dim = whole("feed_forward_length")
    context_tokens = whole("context_length")
    norm_eps = file.number(f"{architecture}.attention.layer_norm_rms_epsilon")
    rope_theta = file.number(f"{architecture}.rope.freq_base", 10_000.0)
    head_dim = whole("attention.key_length", 0)
    if not head_dim:
        if n_heads < 1 or dim % n_heads:
            raise file.error(f"{n_heads} heads do not divide embedding_length {dim}")
        head_dim = dim // n_heads
    if (value_length := whole("attention.value_length", head_dim)) != head_dim:
        raise file.error(f"values of {value_length} and keys of {head_dim} a head; expected equal")
    rope_dim = whole("rope.dimension_count", head_dim)
    scaling = scaling_of(file, architecture, rope_dim=rope_dim, context_tokens=context_tokens)
    try:
        return ModelConfig(
            name=name,
            architecture=architecture,
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            ffn_dim=ffn_dim,
            vocab=vocab,
            context_tokens=context_tokens,
            norm_eps=norm_eps,
            rope_theta=rope_theta,
            rope_dim=rope_dim,
            rope_interleaved=architecture == "llama",
            tied_embeddings=HEAD not in file.tensors,
            rope_scaling=scaling,
            qkv_bias=_has_qkv_bias(file, architecture),
            output_bias=architecture == "llama" and "blk.0.attn_output.bias" in file.tensors,
            qk_norm=architecture == "qwen3",
        )
    except ModelError as e:
        raise file.error(e.message, remedy=e.remedy) from e


def _has_qkv_bias(file: GgufFile, architecture: str) -> bool:
    has_any = any(f"blk.0.{suffix}" in file.tensors for suffix in _QKV_BIASES)
    return architecture == "qwen2" or (architecture == "llama" and has_any)


def _check_tokens(file: GgufFile, config: ModelConfig) -> None:
    """The embedding has a row for each token."""
    claimed = file.integer(f"{config.architecture}.vocab_size", config.vocab)
    if claimed != config.vocab:
        raise file.error(f"vocab_size is {claimed:,}, {EMBEDDING} has {config.vocab:,} rows")
    if "tokenizer.ggml.tokens" in file.metadata:
        n_tokens = len(file.array("tokenizer.ggml.tokens", str))
        if n_tokens != config.vocab:
            raise file.error(f"the tokenizer has {n_tokens:,} tokens, the model {config.vocab:,}")


def _check_tensors(file: GgufFile, config: ModelConfig) -> None:
    """Each needed tensor is there with its shape and a type the engine knows, and no other is."""
    _check_tensor(file, EMBEDDING, (config.vocab, config.dim))
    expected = {EMBEDDING}
    for layer in range(config.n_layers):
        for suffix, shape in layer_shapes(config).items():
            _check_tensor(file, f"blk.{layer}.{suffix}", shape)
            expected.add(f"blk.{layer}.{suffix}")
    for name in _head_names(config):
        shape = (config.dim,) if name == HEAD_NORM else (config.vocab, config.dim)
        _check_tensor(file, name, shape)
        expected.add(name)
    if config.rope_scaling.divisors:
        expected.add(DIVISORS)
    for name in file.tensors:
        if name not in expected and not name.endswith(_HARMLESS):
            known = f"no part of a {config.architecture} model of {config.n_layers} layers"
            raise file.error(f"tensor {shown(name)} is {known}")


def _check_tensor(file: GgufFile, name: str, shape: tuple[int, ...]) -> None:
    tensor = _tensor(file, name)
    if tensor.shape != shape:
        raise file.error(f"{name}: shape {list(tensor.shape)}, expected {list(shape)}")
    types = WEIGHT_TYPES if len(shape) > 1 else ("f32",)
    if tensor.type_name not in types:
        raise file.error(f"{name}: type {tensor.type_name} is not supported ({', '.join(types)})")


def _tensor(file: GgufFile, name: str) -> TensorInfo:
    if name not in file.tensors:
        raise file.error(f"missing {name}")
    return file.tensors[name]


def _head_names(config: ModelConfig) -> list[str]:
    return [HEAD_NORM, EMBEDDING if config.tied_embeddings else HEAD]


def _check_span(config: ModelConfig, span: Span) -> None:
    if span.stop > config.n_layers:
        raise PlanError(f"span {span} ends beyond the model's {config.n_layers} layers")


def _sum_bytes(tensors: Sequence[TensorInfo]) -> int:
    return sum(t.size_bytes for t in tensors)
