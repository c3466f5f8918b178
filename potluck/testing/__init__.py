"""For tests, ours and other people's: tiny models, broken model files, an oracle to compare with.

Nothing of the library or the programs imports this.
"""

from __future__ import annotations

from potluck.testing.dequantize import dequantize, tensor_values
from potluck.testing.oracle import OracleKv, oracle_head, oracle_hidden, oracle_logits
from potluck.testing.quantize import quantize
from potluck.testing.tiny import TinyShape, tiny_metadata, tiny_tensors, write_tiny
from potluck.testing.writer import Tensor, Typed, gguf_fields, overwritten, write_gguf

__all__ = [
    "OracleKv",
    "Tensor",
    "TinyShape",
    "Typed",
    "dequantize",
    "gguf_fields",
    "oracle_head",
    "oracle_hidden",
    "oracle_logits",
    "overwritten",
    "quantize",
    "tensor_values",
    "tiny_metadata",
    "tiny_tensors",
    "write_gguf",
    "write_tiny",
]
