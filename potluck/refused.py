"""What a file may ask for that the engine does not compute: refused by the name of the key.

Pure, given a GgufFile. Rotary scaling, most of which it does compute, is potluck/rope.py's.
"""

from __future__ import annotations

from potluck.gguf import GgufFile

# Metadata that changes the arithmetic in ways the engine does not know; the value that does not.
_REFUSED = {
    "expert_count": 0,
    "rope.scaling.alpha": 0,
    "rope.scaling.yarn_log_multiplier": 0,
    "attention.scale": 0,
    "attention.temperature_scale": 0,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "residual_scale": 1,
    "embedding_scale": 1,
}


def check_metadata(file: GgufFile, architecture: str) -> None:
    """Nothing in it asks for what the engine does not do. Raises ModelError."""
    if (n_parts := file.integer("split.count", 1)) > 1:
        raise file.error(f"one of {n_parts} parts of a model; join them (llama-gguf-split --merge)")
    for suffix, neutral in _REFUSED.items():
        key = f"{architecture}.{suffix}"
        if key in file.metadata and (found := file.number(key)) != neutral:
            raise file.error(f"{key} is {found:g}; only {neutral} is supported")
    if not file.flag(f"{architecture}.attention.causal", default=True):
        raise file.error(f"{architecture}.attention.causal is false: not a text generator")
    # A window that no position ever reaches beyond is full attention.
    key = f"{architecture}.attention.sliding_window"
    context_tokens = file.integer(f"{architecture}.context_length")
    if 0 != (window := file.integer(key, 0)) < context_tokens:
        whole = f"the whole context of {context_tokens}"
        raise file.error(f"{key} is {window}; only 0 or {whole} is supported")
