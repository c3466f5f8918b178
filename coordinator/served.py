"""The model that is served: its file, shape, sizes and vocabulary.

`open_model` reads files and computes for a second: call it in a thread, once, at the start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from coordinator.config import DEFAULT_CONTEXT_TOKENS, ROWS_LIMIT
from coordinator.planner import ModelSizes, sizes_of
from coordinator.scheduler import rows_that_fit
from potluck import catalogue, layer_shape, tokenizer
from potluck.errors import UsageError
from potluck.gguf import GgufFile
from potluck.layer_shape import LayerShape
from potluck.manifest import Manifest
from potluck.model import KvType, ModelConfig, config_of
from potluck.plan import WorkerId, WorkerInfo
from potluck.rpc import options
from potluck.rpc.v1 import types_pb2
from potluck.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelShape:
    """What a plan must know, and whoever makes one: no vocabulary, nothing of a service."""

    name: str
    file: GgufFile
    config: ModelConfig
    sizes: ModelSizes
    context_tokens: int  # of a session
    step_tokens: int  # most rows of a step: the limit, and what a message holds


@dataclass(frozen=True)
class ServedModel:
    """Everything that does not change while the coordinator runs."""

    name: str
    reference: types_pb2.ModelReference
    config: ModelConfig
    sizes: ModelSizes
    tokenizer: Tokenizer
    context_tokens: int  # of this service
    step_tokens: int  # most rows of a step: the limit, and what a message holds
    layer_shape: LayerShape  # that workers are to time
    file: GgufFile = field(repr=False)
    manifest: Manifest | None = None  # of its file; None: a synthetic model has none


def shape_of(
    model: str, context_tokens: int, kv_type: KvType = KvType.F16, wire: str = "f32"
) -> ModelShape:
    """The shape of a MODEL; `context_tokens` 0: the default, or the model's if shorter.

    Raises UnknownModel, ModelError, UsageError (a context longer than the model's).
    """
    file = catalogue.open_model(model)
    config = config_of(file)
    if context_tokens > config.context_tokens:
        raise UsageError(
            f"--context {context_tokens}: {config.name} was trained for {config.context_tokens}",
            remedy=f"use --context {config.context_tokens} or less",
        )
    fit = rows_that_fit(config.dim, options.MESSAGE_BYTES - options.ENVELOPE_BYTES)
    step_tokens = min(ROWS_LIMIT, fit)
    is_path = file.synthetic is None and (model == str(file.path) or model.endswith(".gguf"))
    return ModelShape(
        name=file.path.stem if is_path else model,
        file=file,
        config=config,
        sizes=sizes_of(file, config, step_tokens, kv_type, wire),
        context_tokens=context_tokens or min(DEFAULT_CONTEXT_TOKENS, config.context_tokens),
        step_tokens=step_tokens,
    )


def open_model(
    model: str, context_tokens: int, kv_type: KvType = KvType.F16, wire: str = "f32"
) -> ServedModel:
    """Opens a MODEL to be served. Raises as `shape_of` does."""
    shape = shape_of(model, context_tokens, kv_type, wire)
    file, path, manifest = shape.file, model, None
    if file.synthetic is None:
        manifest = Manifest(file, catalogue.manifests_folder())
        path = str(file.path.resolve())
    return ServedModel(
        name=shape.name,
        reference=types_pb2.ModelReference(
            name=shape.name,
            path=path,
            size_bytes=file.size_bytes,
            header_sha256=file.header_sha256,
            modified_ns=manifest.modified_ns if manifest else 0,
        ),
        config=shape.config,
        sizes=shape.sizes,
        tokenizer=tokenizer.load(file),
        context_tokens=shape.context_tokens,
        step_tokens=shape.step_tokens,
        layer_shape=layer_shape.shape_of(file, shape.config),
        file=file,
        manifest=manifest,
    )


def stored_layers(
    file: GgufFile, config: ModelConfig, workers: Iterable[WorkerInfo]
) -> dict[WorkerId, frozenset[int]]:
    """Layers that need not be sent: all of a synthetic model, which each worker makes itself."""
    if file.synthetic is None:
        return {}
    return {worker.id: frozenset(range(config.n_layers)) for worker in workers}
