"""The tensor types of GGUF and the size of their blocks: a table, and nothing else.

The reader knows all of them, so that `potluck show` can name what it finds; which of them the
engine computes with is said in potluck/model.py. A test compares this with the `gguf` package's.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockType:
    """One tensor type. A row of values is stored as whole blocks, one after the other."""

    name: str  # "q4_0"
    number: int  # in the file
    values: int  # of one block
    size_bytes: int  # of one block


_TABLE = """
0 f32 1 4        1 f16 1 2        30 bf16 1 2      28 f64 1 8
24 i8 1 1        25 i16 1 2       26 i32 1 4       27 i64 1 8
2 q4_0 32 18     3 q4_1 32 20     6 q5_0 32 22     7 q5_1 32 24     8 q8_0 32 34    9 q8_1 32 40
10 q2_k 256 84   11 q3_k 256 110  12 q4_k 256 144  13 q5_k 256 176  14 q6_k 256 210 15 q8_k 256 292
16 iq2_xxs 256 66  17 iq2_xs 256 74  18 iq3_xxs 256 98  19 iq1_s 256 50  20 iq4_nl 32 18
21 iq3_s 256 110   22 iq2_s 256 82   23 iq4_xs 256 136  29 iq1_m 256 56
34 tq1_0 256 54    35 tq2_0 256 66   39 mxfp4 32 17     40 nvfp4 64 36   41 q1_0 128 18
"""


def _parsed(table: str) -> tuple[BlockType, ...]:
    words = table.split()
    rows = (words[i : i + 4] for i in range(0, len(words), 4))
    return tuple(BlockType(name, int(n), int(v), int(b)) for n, name, v, b in rows)


BY_NUMBER = {t.number: t for t in _parsed(_TABLE)}
BY_NAME = {t.name: t for t in BY_NUMBER.values()}
