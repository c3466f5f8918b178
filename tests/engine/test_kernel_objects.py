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


# A register of at least 16 bytes and the stack pointer in one instruction; or the frame's, where a
# function sets it: gcc does when it aligns the stack. Otherwise that register is like any other.
STACK_MOVE = re.compile(r"[yz]mm.*\(%rsp|\(%rsp.*[yz]mm|\t\w+\s+\{?[qv]\d+.*\[sp")
FRAME_MOVE = re.compile(r"[yz]mm.*\(%rbp|\(%rbp.*[yz]mm|\t\w+\s+\{?[qv]\d+.*\[x29")
SETS_FRAME = re.compile(r"\tmov\s+%rsp,%rbp|\t(?:mov|add)\s+x29, sp")


def built(name: str) -> Path | None:
    """A kernel file's object, optimized, without sanitizers: the module's or scripts/test's."""
    folder = "aarch64" if name.startswith(("neon", "dotprod", "i8mm")) else "cp3*"
    pattern = f"build/{folder}/CMakeFiles/potluck_core.dir/engine/kernels/{name}.cpp.o"
    found = sorted(ROOT.glob(pattern), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


# Products of bytes on ARM, and a branch with its target.
PRODUCT = re.compile(r"\t(?:sdot|smlal2?|smull2?|smmla)\t")
BRANCH = re.compile(r"\t(?:b(?:\.\w+)?|cbn?z|tbn?z)\t(?:.*,\s*)?([0-9a-f]+) <")


def product_loop(lines: list[str]) -> list[str]:
    """The loop of a function of ARM that is the fullest of products; all of it if there is none."""
    places = {int(line.split(":")[0], 16): i for i, line in enumerate(lines) if ":\t" in line}
    loops = []
    for i, line in enumerate(lines):
        branch = BRANCH.search(line)
        first = places.get(int(branch[1], 16), i + 1) if branch else i + 1
        if first <= i:
            loops.append(lines[first : i + 1])
    products = [sum(map(bool, map(PRODUCT.search, loop))) / len(loop) for loop in loops]
    return loops[products.index(max(products))] if any(products) else lines


def stack_moves(listing: str, function: re.Pattern[str]) -> dict[str, int]:
    """Vector moves with the stack in each function whose name matches `function`.

    On ARM in its loop of products: what is done once a record of 256 values may go to the stack.
    """
    functions: dict[str, list[str]] = {}
    inside: list[str] = []
    for line in listing.splitlines():
        if line.endswith(">:"):
            inside = []
            if function.search(line):
                functions[line] = inside
        inside.append(line)
    moves = {}
    for name, lines in functions.items():
        has_frame = any(map(SETS_FRAME.search, lines))
        moves[name] = sum(
            bool(STACK_MOVE.search(line) or (has_frame and FRAME_MOVE.search(line)))
            for line in product_loop(lines)
        )
    return moves


# What holds the product's loops; AVX-512's K types have theirs a record in a function of its own.
TILES = re.compile("AddTile|AddRecords")


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("avx2_matmul_block32_gemm", MOST_STACK_MOVES),
        ("avx2_matmul_k_gemm", MOST_STACK_MOVES),
        ("avxvnni_matmul_block32", MOST_STACK_MOVES),
        ("avxvnni_matmul_k", MOST_STACK_MOVES),
        ("avx512vnni_gemm", MOST_STACK_MOVES),
        # 8 stores of the starts of sums, made before the loop.
        ("avx512vnni_k_gemm", 2 * MOST_STACK_MOVES),
        ("avx512vnni_float", MOST_STACK_MOVES),
        ("neon_matmul_block32", 2 * MOST_STACK_MOVES),  # Q8_0: 8 of 375 instructions
        ("neon_matmul_k", MOST_STACK_MOVES),
        ("dotprod_matmul_block32", MOST_STACK_MOVES),
        ("dotprod_matmul_k", MOST_STACK_MOVES),
        ("i8mm_matmul_block32", MOST_STACK_MOVES),
        ("i8mm_matmul_k", MOST_STACK_MOVES),
    ],
)
def test_the_tiles_of_the_product_of_many_rows_do_not_spill(name: str, most: int) -> None:
    kernel = built(name)
    is_arm = kernel is not None and kernel.parts[-6] == "aarch64"
    objdump = shutil.which("aarch64-linux-gnu-objdump" if is_arm else "objdump")
    if kernel is None or objdump is None:
        pytest.skip("needs a build in build/ (for ARM: by scripts/test --cpp) and its objdump")
    listing = subprocess.run(
        [objdump, "-d", "-C", "--no-show-raw-insn", str(kernel)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    moves = stack_moves(listing, TILES)
    # Two types or more, which the floats' are not, of tiles of 3 and 4 rows.
    assert len(moves) >= (2 if name.endswith("float") else 4)
    assert max(moves.values()) <= most, moves


def test_a_spill_would_be_counted() -> None:
    listing = """0000 <void AddTile<4>(int)>:
  10:\tvmovdqa %ymm6,0x608(%rsp)
  20:\tvpaddw 0x20(%rsp),%ymm1,%ymm2
  30:\tvpaddw (%rdi),%ymm1,%ymm2
0001 <void AddTile<2>(int)>:
  30:\tmov    %rsp,%rbp
  34:\tvmovdqa %zmm6,-0x608(%rbp)
  38:\tvpaddw (%rbp,%rax,1),%ymm1,%ymm2
0001 <void Without<a frame>AddTile<1>(int)>:
  3c:\tvpaddw 0x20(%rbp),%ymm1,%ymm2
  3e:\tvmovdqa %ymm6,0x608(%rsp)
  3f:\tvmovdqa %ymm6,0x628(%rsp)
0001 <void Other(int)>:
  40:\tvmovdqa %ymm6,0x608(%rsp)
0002 <void AddTile<3>(int)>:
  50:\tstr\tq7, [sp, #32]
  54:\tldp\tq1, q2, [sp, #64]
  58:\tld1\t{v0.16b}, [sp]
  5c:\tsdot\tv1.4s, v2.16b, v0.4b[1]
  60:\tldr\tq1, [x2, #64]
  64:\tcbnz\tx3, 54 <void AddTile<3>(int)+0x4>
  68:\tstp\td8, d9, [sp, #16]
  6c:\tstr\tq7, [sp, #32]
"""
    assert list(stack_moves(listing, TILES).values()) == [2, 2, 2, 2]
