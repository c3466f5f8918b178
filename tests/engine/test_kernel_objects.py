"""What the compiler made of the kernels: the loops that all prefill time goes to."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Vector moves to and from the stack in one tile of the product. Each costs what a useful one does:
# before the sums were pinned to registers gcc 12 made dozens (23 MAC/cycle instead of 36).
MOST_STACK_MOVES = 4


def built(name: str) -> Path | None:
    """The object of a kernel file in the module's own build: optimized, without sanitizers."""
    pattern = f"build/cp3*/CMakeFiles/potluck_core.dir/engine/kernels/{name}.cpp.o"
    found = sorted(ROOT.glob(pattern), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def stack_moves(listing: str, function: str) -> dict[str, int]:
    """Vector moves with the stack pointer in each function whose name holds `function`."""
    moves: dict[str, int] = {}
    inside = ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            inside = line if function in line else ""
            if inside:
                moves[inside] = 0
        elif inside and re.search(r"[yz]mm.*\(%rsp|\(%rsp.*[yz]mm", line):
            moves[inside] += 1
    return moves


@pytest.mark.parametrize("name", ["avx2_matmul_q4", "avx512vnni_gemm"])
def test_the_tiles_of_the_product_of_many_rows_do_not_spill(name: str) -> None:
    kernel = built(name)
    objdump = shutil.which("objdump")
    if kernel is None or objdump is None:
        pytest.skip("needs a build for x86-64 in build/ and objdump")
    listing = subprocess.run(
        [objdump, "-d", "-C", "--no-show-raw-insn", str(kernel)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    moves = stack_moves(listing, "AddTile")
    assert len(moves) >= 4  # both types or more, tiles of 3 and 4 rows
    assert max(moves.values()) <= MOST_STACK_MOVES, moves


def test_a_spill_would_be_counted() -> None:
    listing = """0000 <void AddTile<4>(int)>:
  10:\tvmovdqa %ymm6,0x608(%rsp)
  20:\tvpaddw 0x20(%rsp),%ymm1,%ymm2
  30:\tvpaddw (%rdi),%ymm1,%ymm2
0001 <void Other(int)>:
  40:\tvmovdqa %ymm6,0x608(%rsp)
"""
    assert list(stack_moves(listing, "AddTile").values()) == [2]
