"""A model with a LoRA adapter merged into it, row by row as the rows are read.

Works on tensors under GGUF's names, whoever made them: the rows of B are taken in the order of the
model's, and adding commutes with any order of rows. Sums are f32 in one fixed order, so a
merged model has the same bytes however it is cut into slabs and whichever CPU merges it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from potluck.convert.hugging_face_names import EMBEDDING, HEAD, has_rotary_rows
from potluck.convert.hugging_face_weights import FLOAT_TYPES
from potluck.convert.lora_adapter import Adapter, LowRank, open_adapter
from potluck.convert.tensor_views import F32, Interleaved, Renamed, View, f32_rows
from potluck.cursor import shown
from potluck.tensor_source import ModelSource, TensorSource, Typed

# Values of the sum that are worked on at once, so that they stay in the second-level cache.
_TILE_VALUES = 2**16

# What an adapter may bring with another number of rows: tokens that its training added.
_MAY_GROW = (EMBEDDING, HEAD)


@dataclass(frozen=True, slots=True)
class Merged(View):
    """`source` [rows, cols] + scale * up @ down, as f32."""

    up: TensorSource  # [rows, rank], rows in the order of the source
    down: TensorSource  # [rank, cols]
    scale: float

    @property
    def type_name(self) -> str:
        """The sum is not rounded to the source's type."""
        return "f32"

    def read(self, first_row: int, n_rows: int) -> memoryview:
        """Holds these rows twice, their rows of `up`, and `down`."""
        values = f32_rows(self.source, first_row, n_rows)
        down = f32_rows(self.down, 0, self.down.shape[0])
        up = f32_rows(self.up, first_row, n_rows)
        add_low_rank(values, up, down, np.float32(self.scale))
        return values.data.cast("B")


def with_lora(source: ModelSource, lora: Path) -> ModelSource:
    """A model under GGUF's names, as of Meta's files or of a GGUF, with an adapter merged into it.

    Raises ModelError: it does not fit, the model is quantized, or the adapter brings rows of the
    embedding for tokens of its own, whose texts the model does not know.
    """
    adapter = open_adapter(lora)
    shapes = {t.name: t.shape for t in source.tensors}
    if HEAD not in shapes and EMBEDDING in adapter.tensor_names:
        raise adapter.weights.error("changes the embedding, which in this model is the head, too")
    tensors = merged(source.tensors, adapter, interleaved_head_dim=_head_dim(source, adapter))
    for tensor in tensors:
        if tensor.shape != shapes[tensor.name]:
            found = f"{tensor.shape[0]:,} rows of {tensor.name}, the model has"
            raise adapter.weights.error(
                f"{found} {shapes[tensor.name][0]:,}",
                remedy="convert the Hugging Face folder of the same model",
            )
    return replace(
        source,
        tensors=tensors,
        identity=f"{source.identity}\n{adapter.weights.identity}",
        paths=(*source.paths, *map(str, adapter.weights.inputs())),
    )


def _head_dim(source: ModelSource, adapter: Adapter) -> int:
    """Of a model whose rotary pairs lie side by side; 0 of one that keeps Hugging Face's order."""
    pairs = {k: v.value if isinstance(v, Typed) else v for k, v in source.metadata}
    architecture = pairs.get("general.architecture")
    if architecture in ("qwen2", "qwen3"):
        return 0
    n_heads = pairs.get("llama.attention.head_count")
    if architecture != "llama" or not isinstance(n_heads, int) or n_heads < 1:
        raise adapter.weights.error("can't be merged: the model's heads are not known")
    rows = next((t.shape[0] for t in source.tensors if t.name == "blk.0.attn_q.weight"), 0)
    if rows % (2 * n_heads):
        raise adapter.weights.error(f"can't be merged: {n_heads} heads of {rows} rows")
    return rows // n_heads


def merged(
    tensors: Sequence[TensorSource], adapter: Adapter, *, interleaved_head_dim: int
) -> list[TensorSource]:
    """`tensors` with the adapter's changes. Raises ModelError: it does not fit them.

    `interleaved_head_dim`: of a model whose q and k have rotary pairs side by side, else 0.
    """
    if unknown := adapter.tensor_names - {t.name for t in tensors}:
        raise adapter.weights.error(
            f"changes {shown(min(unknown))}, which the model does not have",
            remedy="is it an adapter for another model?",
        )

    def ordered(name: str, stored: TensorSource) -> TensorSource:
        is_turned = interleaved_head_dim and has_rotary_rows(name)
        return Interleaved(stored, interleaved_head_dim) if is_turned else stored

    found: list[TensorSource] = []
    for tensor in tensors:
        if change := adapter.changes.get(tensor.name):
            _check_change(tensor, change, adapter)
            up = ordered(tensor.name, change.up)
            found.append(Merged(tensor, up, change.down, change.scale))
        elif new := adapter.replacements.get(tensor.name):
            _check_replacement(tensor, new, adapter)
            found.append(Renamed(tensor.name, ordered(tensor.name, new)))
        else:
            found.append(tensor)
    return found


def add_low_rank(values: F32, up: F32, down: F32, scale: np.float32) -> None:
    """values [n, cols] += scale * (up [n, rank] @ down [rank, cols]), in place.

    Each value: products in rising order of rank, summed in f32 from 0, times scale, added; every
    step is rounded. Not BLAS: its order depends on the CPU and the number of rows. 7e9 products and
    sums a second on one core (BLAS: 19e9), so 15 s for 7B with all its matrices and rank 16.
    """
    n, cols = values.shape
    tile_rows = max(1, _TILE_VALUES // cols)
    total = np.empty((tile_rows, cols), np.float32)
    product = np.empty_like(total)
    for start in range(0, n, tile_rows):
        rows = slice(start, min(n, start + tile_rows))
        sums, products = total[: rows.stop - start], product[: rows.stop - start]
        sums[:] = 0
        for k in range(len(down)):
            np.multiply(up[rows, k : k + 1], down[k], out=products)
            sums += products
        sums *= scale
        values[rows] += sums


def _check_change(tensor: TensorSource, change: LowRank, adapter: Adapter) -> None:
    if tensor.type_name not in FLOAT_TYPES:
        raise adapter.weights.error(
            f"{tensor.name} is {tensor.type_name}: nothing can be added to blocks"
        )
    found = (change.up.shape[0], change.down.shape[1])
    if found != tensor.shape:
        shapes = f"a change of shape {list(found)}, the model's is {list(tensor.shape)}"
        raise adapter.weights.error(
            f"{tensor.name}: {shapes}", remedy="is it an adapter for another model?"
        )


def _check_replacement(tensor: TensorSource, new: TensorSource, adapter: Adapter) -> None:
    may_grow = tensor.name in _MAY_GROW and len(new.shape) == 2
    expected = (new.shape[0], *tensor.shape[1:]) if may_grow else tensor.shape
    if new.shape != expected:
        shapes = f"shape {list(new.shape)}, the model's is {list(tensor.shape)}"
        raise adapter.weights.error(
            f"{shown(new.name)}: {shapes}", remedy="is it an adapter for another model?"
        )
