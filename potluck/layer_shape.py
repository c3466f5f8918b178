"""The layer that machines are asked to time: a model's heaviest, by shape and types.

Pure. A coordinator takes it from its model; a worker gets it in a message, so nothing in it is
trusted: a shape that is none, or whose tensors the engine does not know, is a ModelError before
anything is computed from it or allocated for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from potluck.blocks import BY_NAME
from potluck.cursor import shown
from potluck.errors import ModelError
from potluck.gguf import GgufFile
from potluck.model import (
    EMBEDDING,
    HEAD,
    HEAD_NORM,
    WEIGHT_TYPES,
    ModelConfig,
    layer_bytes,
    layer_shapes,
)

# Positions that a timed step may reach: more than its rows.
CONTEXT_TOKENS = 128

NamedType = tuple[str, str]  # name after "blk.N.", type
Tensor = tuple[str, str, int, int]  # GGUF name, type, rows, cols; a vector has one row


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer and the head of a model. Raises ModelError for what the engine can't compute."""

    dim: int
    n_layers: int  # of the whole model
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab: int
    types: tuple[NamedType, ...]  # every tensor of the layer, in the order of use
    head_type: str  # of the matrix [vocab, dim]

    def __post_init__(self) -> None:
        expected = layer_shapes(self.config)  # refuses widths and counts that make no model
        names = [name for name, _ in self.types]
        unknown = [name for name in names if name not in expected]
        if unknown:
            raise ModelError(f"a layer with {shown(unknown[0])}, which this engine does not know")
        if len(names) != len(expected) or len(set(names)) != len(names):
            raise ModelError(f"a layer of {len(names)} tensors, expected {len(expected)}")
        for name, type_name in self.types:
            _check_type(name, type_name, expected[name])
        _check_type(HEAD, self.head_type, (self.vocab, self.dim))

    @property
    def config(self) -> ModelConfig:
        """A model of such layers. What costs no time (rope, epsilon) is as in LLaMA."""
        names = {name for name, _ in self.types}
        return ModelConfig(
            name="timed",
            architecture="llama",
            dim=self.dim,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            ffn_dim=self.ffn_dim,
            vocab=self.vocab,
            context_tokens=CONTEXT_TOKENS,
            norm_eps=1e-5,
            rope_theta=10_000.0,
            rope_dim=self.head_dim,
            rope_interleaved=True,
            tied_embeddings=False,
            qkv_bias="attn_q.bias" in names,
            output_bias="attn_output.bias" in names,
            qk_norm="attn_q_norm.weight" in names,
        )

    @property
    def layer_bytes(self) -> int:
        """Weights of the layer as they lie in a file."""
        return sum(bytes_of(tensor) for tensor in self.layer(0))

    @property
    def head_bytes(self) -> int:
        """Norm and head."""
        return sum(bytes_of(tensor) for tensor in self.head())

    def layer(self, number: int) -> Iterator[Tensor]:
        """The tensors of layer `number`."""
        shapes = layer_shapes(self.config)
        for name, type_name in self.types:
            yield (f"blk.{number}.{name}", type_name, *_rows_and_cols(shapes[name]))

    def head(self) -> Iterator[Tensor]:
        """The tensors of the head."""
        yield (HEAD_NORM, "f32", 1, self.dim)
        yield (HEAD, self.head_type, self.vocab, self.dim)


def shape_of(file: GgufFile, config: ModelConfig) -> LayerShape:
    """The layer of `file` that has the most bytes (the first of them), and its head."""
    sizes = [layer_bytes(file, config, i) for i in range(config.n_layers)]
    heaviest = sizes.index(max(sizes))
    head = EMBEDDING if config.tied_embeddings else HEAD
    return LayerShape(
        dim=config.dim,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        ffn_dim=config.ffn_dim,
        vocab=config.vocab,
        types=tuple(
            (name, file.tensors[f"blk.{heaviest}.{name}"].type_name)
            for name in layer_shapes(config)
        ),
        head_type=file.tensors[head].type_name,
    )


def bytes_of(tensor: Tensor) -> int:
    """As it lies in a file."""
    _, type_name, rows, cols = tensor
    block = BY_NAME[type_name]
    return rows * (cols // block.values) * block.size_bytes


def _check_type(name: str, type_name: str, shape: tuple[int, ...]) -> None:
    types = WEIGHT_TYPES if len(shape) > 1 else ("f32",)
    if type_name not in types:
        raise ModelError(f"{name}: type {shown(type_name)}, expected {', '.join(types)}")
    values = BY_NAME[type_name].values
    if shape[-1] % values:
        raise ModelError(f"{name}: {shape[-1]} columns of {type_name}, whose blocks have {values}")


def _rows_and_cols(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) > 1 else (1, shape[0])
