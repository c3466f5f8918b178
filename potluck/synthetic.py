"""Models of true shapes and random weights that need no file: `synthetic:65b-q4_0`.

Decides which there are and what their file would be, had somebody written it: metadata, vocabulary,
tensors, types, sizes. The weights are the engine's, from a seed, the same on every machine
(cpp/engine/synthetic.h), so each worker makes its own and nothing is sent. People find out with
them how fast their machines would be; what such a model says means nothing. Pure.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from potluck.errors import UnknownModel
from potluck.gguf import GgufFile, Synthetic, Value
from potluck.gguf_header import VERSION as GGUF_VERSION
from potluck.gguf_header import TensorHeading, laid_out
from potluck.invented_words import vocabulary
from potluck.tensor_source import Metadata
from potluck.type_mix import ALIASES, CHOICES, Candidate, TypeChoice, choice_of, types_of

PREFIX = "synthetic:"
EXAMPLE = "synthetic:65b-q4_0"
SEED = 1
GENERATOR_VERSION = 1  # the engine's SYNTHETIC_VERSION


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths and counts of a model of the llama architecture; heads take all of `dim`."""

    about: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab: int = 32_000
    context_tokens: int = 2048
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0


# Sources: LLaMA (arXiv:2302.13971, table 2) and LLaMA 2's params.json; the model cards of
# Meta-Llama-3-8B and TinyLlama-1.1B.
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "tiny": Shape("for tests", 256, 4, 4, 2, 512, vocab=1000, norm_eps=1e-5),
        "1b": Shape("TinyLlama 1.1B", 2048, 22, 32, 4, 5632, norm_eps=1e-5),
        "7b": Shape("LLaMA 7B", 4096, 32, 32, 32, 11008),
        "8b": Shape(
            *("LLaMA 3 8B", 4096, 32, 32, 8, 14336, 128_256),
            context_tokens=8192,
            norm_eps=1e-5,
            rope_theta=500_000.0,
        ),
        "13b": Shape("LLaMA 13B", 5120, 40, 40, 40, 13824),
        "30b": Shape("LLaMA 30B", 6656, 60, 52, 52, 17920),
        "65b": Shape("LLaMA 65B", 8192, 80, 64, 64, 22016),
        "70b": Shape("LLaMA 2 70B", 8192, 80, 64, 8, 28672, context_tokens=4096, norm_eps=1e-5),
    }
)


def is_synthetic(model: str) -> bool:
    """Whether a MODEL asks for random weights, though perhaps by a name that is none."""
    return model.startswith(PREFIX)


def names() -> list[str]:
    """All of them, by size, then by type."""
    return [f"{PREFIX}{shape}-{kind}" for shape in SHAPES for kind in (*CHOICES, *ALIASES)]


def open_synthetic(model: str) -> GgufFile:
    """What the file of `synthetic:SHAPE-TYPE` would be. Raises UnknownModel with a near name."""
    shape_name, _, kind = model.removeprefix(PREFIX).lower().partition("-")
    if shape_name not in SHAPES or kind not in (*CHOICES, *ALIASES):
        raise _unknown(model)
    return _opened(shape_name, choice_of(kind).name, f"{PREFIX}{shape_name}-{kind}")


def _unknown(model: str) -> UnknownModel:
    shape, _, kind = model.removeprefix(PREFIX).lower().partition("-")
    near = f"{PREFIX}{shape}-{kind or 'q4_0'}"
    hint = difflib.get_close_matches(near, names(), n=1)
    there_are = f"{PREFIX}SHAPE-TYPE of {', '.join(SHAPES)} and {', '.join((*CHOICES, *ALIASES))}"
    shown = repr(model if len(model) <= 60 else model[:60] + "…")
    return UnknownModel(
        f"no synthetic model is called {shown}",
        remedy=f"did you mean {hint[0]}? There are {there_are}" if hint else there_are,
    )


@functools.lru_cache(maxsize=4)  # LLaMA 3's vocabulary takes 0.1 s
def _opened(shape_name: str, choice_name: str, name: str) -> GgufFile:
    shape, choice = SHAPES[shape_name], CHOICES[choice_name]
    pairs = _metadata(shape, choice, name)
    layout = laid_out(pairs, _tensors(shape, choice))
    made = f"synthetic weights {GENERATOR_VERSION}, seed {SEED}, {shape.n_layers} layers"
    return GgufFile(
        path=Path(name),
        version=GGUF_VERSION,
        size_bytes=layout.size_bytes,
        metadata=MappingProxyType({key: _as_read(value) for key, value in pairs}),
        kinds=MappingProxyType({key: _kind(value) for key, value in pairs}),
        tensors=MappingProxyType({t.name: t for t in layout.tensors}),
        data_offset_bytes=len(layout.header),
        # Not the header's alone: a file with this very header may hold any weights.
        header_sha256=hashlib.sha256(layout.header + made.encode()).hexdigest(),
        synthetic=Synthetic(SEED, shape.n_layers),
    )


def _metadata(shape: Shape, choice: TypeChoice, name: str) -> list[tuple[str, Metadata]]:
    """In the order of converters."""
    return [
        ("general.architecture", "llama"),
        ("general.name", name),
        ("general.description", f"The shape of {shape.about} with random weights"),
        ("general.file_type", choice.file_type),
        ("general.quantization_version", 2),
        ("llama.context_length", shape.context_tokens),
        ("llama.embedding_length", shape.dim),
        ("llama.block_count", shape.n_layers),
        ("llama.feed_forward_length", shape.ffn_dim),
        ("llama.attention.head_count", shape.n_heads),
        ("llama.attention.head_count_kv", shape.n_kv_heads),
        ("llama.attention.layer_norm_rms_epsilon", shape.norm_eps),
        ("llama.rope.dimension_count", shape.dim // shape.n_heads),
        ("llama.rope.freq_base", shape.rope_theta),
        ("llama.vocab_size", shape.vocab),
        *vocabulary(shape.vocab),
    ]


def _tensors(shape: Shape, choice: TypeChoice) -> list[TensorHeading]:
    """With the types that `potluck quantize` would give them."""
    shapes = dict(_shapes(shape))
    # LLaMA 2 70B is the one whose small values get more bits.
    shares = shape.n_heads == 8 * shape.n_kv_heads and shape.n_layers == 80
    types = types_of(
        choice,
        [Candidate(name, shape_, "f32") for name, shape_ in shapes.items()],
        many_heads_share_values=shares,
    )
    return [TensorHeading(name, types[name], shape_) for name, shape_ in shapes.items()]


def _shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    dim, ffn_dim = shape.dim, shape.ffn_dim
    kv_dim = dim // shape.n_heads * shape.n_kv_heads
    yield "token_embd.weight", (shape.vocab, dim)
    for layer in range(shape.n_layers):
        at = f"blk.{layer}"
        yield f"{at}.attn_norm.weight", (dim,)
        yield f"{at}.attn_q.weight", (dim, dim)
        yield f"{at}.attn_k.weight", (kv_dim, dim)
        yield f"{at}.attn_v.weight", (kv_dim, dim)
        yield f"{at}.attn_output.weight", (dim, dim)
        yield f"{at}.ffn_norm.weight", (dim,)
        yield f"{at}.ffn_gate.weight", (ffn_dim, dim)
        yield f"{at}.ffn_up.weight", (ffn_dim, dim)
        yield f"{at}.ffn_down.weight", (dim, ffn_dim)
    yield "output_norm.weight", (dim,)
    yield "output.weight", (shape.vocab, dim)


def _kind(value: Metadata) -> str:
    """The type in the file: laid_out's for values that have none of their own."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float | str):
        return {int: "u32", float: "f32", str: "str"}[type(value)]
    assert isinstance(value, Sequence), "no pair of ours has a type of its own"
    return {int: "i32", float: "f32", str: "str"}[type(value[0])]


def _as_read(value: Metadata) -> Value:
    """As potluck/gguf.py gives what laid_out writes: floats of 32 bits, arrays as views."""
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
        return rounded
    assert isinstance(value, Sequence), "no pair of ours has a type of its own"
    if isinstance(value[0], str):
        return tuple(str(element) for element in value)
    if isinstance(value[0], float):
        return memoryview(struct.pack(f"<{len(value)}f", *value)).cast("f")
    return memoryview(struct.pack(f"<{len(value)}i", *value)).cast("i")
