"""How a Hugging Face model stretches its rotary embedding, as GGUF says it.

Pure: a config.json's object in, metadata pairs and frequency factors out. What the engine could not
follow is refused by name. Written as llama.cpp's converter writes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potluck.convert.json_file import JsonObject
from potluck.cursor import shown
from potluck.tensor_source import Metadata

F32 = NDArray[np.float32]

_TOKENS_LIMIT = 2**24
_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """`pairs`: keys after the architecture. `factors`: what each frequency is divided by, or ()."""

    theta: float
    pairs: tuple[tuple[str, Metadata], ...] = ()
    factors: tuple[float, ...] = ()


def rope_scaling(config: JsonObject, head_dim: int, context_tokens: int) -> RopeScaling:
    """Of a model, from `rope_theta` and `rope_scaling` or from the newer `rope_parameters`.

    Raises ModelError: a kind that is not known, a value out of range.
    """
    parameters = config.inner("rope_parameters")
    scaling = parameters or config.inner("rope_scaling") or JsonObject(config.file, {})
    if parameters is not None and parameters.values.get("rope_theta") is not None:
        theta = parameters.number("rope_theta", 1, 1e12)
    else:
        theta = config.number("rope_theta", 1, 1e12, None if parameters else 10_000.0)
    for place in (config, scaling):
        if (part := place.number("partial_rotary_factor", 0, 1, 1.0)) != 1:
            raise place.error(f"partial_rotary_factor {part:g} is not supported (1)")
    kind = scaling.text("rope_type") or scaling.text("type")
    if kind is None and scaling.values.get("factor") is not None:
        raise scaling.error(f"{scaling.place}factor without a type")
    kind = kind or "default"
    if kind not in _KINDS:
        raise scaling.error(f"rope scaling {shown(kind)} is not supported ({', '.join(_KINDS)})")
    if kind == "linear":
        return RopeScaling(theta, _pairs("linear", _factor(scaling)))
    if kind == "yarn":
        return RopeScaling(theta, _yarn(scaling, context_tokens))
    if kind == "llama3":
        return RopeScaling(theta, factors=_llama3(scaling, theta, head_dim))
    return RopeScaling(theta)


def _factor(scaling: JsonObject) -> float:
    return scaling.number("factor", 1, 2**16)


def _pairs(kind: str, factor: float) -> tuple[tuple[str, Metadata], ...]:
    return (("rope.scaling.type", kind), ("rope.scaling.factor", factor))


def _yarn(scaling: JsonObject, context_tokens: int) -> tuple[tuple[str, Metadata], ...]:
    factor = _factor(scaling)
    # GGUF multiplies the usual factor of attention by its own, Hugging Face replaces it.
    usual = 0.1 * math.log(factor) + 1
    attention = scaling.number("attention_factor", 0, 1e3, usual)
    if not math.isclose(attention, usual, rel_tol=1e-3):
        raise scaling.error(f"attention_factor {attention:g} is not supported ({usual:g})")
    for key in ("mscale", "mscale_all_dim"):
        if scaling.values.get(key) is not None:
            raise scaling.error(f"{key} is not supported")
    if scaling.flag("truncate") is False:
        raise scaling.error("truncate false is not supported")
    original = scaling.whole("original_max_position_embeddings", 1, _TOKENS_LIMIT, context_tokens)
    found = [*_pairs("yarn", factor), ("rope.scaling.original_context_length", original)]
    for key in ("beta_fast", "beta_slow"):
        if scaling.values.get(key) is not None:
            found.append((f"rope.scaling.yarn_{key}", scaling.number(key, 1e-3, 1e4)))
    return tuple(found)


def _llama3(scaling: JsonObject, theta: float, head_dim: int) -> tuple[float, ...]:
    """What LLaMA 3.1 divides the frequency of each pair by; [head_dim / 2].

    Waves shorter than original / high stay, longer than original / low are stretched by factor,
    between them frequencies are mixed. theta 500,000, factor 8, pair 63 of 64: 8.
    """
    factor = _factor(scaling)
    low = scaling.number("low_freq_factor", 1e-3, 1e4, 1.0)
    high = scaling.number("high_freq_factor", 1e-3, 1e4, 4.0)
    if not low < high:
        raise scaling.error(f"low_freq_factor {low:g} is not below high_freq_factor {high:g}")
    original = scaling.whole("original_max_position_embeddings", 1, _TOKENS_LIMIT, 8192)
    factors = []
    for i in range(head_dim // 2):
        wave_tokens = 2 * math.pi * theta ** (2 * i / head_dim)
        kept = (original / wave_tokens - low) / (high - low)  # of the frequency, 0 to 1
        kept = min(max(kept, 0.0), 1.0)
        factors.append(1 / ((1 - kept) / factor + kept))
    return tuple(factors)
