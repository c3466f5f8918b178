"""For tests, ours and other people's: tiny models, broken model files, an oracle to compare with.

Nothing of the library or the programs imports this.
"""

from __future__ import annotations

from potluck.testing.checkpoints import write_hugging_face, write_meta
from potluck.testing.dequantize import dequantize, tensor_values
from potluck.testing.oracle import Oracle, OracleKv
from potluck.testing.quantize import quantize
from potluck.testing.tiny import TinyShape, tiny_metadata, tiny_tensors, tiny_values, write_tiny
from potluck.testing.writer import Tensor, Typed, gguf_fields, overwritten, write_gguf

__all__ = [
    "Oracle",
    "OracleKv",
    "Tensor",
    "TinyShape",
    "Typed",
    "dequantize",
    "gguf_fields",
    "overwritten",
    "quantize",
    "tensor_values",
    "tiny_metadata",
    "tiny_tensors",
    "tiny_values",
    "write_gguf",
    "write_hugging_face",
    "write_meta",
    "write_tiny",
]
