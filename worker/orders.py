"""What a LoadRequest asks for, as an Order. Pure; worker/shard.py checks it against the model."""

from __future__ import annotations

import re

from potluck import wire
from potluck.errors import UsageError
from potluck.model import KvType
from potluck.plan import Span
from potluck.rpc.hello import check_hello
from potluck.rpc.v1 import worker_pb2
from worker.shard import Order

DEFAULT_SESSIONS = 256
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KV_TYPES: dict[int, KvType] = {
    worker_pb2.KV_TYPE_F16: KvType.F16,
    worker_pb2.KV_TYPE_Q8: KvType.Q8,
}


def order_of(request: worker_pb2.LoadRequest) -> Order:
    """Raises UsageError: a field that no plan has."""
    check_hello(request.hello, "the caller", "worker")
    if request.epoch == 0:
        raise UsageError("epoch: counted from 1")
    if request.span.start >= request.span.stop:
        raise UsageError(f"span [{request.span.start}, {request.span.stop}) holds no layer")
    if request.kv_type not in _KV_TYPES:
        raise UsageError(f"kv_type {request.kv_type}: f16 or q8")
    if request.wire not in wire.TYPE_NAMES:
        raise UsageError(f"wire {request.wire}: f32, f16 or q8")
    if request.weights_address and not _SHA256.fullmatch(request.model.header_sha256):
        raise UsageError("model.header_sha256: 64 hexadecimal digits, by which it is fetched")
    if not request.next.address:
        raise UsageError("next.address: where results go")
    return Order(
        model_name=request.model.name,
        model_path=request.model.path,
        header_sha256=request.model.header_sha256,
        modified_ns=request.model.modified_ns,
        span=Span(request.span.start, request.span.stop),
        embeds=request.embeds,
        has_head=request.has_head,
        context_tokens=request.context_tokens,
        kv_bytes=request.kv_bytes,
        max_sessions=request.max_sessions or DEFAULT_SESSIONS,
        kv_type=_KV_TYPES[request.kv_type],
    )
