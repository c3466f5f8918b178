"""The compiled engine, by its Python names. The only importer of potluck._engine.

Calls that compute, wait or read files give the GIL away, so they belong in a thread and never on
an event loop. Importing this raises EngineError if the compiled module is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from potluck.errors import EngineError
from potluck.gguf import GgufFile, TensorInfo
from potluck.model import ModelConfig
from potluck.verified import verified

try:
    from potluck import _engine
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
        TensorFiles,
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
    "TensorFiles",
    "TensorTuple",
    "available_isas",
    "benchmark_matmul",
    "block_layout",
    "build",
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


def build() -> str:
    """Tells this compiled engine from others, for what is measured with it: file, size, time."""
    path = Path(_engine.__file__ or "")
    try:
        found = path.stat()
    except OSError:  # replaced while we run
        return path.name
    return f"{path.name} {found.st_size} {found.st_mtime_ns}"


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


def origin_of(
    file: GgufFile, tensors: Iterable[TensorInfo] | None = None
) -> str | Synthetic | TensorFiles:
    """Where the engine gets weights of `file` from: `tensors`, or (None) all that are here.

    A pack is made again when its origin changed: of a delivered model give the pack's own tensors.
    Raises DamagedTensor: one was not delivered.
    """
    if file.synthetic is not None:
        return Synthetic(seed=file.synthetic.seed, n_layers=file.synthetic.n_layers)
    if file.stored is None:
        return str(file.path)
    names = file.stored if tensors is None else [tensor.name for tensor in tensors]
    paths = {name: file.stored_path(name) for name in names}
    contents = "".join(f"{name} {path.name}\n" for name, path in sorted(paths.items()))
    return TensorFiles(
        paths={name: str(path) for name, path in paths.items()},
        identity=hashlib.sha256(contents.encode()).digest()[:16],
    )


def load(
    shard: Shard,
    file: GgufFile,
    tensors: Iterable[TensorInfo],
    on_progress: Callable[[int], None],
) -> None:
    """Read (or make) `tensors` of `file` into `shard` and seal it.

    on_progress gets the bytes read so far, after each tensor, on the calling thread; what it raises
    ends the loading. Of a delivered model, tensors are hashed while those before them are packed;
    `tensors` is then gone through by another thread, some hundred MB ahead. Raises ModelError: a
    tensor is missing, not of the span, cut short or damaged; DamagedTensor: not the delivered one.
    """
    done_bytes = 0
    with verified(file, tensors) as right:
        for tensor in right:
            shard.put_file(
                tensor.name,
                tensor.type_name,
                tensor.rows,
                tensor.cols,
                origin_of(file, [tensor]),
                tensor.offset_bytes,
            )
            done_bytes += tensor.size_bytes
            on_progress(done_bytes)
    shard.seal()
