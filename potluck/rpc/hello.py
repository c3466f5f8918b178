"""What each side says of its version, and whether two of them work together."""

from __future__ import annotations

from potluck import __version__
from potluck.errors import UsageError
from potluck.rpc import PROTOCOL
from potluck.rpc.v1 import types_pb2


def hello() -> types_pb2.Hello:
    """This side's version."""
    return types_pb2.Hello(protocol=PROTOCOL, potluck_version=__version__)


def check_hello(message: types_pb2.Hello, who: str, here: str) -> None:
    """Raises UsageError unless the protocol of `who` works with that of `here` ("worker")."""
    if message.protocol == 0 or abs(message.protocol - PROTOCOL) > 1:
        raise UsageError(
            f"{who} speaks protocol {message.protocol}"
            f" (potluck {message.potluck_version or '?'}), this {here} {PROTOCOL}"
            f" (potluck {__version__})",
            remedy="install the same version of potluck on all machines",
        )
