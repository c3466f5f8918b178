"""What config.json says of a Hugging Face model: its shape, and the same as GGUF metadata.

Every value is checked for type and range, and what would change the arithmetic in a way that the
engine does not know is refused by name. Reads no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from potluck.convert.json_file import JsonObject
from potluck.convert.rope_scaling import RopeScaling, rope_scaling
from potluck.cursor import shown
from potluck.tensor_source import Metadata

# Hugging Face's name -> GGUF's. Mistral is LLaMA with other numbers; LLaMAForCausalLM is how the
# first conversions of LLaMA 1 spelt it, and what Alpaca-LoRA was trained on.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True, slots=True)
class HuggingFaceConfig:
    """The shape of a model. Counts and sizes as in potluck/model.py."""

    architecture: str  # GGUF's
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    states_head_dim: bool  # so it is written, though it may follow from dim
    ffn_dim: int
    vocab: int
    context_tokens: int
    window_tokens: int  # that attention looks back in some layer; 0: all of them
    norm_eps: float
    rope: RopeScaling
    is_tied: bool  # the embedding is the head, too
    has_biases: bool  # of what attention multiplies


def config_of(json: JsonObject) -> HuggingFaceConfig:
    """The model that config.json describes. Raises ModelError."""
    architecture = _architecture(json)
    _refuse(json, architecture)
    n_heads = json.whole("num_attention_heads", 1, 2**12)
    dim = json.whole("hidden_size", 1, 2**17)
    n_kv_heads = json.whole("num_key_value_heads", 1, 2**12, n_heads)
    if n_heads % n_kv_heads:
        raise json.error(f"{n_kv_heads} KV heads do not divide {n_heads} heads")
    states_head_dim = json.values.get("head_dim") is not None
    if not states_head_dim and dim % n_heads:
        raise json.error(f"{n_heads} heads do not divide hidden_size {dim}")
    head_dim = json.whole("head_dim", 2, 2**12, dim // n_heads)
    if head_dim % 2:
        raise json.error(f"heads of {head_dim} values, expected an even number")
    # What the first conversions called it.
    older = json.whole("max_sequence_length", 1, 2**24, 2048)
    context_tokens = json.whole("max_position_embeddings", 1, 2**24, older)
    rope = rope_scaling(json, head_dim, context_tokens)
    if rope.factors and architecture != "llama":
        raise json.error(f"rope scaling llama3 is not supported for {architecture}")
    return HuggingFaceConfig(
        architecture=architecture,
        dim=dim,
        n_layers=json.whole("num_hidden_layers", 1, 2**12),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        states_head_dim=states_head_dim,
        ffn_dim=json.whole("intermediate_size", 1, 2**20),
        vocab=json.whole("vocab_size", 1, 2**22),
        context_tokens=context_tokens,
        window_tokens=_window_tokens(json),
        norm_eps=json.number("rms_norm_eps", 1e-12, 0.1),
        rope=rope,
        is_tied=bool(json.flag("tie_word_embeddings")),
        has_biases=bool(json.flag("attention_bias")),
    )


def metadata_of(config: HuggingFaceConfig, name: str, n_rows: int) -> list[tuple[str, Metadata]]:
    """The pairs that llama.cpp's converter writes, without the vocabulary.

    `n_rows`: tokens of the embedding, which an adapter may have resized.
    """
    own: list[tuple[str, Metadata]] = [
        ("block_count", config.n_layers),
        ("context_length", config.context_tokens),
        ("embedding_length", config.dim),
        ("feed_forward_length", config.ffn_dim),
        ("attention.head_count", config.n_heads),
        ("attention.head_count_kv", config.n_kv_heads),
        ("rope.freq_base", config.rope.theta),
        *config.rope.pairs,
        ("attention.layer_norm_rms_epsilon", config.norm_eps),
    ]
    if config.states_head_dim:
        own.append(("attention.key_length", config.head_dim))
        own.append(("attention.value_length", config.head_dim))
    own.append(("vocab_size", n_rows))
    if config.architecture == "llama":
        own.append(("rope.dimension_count", config.head_dim))
    return [
        ("general.architecture", config.architecture),
        ("general.type", "model"),
        ("general.name", name),
        *((f"{config.architecture}.{key}", value) for key, value in own),
    ]


def _architecture(json: JsonObject) -> str:
    if not (named := json.strings("architectures")):
        raise json.error("no architectures, so not the configuration of a language model")
    for name in named:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    known = ", ".join(name for name in ARCHITECTURES if not name.startswith("LLaMA"))
    raise json.error(f"architecture {shown(named[0])} is not supported ({known})")


def _refuse(json: JsonObject, architecture: str) -> None:
    """Nothing in it asks for what neither engine nor GGUF's architectures know."""
    for key in ("quantization_config", "quantization"):
        if (quantization := json.inner(key)) is not None:
            method = shown(quantization.text("quant_method") or "of a kind that is not named")
            raise json.error(
                f"{key}: the weights are quantized already ({method})",
                remedy="fetch the model's original, in float16, bfloat16 or float32",
            )
    if (activation := json.text("hidden_act") or "silu") != "silu":
        raise json.error(f"hidden_act {shown(activation)} is not supported (silu)")
    if json.flag("mlp_bias"):
        raise json.error("mlp_bias true is not supported")
    if json.flag("attention_bias") and architecture != "llama":
        raise json.error(f"attention_bias true is not supported for {architecture}")


def _window_tokens(json: JsonObject) -> int:
    """0: every layer looks back to the start. Mistral 0.1 says 4,096, Qwen2 says it and uses none.

    Mistral has no switch; Qwen's is off unless it says otherwise.
    """
    window_tokens = json.whole("sliding_window", 0, 2**24, 0)
    kinds = json.strings("layer_types")
    if kinds and "sliding_attention" not in kinds:
        return 0
    if unknown := [k for k in kinds if k not in ("sliding_attention", "full_attention")]:
        raise json.error(f"layer_types: {shown(unknown[0])} is not supported")
    is_mistral = "MistralForCausalLM" in json.strings("architectures")
    uses = json.flag("use_sliding_window")
    return window_tokens if (is_mistral if uses is None else uses) else 0
