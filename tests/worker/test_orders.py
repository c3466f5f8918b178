"""What a LoadRequest may say."""

from __future__ import annotations

import pytest

from potluck.errors import UsageError
from potluck.plan import Span
from potluck.rpc.hello import hello
from potluck.rpc.v1 import types_pb2, worker_pb2
from worker.orders import order_of

SHA = "0123456789abcdef" * 4


def request_of(header_sha256: str, weights_address: str) -> worker_pb2.LoadRequest:
    return worker_pb2.LoadRequest(
        hello=hello(),
        epoch=1,
        model=types_pb2.ModelReference(name="m", header_sha256=header_sha256),
        span=types_pb2.Span(start=0, stop=2),
        kv_type=worker_pb2.KV_TYPE_F16,
        wire=types_pb2.ACTIVATION_TYPE_F32,
        next=worker_pb2.NextStage(address="127.0.0.1:1"),
        weights_address=weights_address,
    )


def test_an_order_is_made_of_a_request() -> None:
    order = order_of(request_of(SHA, "127.0.0.1:2"))
    assert (order.span, order.header_sha256) == (Span(0, 2), SHA)


@pytest.mark.parametrize("sha", ["", "00", "../../x", SHA.upper(), SHA[:-1] + "\n", SHA + "00"])
def test_weights_are_fetched_for_a_whole_sha256_only(sha: str) -> None:
    with pytest.raises(UsageError, match=r"model\.header_sha256: 64 hexadecimal digits"):
        order_of(request_of(sha, "127.0.0.1:2"))
