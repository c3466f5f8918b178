"""Writes a GGUF of a model's true shape with seeded random weights, for benchmarks.

Speed does not depend on the values as long as they are ordinary ones; the text that such a model
makes is noise. Blocks are random codes with small scales, made matrix by matrix, so that a 7B file
needs little memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
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


def _halves(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> Bytes:
    values = (rng.random(shape, dtype=np.float32) + np.float32(0.5)) * np.float32(size)
    return values.astype("<f2")[..., np.newaxis].view(np.uint8)


def _blocks(
    rng: np.random.Generator, rows: int, cols: int, codes: int, scales: list[float]
) -> Bytes:
    """[rows, blocks * bytes]: f16 scales, then `codes` random bytes, a block of 32."""
    n = cols // 32
    parts = [_halves(rng, (rows, n), size) for size in scales]
    parts.append(rng.integers(0, 256, (rows, n, codes), dtype=np.uint8))
    return np.concatenate(parts, axis=2).reshape(rows, -1)


def _q6_k(rng: np.random.Generator, rows: int, cols: int) -> Bytes:
    n = cols // 256
    codes = rng.integers(0, 256, (rows, n, 192), dtype=np.uint8)
    scales = rng.integers(1, 64, (rows, n, 16), dtype=np.uint8)
    return np.concatenate([codes, scales, _halves(rng, (rows, n), 2e-5)], axis=2).reshape(rows, -1)


Maker = Callable[[np.random.Generator, int, int], Bytes]
TYPES: dict[str, tuple[gguf.GGMLQuantizationType, Maker]] = {
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, lambda g, r, c: _blocks(g, r, c, 16, [0.003])),
    "q4_1": (gguf.GGMLQuantizationType.Q4_1, lambda g, r, c: _blocks(g, r, c, 16, [0.003, -0.02])),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, lambda g, r, c: _blocks(g, r, c, 32, [0.0002])),
    "q6_k": (gguf.GGMLQuantizationType.Q6_K, _q6_k),
}


def matrices(shape: Shape) -> list[tuple[str, int, int]]:
    """(GGUF name, rows, cols) of all matrices, but for embedding and head."""
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
    return [
        (f"blk.{i}.{name}.weight", rows, cols)
        for i in range(shape.n_layers)
        for name, rows, cols in one
    ]


def write(out: Path, shape: Shape, type_name: str, seed: int) -> None:
    """Writes the file, with a vocabulary of byte tokens and numbered words."""
    writer = gguf.GGUFWriter(str(out), "llama", use_temp_file=False)
    writer.add_name(out.stem)
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
    rng = np.random.default_rng(seed)
    kind, make = TYPES[type_name]
    head_kind, make_head = TYPES["q6_k"] if shape.dim % 256 == 0 else TYPES["q8_0"]
    plan = [
        ("token_embd.weight", shape.vocab, shape.dim, kind, make),
        *((name, rows, cols, kind, make) for name, rows, cols in matrices(shape)),
        ("output.weight", shape.vocab, shape.dim, head_kind, make_head),
    ]
    norms = [f"blk.{i}.{n}_norm.weight" for i in range(shape.n_layers) for n in ("attn", "ffn")]
    norms.append("output_norm.weight")
    for name in norms:
        writer.add_tensor_info(name, (shape.dim,), np.dtype(np.float32), shape.dim * 4)
    for name, rows, cols, quantization, _ in plan:
        block, size = gguf.GGML_QUANT_SIZES[quantization]
        bytes_a_row = cols // block * size
        writer.add_tensor_info(
            name, (rows, bytes_a_row), np.dtype(np.uint8), rows * bytes_a_row, quantization
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _ in norms:
        writer.write_tensor_data(np.ones(shape.dim, dtype=np.float32))
    for number, (_, rows, cols, _, make_one) in enumerate(plan, 1):
        writer.write_tensor_data(make_one(rng, rows, cols))
        print(f"\r{number}/{len(plan)} matrices", end="", file=sys.stderr)
    print(file=sys.stderr)
    writer.close()


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
    parser.add_argument("--type", choices=TYPES, default="q4_0")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    shape: Shape = SHAPES[args.shape]
    if args.layers:
        shape = Shape(
            shape.dim, args.layers, shape.n_heads, shape.n_kv_heads, shape.ffn_dim, shape.vocab
        )
    write(args.out, shape, args.type, args.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
