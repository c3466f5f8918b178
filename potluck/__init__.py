"""potluck: run a language model that none of your machines can hold, on all of them together.

People import this package only: `Client` talks to a coordinator. It is loaded on first use, so that
`import potluck` stays light and decision modules never load grpc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potluck.client import Client

__version__ = "0.1.0"
__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from potluck.client import Client

        return Client
    raise AttributeError(f"module 'potluck' has no attribute {name!r}")
