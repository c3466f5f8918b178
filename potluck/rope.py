"""How a model's rotary embedding is stretched beyond its first context, as GGUF's metadata says it.

The keys mean what llama.cpp means by them; cpp/engine/rope.h has the arithmetic. For these
architectures llama.cpp (0.3.36 of its Python package) takes some of YaRN's numbers from the command
line only, where a file gives them by yarn_* keys: here the file is believed. Pure, given a
GgufFile, but for `rope_freqs.weight`, whose few values it reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from potluck import gguf
from potluck.cursor import shown
from potluck.errors import ModelError
from potluck.gguf import GgufFile

SCALINGS = ("none", "linear", "yarn")
# What each frequency is divided by: how converters write the scaling of Llama 3.1 and later.
DIVISORS = "rope_freqs.weight"

_LARGEST_FACTOR = 2**20
# A little less than 1 may come from rounding; much less would turn faster than any model does.
_LEAST_DIVISOR = 0.5


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """What it starts with changes nothing. Refuses to be wrong: raises ModelError.

    Frequency i of the rope_dim / 2 is divided by divisors[i], if there are any, and by `factor`;
    with YaRN (extrapolation > 0) the fast ones are kept from that. Pairs that turn beta_fast times
    or more within original_tokens are fast, those that turn beta_slow times or less are slow.
    Cosine and sine are multiplied by `magnitude`, with YaRN also by 1 + 0.1 ln(factor).
    """

    factor: float = 1.0
    extrapolation: float = 0.0
    original_tokens: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float = 1.0
    divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        checks: list[tuple[str, float, float, float]] = [
            ("factor", self.factor, 1, _LARGEST_FACTOR),
            ("yarn_ext_factor", self.extrapolation, 0, 1),
            ("attn_factor", self.magnitude, 2**-10, 2**10),
        ]
        if self.is_yarn:
            checks += [
                ("original_context_length", self.original_tokens, 1, 2**24),
                ("yarn_beta_fast", self.beta_fast, 2**-10, 2**20),
                ("yarn_beta_slow", self.beta_slow, 2**-10, 2**20),
            ]
        for key, found, least, most in checks:
            if not least <= found <= most:
                expected = f"expected {least:g} to {most:,}"
                raise ModelError(f"rope.scaling.{key} is {found:g}, {expected}")
        for i, divisor in enumerate(self.divisors):
            if not _LEAST_DIVISOR <= divisor <= _LARGEST_FACTOR:
                expected = f"expected {_LEAST_DIVISOR} to {_LARGEST_FACTOR:,}"
                raise ModelError(f"{DIVISORS}: value {i} is {divisor:g}, {expected}")

    @property
    def is_yarn(self) -> bool:
        """Whether some frequencies are kept from the factor."""
        return self.extrapolation > 0


UNSCALED = RopeScaling()


def scaling_of(
    file: GgufFile, architecture: str, *, rope_dim: int, context_tokens: int
) -> RopeScaling:
    """What `file` says; `rope_dim` values of a head are rotated. Raises ModelError.

    `context_tokens`, which the model is made for now, stand in for the first ones if only they are
    known.
    """
    at = f"{architecture}.rope.scaling"
    kind = file.text(f"{at}.type", "linear")
    if kind not in SCALINGS:
        raise file.error(f"rope scaling {shown(kind)} is not supported ({', '.join(SCALINGS)})")
    divisors = _divisors(file, rope_dim) if architecture == "llama" else ()
    magnitude = file.number(f"{at}.attn_factor", 1.0) * file.number(f"{at}.yarn_attn_factor", 1.0)
    old_factor = file.number(f"{architecture}.rope.scale_linear", 1.0)
    factor = 1.0 if kind == "none" else file.number(f"{at}.factor", old_factor)
    extrapolation = file.number(f"{at}.yarn_ext_factor", -1.0)
    if kind != "yarn" and extrapolation > 0:
        raise file.error(f"{at}.yarn_ext_factor is {extrapolation:g}, but {at}.type {kind}")
    if extrapolation < 0:  # not set
        extrapolation = 1.0 if kind == "yarn" else 0.0
    original_tokens = file.integer(f"{at}.original_context_length", context_tokens)
    beta_fast = file.number(f"{at}.yarn_beta_fast", 32.0)
    beta_slow = file.number(f"{at}.yarn_beta_slow", 1.0)
    try:
        if not extrapolation:
            return RopeScaling(factor=factor, magnitude=magnitude, divisors=divisors)
        return RopeScaling(
            factor=factor,
            extrapolation=extrapolation,
            original_tokens=original_tokens,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
            magnitude=magnitude,
            divisors=divisors,
        )
    except ModelError as e:
        raise file.error(e.message) from e


def _divisors(file: GgufFile, rope_dim: int) -> tuple[float, ...]:
    if DIVISORS not in file.tensors:
        return ()
    tensor = file.tensors[DIVISORS]
    if tensor.shape != (rope_dim // 2,) or tensor.type_name != "f32":
        found = f"{tensor.type_name} {list(tensor.shape)}"
        raise file.error(f"{DIVISORS}: {found}, expected f32 [{rope_dim // 2}]")
    return gguf.read_floats(file, tensor)
