"""Bytes of a file as the messages of a Fetch: one at a time, read in threads.

gRPC takes the next message when the one before is on its way, so a stream holds a few of them
and no more, however slowly it is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from potluck.errors import PastEnd
from potluck.rpc import options
from potluck.rpc.v1 import weights_pb2


async def parts(
    read: Callable[[int, int], bytes], size_bytes: int, offset_bytes: int
) -> AsyncGenerator[weights_pb2.FetchPart, None]:
    """[offset_bytes, size_bytes) by `read(offset, size)`, which blocks and may raise PotluckError.

    Raises PastEnd for an offset beyond the end.
    """
    if offset_bytes > size_bytes:
        raise PastEnd(f"offset {offset_bytes}: there are {size_bytes} bytes")
    at = offset_bytes
    while at < size_bytes:
        size = min(options.PART_BYTES, size_bytes - at)
        yield weights_pb2.FetchPart(data=await asyncio.to_thread(read, at, size))
        at += size
