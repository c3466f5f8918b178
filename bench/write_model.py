"""Writes a GGUF of a model's true shape with seeded random weights, for benchmarks.

Speed does not depend on the values as long as they are ordinary ones: finite, of mean 0, and of a
size that neither grows nor dies out through the layers. The text that such a model makes is noise.
Blocks hold random codes and scales, made slab by slab, so that a file of any size needs 100 MB of
memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths and counts of a LLaMA model."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab: int = 32000


SHAPES = {
    "135m": Shape(576, 30, 9, 3, 1536, 49152),
    "1b": Shape(2048, 22, 32, 4, 5632),
    "7b": Shape(4096, 32, 32, 32, 11008),
    "13b": Shape(5120, 40, 40, 40, 13824),
    "30b": Shape(6656, 60, 52, 52, 17920),
    "65b": Shape(8192, 80, 64, 64, 22016),
}
Bytes = npt.NDArray[np.uint8]
Kind = gguf.GGMLQuantizationType
SLAB_VALUES = 2**22  # made at once: 16 MiB as floats


class Blocks:
    """Random fields of `n` blocks a row. `std` is what the weights' deviation shall be."""

    def __init__(self, rng: np.random.Generator, rows: int, n: int, std: float) -> None:
        self._rng = rng
        self._shape = (rows, n)
        self._std = std

    def codes(self, n_bytes: int) -> Bytes:
        """Any bytes."""
        return self._rng.integers(0, 256, (*self._shape, n_bytes), dtype=np.uint8)

    def steps(self, low: int, high: int, count: int) -> Bytes:
        """`count` scales of sub-blocks, from `low` to below `high`."""
        return self._rng.integers(low, high, (*self._shape, count), dtype=np.uint8)

    def scale(self, deviation: float, *, signed: bool) -> npt.NDArray[np.float32]:
        """d of each block, such that codes of that deviation make weights of `std`.

        Signed as in real files where codes are not symmetric (-8 to 7): one sign alone would give
        all weights a mean, and layer by layer the activations would drown in it.
        """
        d = self._rng.random(self._shape, dtype=np.float32) + np.float32(0.5)
        d *= np.float32(self._std / deviation)
        if signed:
            d *= np.where(self._rng.random(self._shape, dtype=np.float32) < 0.5, -1, 1)
        return d.astype(np.float32)

    @staticmethod
    def rows(*fields: Bytes | npt.NDArray[np.float32]) -> Bytes:
        """[rows, blocks * bytes], the fields in their order; floats become f16."""
        parts = [
            field
            if field.dtype == np.uint8
            else field.astype("<f2")[..., np.newaxis].view(np.uint8)
            for field in fields
        ]
        blocks: Bytes = np.concatenate(parts, axis=2)
        return blocks.reshape(len(blocks), -1)


# Deviation of all whole numbers of so many bits, each as likely: sqrt((2^(2b) - 1) / 12).
_SPREAD = {bits: ((4**bits - 1) / 12) ** 0.5 for bits in (2, 3, 4, 5, 6, 8)}


def _q4_0(b: Blocks) -> Bytes:
    return b.rows(b.scale(_SPREAD[4], signed=True), b.codes(16))


def _q4_1(b: Blocks) -> Bytes:
    d = b.scale(_SPREAD[4], signed=False)
    return b.rows(d, d * np.float32(-7.5), b.codes(16))


def _q5_0(b: Blocks) -> Bytes:
    return b.rows(b.scale(_SPREAD[5], signed=True), b.codes(4 + 16))


def _q5_1(b: Blocks) -> Bytes:
    d = b.scale(_SPREAD[5], signed=False)
    return b.rows(d, d * np.float32(-15.5), b.codes(4 + 16))


def _q8_0(b: Blocks) -> Bytes:
    return b.rows(b.scale(_SPREAD[8], signed=True), b.codes(32))


def _q2_k(b: Blocks) -> Bytes:
    steps = b.steps(4, 16, 16)  # 9.98 squared is the mean of their squares
    d = b.scale(_SPREAD[2] * 9.98, signed=False)
    return b.rows(steps * np.uint8(17), b.codes(64), d, d * np.float32(1.5))


def _q3_k(b: Blocks) -> Bytes:
    return b.rows(b.codes(32 + 64 + 12), b.scale(_SPREAD[3] * _SPREAD[6], signed=True))


def _packed(steps: Bytes) -> Bytes:
    """[.., 8] of 6 bits as the 12 bytes of Q4_K and Q5_K, each both scale and minimum."""
    low, high = steps[..., :4], steps[..., 4:]
    with_top = low | (high >> 4 << 6)
    return np.concatenate([with_top, with_top, (high & 15) | (high & 15) << 4], axis=-1)


def _q4_k(b: Blocks) -> Bytes:
    d = b.scale(_SPREAD[4] * 41.7, signed=False)  # 41.7: of 16 to 63
    return b.rows(d, d * np.float32(7.5), _packed(b.steps(16, 64, 8)), b.codes(128))


def _q5_k(b: Blocks) -> Bytes:
    d = b.scale(_SPREAD[5] * 41.7, signed=False)
    return b.rows(d, d * np.float32(15.5), _packed(b.steps(16, 64, 8)), b.codes(32 + 128))


def _q6_k(b: Blocks) -> Bytes:
    steps = b.steps(16, 64, 16)
    return b.rows(b.codes(128 + 64), steps, b.scale(_SPREAD[6] * 41.7, signed=True))


BLOCKS: dict[Kind, Callable[[Blocks], Bytes]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q5_0: _q5_0,
    Kind.Q5_1: _q5_1,
    Kind.Q8_0: _q8_0,
    Kind.Q2_K: _q2_k,
    Kind.Q3_K: _q3_k,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
}


def weights(
    rng: np.random.Generator, kind: Kind, rows: int, cols: int, std: float
) -> Iterator[Bytes]:
    """A matrix as slabs [some rows, bytes of a row], of mean 0 and deviation `std` or so."""
    values, _ = gguf.GGML_QUANT_SIZES[kind]
    step = max(1, SLAB_VALUES // cols)
    for first in range(0, rows, step):
        n = min(step, rows - first)
        if kind in BLOCKS:
            yield BLOCKS[kind](Blocks(rng, n, cols // values, std))
        else:
            floats = rng.standard_normal((n, cols), dtype=np.float32) * np.float32(std)
            yield floats.astype("<f2").view(np.uint8)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Types of a file's matrices. `better` takes half of attn_v and ffn_down, as in Q4_K_M."""

    file_type: gguf.LlamaFileType
    layers: Kind
    better: Kind | None = None

    @property
    def head(self) -> Kind:
        """As quantizers choose it: precise, as every token goes through it."""
        return self.layers if self.layers in (Kind.F16, Kind.Q8_0) else Kind.Q6_K

    def of(self, name: str, layer: int, n_layers: int) -> Kind:
        """The type of a layer's matrix."""
        if self.better is None or name not in ("attn_v", "ffn_down"):
            return self.layers
        eighth = n_layers // 8
        is_outer = layer < eighth or layer >= 7 * n_layers // 8
        return self.better if is_outer or (layer - eighth) % 3 == 2 else self.layers


_File = gguf.LlamaFileType
RECIPES = {
    "f16": Recipe(_File.MOSTLY_F16, Kind.F16),
    "q4_0": Recipe(_File.MOSTLY_Q4_0, Kind.Q4_0),
    "q4_1": Recipe(_File.MOSTLY_Q4_1, Kind.Q4_1),
    "q5_0": Recipe(_File.MOSTLY_Q5_0, Kind.Q5_0),
    "q5_1": Recipe(_File.MOSTLY_Q5_1, Kind.Q5_1),
    "q8_0": Recipe(_File.MOSTLY_Q8_0, Kind.Q8_0),
    "q2_k": Recipe(_File.MOSTLY_Q2_K_S, Kind.Q2_K),
    "q3_k": Recipe(_File.MOSTLY_Q3_K_S, Kind.Q3_K),
    "q4_k": Recipe(_File.MOSTLY_Q4_K_S, Kind.Q4_K),
    "q5_k": Recipe(_File.MOSTLY_Q5_K_S, Kind.Q5_K),
    "q6_k": Recipe(_File.MOSTLY_Q6_K, Kind.Q6_K),
    "q4_k_m": Recipe(_File.MOSTLY_Q4_K_M, Kind.Q4_K, Kind.Q6_K),
    "q5_k_m": Recipe(_File.MOSTLY_Q5_K_M, Kind.Q5_K, Kind.Q6_K),
}


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of the file; it must be of whole blocks."""

    name: str
    rows: int
    cols: int
    kind: Kind

    def __post_init__(self) -> None:
        values, _ = gguf.GGML_QUANT_SIZES[self.kind]
        if self.cols % values:
            blocks = f"whole blocks of {self.kind.name} ({values})"
            raise SystemExit(f"{self.name}: rows of {self.cols} values are no {blocks}")

    @property
    def row_bytes(self) -> int:
        """As stored."""
        values, size = gguf.GGML_QUANT_SIZES[self.kind]
        return self.cols // values * size


def matrices(shape: Shape, recipe: Recipe) -> list[Matrix]:
    """All of them, in the order of the file."""
    kv = shape.dim // shape.n_heads * shape.n_kv_heads
    one = [
        ("attn_q", shape.dim, shape.dim),
        ("attn_k", kv, shape.dim),
        ("attn_v", kv, shape.dim),
        ("attn_output", shape.dim, shape.dim),
        ("ffn_gate", shape.ffn_dim, shape.dim),
        ("ffn_up", shape.ffn_dim, shape.dim),
        ("ffn_down", shape.dim, shape.ffn_dim),
    ]
    head = recipe.head if shape.dim % 256 == 0 else Kind.Q8_0
    return [
        Matrix("token_embd.weight", shape.vocab, shape.dim, recipe.layers),
        Matrix("output.weight", shape.vocab, shape.dim, head),
        *(
            Matrix(f"blk.{i}.{name}.weight", rows, cols, recipe.of(name, i, shape.n_layers))
            for i in range(shape.n_layers)
            for name, rows, cols in one
        ),
    ]


def write(out: Path, shape: Shape, recipe: Recipe, seed: int) -> None:
    """Writes the file, with a vocabulary of byte tokens and numbered words."""
    plan = matrices(shape, recipe)
    writer = gguf.GGUFWriter(str(out), "llama", use_temp_file=False)
    _add_metadata(writer, out.stem, shape, recipe)
    norms = [f"blk.{i}.{n}_norm.weight" for i in range(shape.n_layers) for n in ("attn", "ffn")]
    norms.append("output_norm.weight")
    for name in norms:
        writer.add_tensor_info(name, (shape.dim,), np.dtype(np.float32), shape.dim * 4)
    for m in plan:
        shape_bytes = (m.rows, m.row_bytes)
        writer.add_tensor_info(
            m.name, shape_bytes, np.dtype(np.uint8), m.rows * m.row_bytes, m.kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _ in norms:
        writer.write_tensor_data(np.ones(shape.dim, dtype=np.float32))
    assert writer.fout is not None
    file = writer.fout[0]
    for number, m in enumerate(plan):
        # Rows of deviation 1.3 / sqrt(cols) make values of some units of whatever comes normed.
        std = 1.0 if m.name.startswith("token_embd") else 1.3 / m.cols**0.5
        # Seeded one by one: a file of fewer layers has the same layers.
        for slab in weights(np.random.default_rng([seed, number]), m.kind, m.rows, m.cols, std):
            slab.tofile(file)
        writer.write_padding(file, m.rows * m.row_bytes)
        print(f"\r{number + 1}/{len(plan)} matrices", end="", file=sys.stderr)
    print(file=sys.stderr)
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, name: str, shape: Shape, recipe: Recipe) -> None:
    writer.add_name(name)
    writer.add_file_type(recipe.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.ffn_dim)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.dim // shape.n_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape.vocab)
    _add_vocabulary(writer, shape.vocab)


def _add_vocabulary(writer: gguf.GGUFWriter, vocab: int) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [2, 3, 3] + [6] * 256
    words = [f"\u2581w{i}" for i in range(vocab - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + words)
    writer.add_token_scores([0.0] * len(tokens) + [-float(i) for i in range(len(words))])
    writer.add_token_types(kinds + [1] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--type", choices=RECIPES, default="q4_0")
    parser.add_argument("--layers", type=int, help="another number of layers than the shape has")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    shape: Shape = SHAPES[args.shape]
    if args.layers is not None:
        if args.layers < 1:
            parser.error(f"--layers: 1 or more, not {args.layers}")
        shape = replace(shape, n_layers=args.layers)
    write(args.out, shape, RECIPES[args.type], args.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
