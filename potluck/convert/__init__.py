"""Models as people have them, as sources of what a GGUF holds."""

from __future__ import annotations

from potluck.convert.opening import open_source

__all__ = ["open_source"]
