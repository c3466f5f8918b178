"""What a plan must know of a model: bytes of its parts, and what a stage needs of memory for them.

Pure. Memory is counted as the worker counts it before it loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from potluck import model
from potluck.errors import PlanError
from potluck.gguf import GgufFile
from potluck.model import KV_PAGE_TOKENS, SCRATCH_BYTES, KvType, ModelConfig
from potluck.plan import WIRE_Q8_BLOCK, Span, WorkerInfo


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a plan must know of a model. Raises PlanError if it has no layers."""

    layer_bytes: tuple[int, ...]  # weights of each layer
    embedding_bytes: int  # on the first stage; one row of it is read a token
    head_bytes: int  # on the last stage, read whole for each token; norm included
    kv_layer_bytes: int  # of one position in one layer
    scratch_bytes: int  # buffers of a step
    row_bytes: int = 0  # values of one row of an activation on a link
    kv_q8_layer_bytes: int = 0  # what kv_layer_bytes is with --kv-type q8; 0: unknown
    q4_0_layer_bytes: int = 0  # what the largest layer would be in q4_0; 0: unknown

    def __post_init__(self) -> None:
        if not self.layer_bytes:
            raise PlanError("the model has no layers")

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return len(self.layer_bytes)

    @property
    def mean_layer_bytes(self) -> float:
        """Weights of a layer, in the mean: layers differ in mixed types only, and little."""
        return sum(self.layer_bytes) / len(self.layer_bytes)

    @property
    def weight_bytes(self) -> int:
        """All weights, each counted where it lies: tied embeddings lie at both ends."""
        return sum(self.layer_bytes) + self.embedding_bytes + self.head_bytes


def sizes_of(
    file: GgufFile,
    config: ModelConfig,
    step_tokens: int,
    kv_type: KvType = KvType.F16,
    wire: str = "f32",
) -> ModelSizes:
    """Sizes of a model in its file's types; `step_tokens` is the most rows of one step."""
    return ModelSizes(
        layer_bytes=tuple(model.layer_bytes(file, config, i) for i in range(config.n_layers)),
        embedding_bytes=model.embedding_bytes(file, config),
        head_bytes=model.head_bytes(file, config),
        kv_layer_bytes=model.kv_bytes_per_token(config, Span(0, 1), kv_type),
        scratch_bytes=model.scratch_bytes(config, step_tokens),
        row_bytes=_row_bytes(config.dim, wire),
        kv_q8_layer_bytes=model.kv_bytes_per_token(config, Span(0, 1), KvType.Q8),
        q4_0_layer_bytes=max(_q4_0_bytes(file, config, i) for i in range(config.n_layers)),
    )


def end_bytes(sizes: ModelSizes, *, embeds: bool, has_head: bool) -> int:
    """What a stage needs besides layers and their KV: buffers, and what its ends hold."""
    embedding = sizes.embedding_bytes if embeds else 0
    return sizes.scratch_bytes + embedding + (sizes.head_bytes if has_head else 0)


def most_layers(
    sizes: ModelSizes, worker: WorkerInfo, n_positions: int, *, embeds: bool, has_head: bool
) -> int:
    """Layers that a worker has memory for with the KV of so many positions; may be below 0.

    Layers count as the largest of them, so that any span of so many fits.
    """
    kv = n_positions * sizes.kv_layer_bytes
    left = worker.memory_free_bytes - end_bytes(sizes, embeds=embeds, has_head=has_head)
    room = left // (max(sizes.layer_bytes) + kv)
    if worker.room_bytes is not None:  # its weights may be on disk, KV is not
        beside = worker.room_bytes - _unmapped_bytes(sizes, has_head=has_head)
        room = min(room, beside // kv if kv else room if beside >= 0 else 0)
    return room


def whole_pages(n_tokens: int) -> int:
    """Positions of the pages that so many tokens take."""
    return -(-n_tokens // KV_PAGE_TOKENS) * KV_PAGE_TOKENS


def size_text(n_bytes: float) -> str:
    """For people: 18.2 GiB, 37.0 MiB."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def largest_unit(sizes: ModelSizes, *, has_head: bool) -> int:
    """Bytes of the largest thing that passes through memory when weights are mapped."""
    units: Sequence[int] = (*sizes.layer_bytes, sizes.head_bytes) if has_head else sizes.layer_bytes
    return max(units)


def _unmapped_bytes(sizes: ModelSizes, *, has_head: bool) -> int:
    """What a stage of mapped weights needs of memory besides KV; its worker asks for no more."""
    return max(sizes.scratch_bytes, SCRATCH_BYTES) + 2 * largest_unit(sizes, has_head=has_head)


def _q4_0_bytes(file: GgufFile, config: ModelConfig, layer: int) -> int:
    """Of a layer whose matrices are 32 weights in 18 bytes."""
    span = Span(layer, layer + 1)
    tensors = model.span_tensors(file, config, span, embeds=False, has_head=False)
    return sum(
        prod(tensor.shape) * 18 // 32 if len(tensor.shape) > 1 else tensor.size_bytes
        for tensor in tensors
    )


def _row_bytes(dim: int, wire: str) -> int:
    """Of one row as potluck/wire.py writes it: f32, f16, or codes with a scale a block."""
    if wire == "q8":
        return dim + 2 * -(-dim // WIRE_Q8_BLOCK)
    return dim * (2 if wire == "f16" else 4)
