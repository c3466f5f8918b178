"""Which type each tensor of a model gets when the model is written as q4_0, q4_k_m, f16 ...

The mixes are those of llama.cpp's quantize tool (facts about which tensor gets which type), so
that sizes and perplexities compare: vectors stay f32, the head gets six bits, and q4_k_m and
q5_k_m give more bits to values and ffn_down of some layers. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from potluck.blocks import BY_NAME
from potluck.errors import UsageError
from potluck.model import EMBEDDING, HEAD, WEIGHT_TYPES

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
# A row that is no multiple of 256 takes the 32-block type of as many bits or the next more.
_FALLBACK = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


@dataclass(frozen=True, slots=True)
class TypeChoice:
    """A mix by its name. `file_type` is general.file_type of GGUF's table."""

    name: str  # "q4_k_m"
    type_name: str  # of most matrices
    file_type: int

    @property
    def is_quantized(self) -> bool:
        """Whether its blocks have scales."""
        return BY_NAME[self.type_name].values > 1


CHOICES: Mapping[str, TypeChoice] = {
    name: TypeChoice(name, type_name, file_type)
    for name, type_name, file_type in (
        ("f32", "f32", 0),
        ("f16", "f16", 1),
        ("bf16", "bf16", 32),
        ("q8_0", "q8_0", 7),
        ("q6_k", "q6_k", 18),
        ("q5_k_m", "q5_k", 17),
        ("q5_k_s", "q5_k", 16),
        ("q5_1", "q5_1", 9),
        ("q5_0", "q5_0", 8),
        ("q4_k_m", "q4_k", 15),
        ("q4_k_s", "q4_k", 14),
        ("q4_1", "q4_1", 3),
        ("q4_0", "q4_0", 2),
    )
}
# Short names mean the usual mix, as with llama.cpp.
ALIASES: Mapping[str, str] = {"q4_k": "q4_k_m", "q5_k": "q5_k_m"}


def choice_of(name: str) -> TypeChoice:
    """The mix `name`, in any case. Raises UsageError: there is none."""
    wanted = name.lower()
    wanted = ALIASES.get(wanted, wanted)
    if wanted not in CHOICES:
        raise UsageError(f"type {name!r} is unknown", remedy=f"types: {', '.join(CHOICES)}")
    return CHOICES[wanted]


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a choice looks at of one tensor."""

    name: str
    shape: tuple[int, ...]
    type_name: str  # that it has now


def types_of(
    choice: TypeChoice, tensors: Iterable[Candidate], *, many_heads_share_values: bool = False
) -> dict[str, str]:
    """The type of each tensor, by name.

    many_heads_share_values: LLaMA-2-70B's small values; they get more bits.
    """
    all_ = list(tensors)
    layers = [int(m[1]) for t in all_ if (m := _LAYER.match(t.name))]
    n_layers = max(layers, default=-1) + 1
    head = HEAD if any(t.name == HEAD for t in all_) else EMBEDDING
    found = {}
    for t in all_:
        if t.type_name not in WEIGHT_TYPES:
            found[t.name] = t.type_name  # whole numbers and the like
        elif len(t.shape) == 1:
            found[t.name] = "f32"
        elif not t.name.endswith(".weight") or t.name.endswith("_norm.weight"):
            found[t.name] = t.type_name
        else:
            wanted = _wanted(choice, t.name, n_layers, head, many_heads_share_values)
            found[t.name] = _fitting(wanted, t.shape[-1])
    return found


def _wanted(choice: TypeChoice, name: str, n_layers: int, head: str, shared: bool) -> str:  # noqa: FBT001  passed through
    """Before it is known whether the rows fit."""
    usual = choice.type_name
    if not choice.is_quantized:
        return usual
    if name == head:
        return "q8_0" if usual == "q8_0" else "q6_k"
    match = _LAYER.match(name)
    if match is None:
        return usual
    layer, part = int(match[1]), match[2]
    if part == "attn_v.weight":
        return _of_values(choice, layer, n_layers, shared)
    if part == "ffn_down.weight":
        return _of_down(choice, layer, n_layers)
    if part == "attn_qkv.weight":
        return {"q4_k_m": "q5_k", "q5_k_m": "q6_k"}.get(choice.name, usual)
    return usual


def _of_values(choice: TypeChoice, layer: int, n_layers: int, shared: bool) -> str:  # noqa: FBT001  passed through
    wanted = choice.type_name
    if choice.name in ("q4_k_m", "q5_k_m") and _has_more_bits(layer, n_layers):
        wanted = "q6_k"
    elif choice.name == "q4_k_s" and layer < 4:
        wanted = "q5_k"
    return "q5_k" if shared and wanted == "q4_k" else wanted


def _of_down(choice: TypeChoice, layer: int, n_layers: int) -> str:
    if choice.name in ("q4_k_m", "q5_k_m") and _has_more_bits(layer, n_layers):
        return "q6_k"
    if choice.name == "q4_k_s" and layer < n_layers // 8:
        return "q5_k"
    return choice.type_name


def _has_more_bits(layer: int, n_layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _fitting(type_name: str, cols: int) -> str:
    if cols % BY_NAME[type_name].values == 0:
        return type_name
    fallback = _FALLBACK.get(type_name, "f16")
    return fallback if cols % BY_NAME[fallback].values == 0 else "f16"
