"""The compiled engine, by its Python names. The only importer of potluck._engine.

Calls that compute, wait or read files give the GIL away, so they belong in a thread and never on
an event loop. Importing this raises EngineError if the compiled module is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from potluck.errors import EngineError
from potluck.gguf import GgufFile, TensorInfo
from potluck.model import ModelConfig

try:
    from potluck._engine import (
        ISAS,
        PACK_LAYOUT,
        SYNTHETIC_VERSION,
        Config,
        Engine,
        RopeScaling,
        RowSpan,
        Shard,
        Synthetic,
        available_isas,
        benchmark_matmul,
        block_layout,
        convert,
        crc32c,
        exp,
        log_sum_exp,
        matmul,
    )
except ImportError as missing:
    raise EngineError(
        f"the compiled engine can't be loaded: {missing}",
        remedy="build it with `pip install .` in the folder of potluck's sources",
    ) from missing

__all__ = [
    "ISAS",
    "PACK_LAYOUT",
    "SYNTHETIC_VERSION",
    "Config",
    "Engine",
    "RopeScaling",
    "RowSpan",
    "Shard",
    "Synthetic",
    "TensorTuple",
    "available_isas",
    "benchmark_matmul",
    "block_layout",
    "config_for",
    "convert",
    "crc32c",
    "exp",
    "load",
    "log_sum_exp",
    "matmul",
    "origin_of",
]

TensorTuple = tuple[str, str, int, int, int]  # name, type, rows, cols, offset in the file


def config_for(model: ModelConfig) -> Config:
    """What the engine must know of `model`. Raises ModelError beyond the engine's limits."""
    scaling = model.rope_scaling
    return Config(
        dim=model.dim,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        head_dim=model.head_dim,
        ffn_dim=model.ffn_dim,
        vocab=model.vocab,
        context_tokens=model.context_tokens,
        norm_eps=model.norm_eps,
        rope_theta=model.rope_theta,
        rope_dim=model.rope_dim,
        rope_interleaved=model.rope_interleaved,
        rope_scaling=RopeScaling(
            factor=scaling.factor,
            extrapolation=scaling.extrapolation,
            original_tokens=scaling.original_tokens,
            beta_fast=scaling.beta_fast,
            beta_slow=scaling.beta_slow,
            magnitude=scaling.magnitude,
            divisors=scaling.divisors,
        ),
        qkv_bias=model.qkv_bias,
        output_bias=model.output_bias,
        qk_norm=model.qk_norm,
    )


def origin_of(file: GgufFile) -> str | Synthetic:
    """Where the engine gets the weights of `file` from."""
    if file.synthetic is None:
        return str(file.path)
    return Synthetic(seed=file.synthetic.seed, n_layers=file.synthetic.n_layers)


def load(
    shard: Shard,
    file: GgufFile,
    tensors: Iterable[TensorInfo],
    on_progress: Callable[[int], None],
) -> None:
    """Read (or make) `tensors` of `file` into `shard` and seal it.

    on_progress gets the bytes read so far, after each tensor, on the calling thread; what it raises
    ends the loading. Raises ModelError: a tensor is missing, not of the span, cut short or damaged.
    """
    done_bytes, origin = 0, origin_of(file)
    for tensor in tensors:
        shard.put_file(
            tensor.name,
            tensor.type_name,
            tensor.rows,
            tensor.cols,
            origin,
            tensor.offset_bytes,
        )
        done_bytes += tensor.size_bytes
        on_progress(done_bytes)
    shard.seal()
