"""The name (tokenizer.ggml.pre) of the way a tokenizer.json cuts text before merging.

A GGUF has a name where tokenizer.json spells the steps out, so the steps are compared with those
of the models that the names come from. What is not exactly one of them is refused with what was
found: a vocabulary under a wrong name gives wrong tokens without a word. Pure.
"""

from __future__ import annotations

import json

from potluck.byte_level import LLAMA_3, QWEN_2
from potluck.convert.json_file import JsonObject
from potluck.cursor import shown

# Steps as `_step` writes them -> name. Sources: tokenizer.json of GPT-2, SmolLM2, Llama 3, Qwen2.
_BY_STEPS = {
    ("ByteLevel use_regex",): "gpt-2",
    ("Digits individual", "ByteLevel use_regex"): "smollm",
    (f"Split {LLAMA_3}", "ByteLevel"): "llama-bpe",
    (f"Split {QWEN_2}", "ByteLevel"): "qwen2",
}
_NORMALIZED = {"qwen2"}  # composes letters (NFC); a GGUF can't say so: see potluck/byte_level.py


def pre_tokenizer_name(json_file: JsonObject) -> str:
    """The name for the steps of `json_file`, a tokenizer.json with a byte-level vocabulary.

    Raises ModelError with the steps if none has them.
    """
    steps = tuple(_step(json_file, step) for step in flat_steps(json_file, "pre_tokenizer"))
    name = _BY_STEPS.get(steps)
    if name is None:
        found = shown(", ".join(steps)) if steps else "nothing"
        known = ", ".join(_BY_STEPS.values())
        raise json_file.error(
            f"a pre_tokenizer that does {found} is not one that has a name here ({known})"
        )
    kinds = [step.text("type") or "" for step in flat_steps(json_file, "normalizer")]
    if kinds and not (kinds == ["NFC"] and name in _NORMALIZED):
        raise json_file.error(f"the normalizer {shown(', '.join(kinds))} is not supported")
    return name


def flat_steps(json_file: JsonObject, key: str) -> list[JsonObject]:
    """The steps under `key`, "normalizer" or "pre_tokenizer": none, one, or those of a Sequence."""
    only = json_file.inner(key)
    if only is None:
        return []
    if only.text("type") == "Sequence":
        return only.objects("pretokenizers" if key == "pre_tokenizer" else "normalizers")
    return [only]


def _step(json_file: JsonObject, step: JsonObject) -> str:
    """A step as one line that tells everything which changes what it does."""
    kind = step.text("type")
    if kind == "ByteLevel":
        if step.flag("add_prefix_space"):
            raise json_file.error("a pre_tokenizer with add_prefix_space is not supported")
        return "ByteLevel use_regex" if step.flag("use_regex") is not False else "ByteLevel"
    if kind == "Digits":
        return "Digits individual" if step.flag("individual_digits") else "Digits"
    if kind == "Split":
        pattern = step.inner("pattern")
        regex = pattern.text("Regex") if pattern is not None else None
        is_plain = step.text("behavior") == "Isolated" and not step.flag("invert")
        if regex is not None and is_plain:
            return f"Split {regex}"
    return as_it_is(step.values)


def as_it_is(values: object) -> str:
    """A step that nobody knows here, as its file has it."""
    return json.dumps(values, ensure_ascii=False, sort_keys=True)
