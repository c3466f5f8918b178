"""What Hugging Face calls the tensors of LLaMA, Qwen2 and Qwen3, and what GGUF calls them."""

from __future__ import annotations

import re

EMBEDDING, NORM, HEAD = "token_embd.weight", "output_norm.weight", "output.weight"

# After `layers.N.` -> after `blk.N.`.
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.o_proj.bias": "attn_output.bias",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_ENDS = {"embed_tokens.weight": EMBEDDING, "norm.weight": NORM, "lm_head.weight": HEAD}
_IN_LAYER = re.compile(r"layers\.(0|[1-9]\d{0,3})\.(.+)")
_ROTARY = (".attn_q.weight", ".attn_q.bias", ".attn_k.weight", ".attn_k.bias")


def gguf_name(name: str) -> str | None:
    """GGUF's name of a tensor, with or without `model.` in front; None if it has none."""
    plain = name.removeprefix("model.")
    if plain in _ENDS:
        return _ENDS[plain]
    found = _IN_LAYER.fullmatch(plain)
    if found is None or found[2] not in _LAYER:
        return None
    return f"blk.{found[1]}.{_LAYER[found[2]]}"


def has_rotary_rows(gguf_name: str) -> bool:
    """Whether rows lie in pairs that are turned together: then their order differs for `llama`."""
    return gguf_name.endswith(_ROTARY)
