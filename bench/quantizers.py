"""Our quantizer beside llama.cpp's: the distance of what they write from the F16 model.

One model is one throw of the dice, and SmolLM2's F16 is its published Q4_1, whose grid a search
finds again. So the same is measured on copies with seeded noise: each value of an F16 matrix moves
by a uniform share of the step that 4 bits and an offset have in its 32 values, at most half of it.
Copy 0 is the model itself. Files are read by potluck in either case.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from potluck import gguf
from potluck.errors import PotluckError

HERE = Path(__file__).resolve().parent
TYPES = ["q4_0", "q4_1", "q4_k_m"]
OURS, THEIRS = "potluck", "llama.cpp"
POTLUCK = [sys.executable, "-c", "import sys, potluck.cli; sys.exit(potluck.cli.main())"]
_BLOCK = 32  # values that share a step in Q4_1
_STEPS = 15  # from a block's lowest value to its highest


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the results; bench/README.md describes the columns."""

    model: str
    copy: int
    type: str
    quantizer: str
    sha256: str
    text_sha256: str
    context: int
    n_tokens: int
    base_perplexity: float
    perplexity: float
    ratio: float
    divergence: float
    divergence_standard_error: float
    commit: str
    llama_cpp_python: str


class Failed(Exception):
    """A program that we need did not do its work; it has said why."""


def moved(values: npt.NDArray[np.float16], random: np.random.Generator) -> npt.NDArray[np.float16]:
    """`values`, [n * 32], each moved by at most half a step of its block."""
    blocks = values.astype(np.float32).reshape(-1, _BLOCK)
    step = (blocks.max(axis=1, keepdims=True) - blocks.min(axis=1, keepdims=True)) / _STEPS
    noise = random.uniform(-0.5, 0.5, blocks.shape).astype(np.float32)
    result: npt.NDArray[np.float16] = (blocks + noise * step).astype(np.float16)
    return result.reshape(-1)


def noisy_copy(source: Path, out: Path, seed: int) -> None:
    """Writes `source` to `out` with all its F16 matrices moved."""
    data = np.fromfile(source, np.uint8)
    random = np.random.default_rng(seed)
    for tensor in gguf.read(source).tensors.values():
        if tensor.type_name == "f16":
            part = data[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
            part[:] = moved(part.view("<f2"), random).view(np.uint8)
    data.tofile(out)


def digest(path: Path) -> str:
    """The first 12 digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def commit() -> str:
    """Of potluck's sources; with a + if something is changed."""
    command = ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def answer_of(command: Sequence[str]) -> dict[str, Any]:
    """The JSON that a program prints; its notes go to our stderr. Raises Failed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command[-4:])}: exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class Comparing:
    """One text and one place for files."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._name = args.model.name.partition(".")[0]
        self._base = args.folder / "quantizers.logits"

    def rows(self, copy: int) -> Iterator[Row]:
        """All types and both quantizers on one copy; the files go. Raises Failed, PotluckError."""
        model = self._args.model
        if copy:
            model = self._args.folder / f"{self._name}-noisy-{copy}.f16.gguf"
            noisy_copy(self._args.model, model, copy)
        text = ["--file", str(self._args.file), "--chunks", str(self._args.chunks)]
        base = self._scored(model, *text, "--save-base", str(self._base))
        for type_name in self._args.types:
            for quantizer in (OURS, THEIRS) if self._args.llama_python else (OURS,):
                yield self._row(copy, model, type_name, quantizer, base["perplexity"])
        if copy:
            model.unlink()

    def _row(self, copy: int, model: Path, type_name: str, quantizer: str, base: float) -> Row:
        out = self._args.folder / f"{self._name}-quantized.gguf"
        out.unlink(missing_ok=True)
        version = self._quantize(model, out, type_name, quantizer)
        found = self._scored(out, "--kl-base", str(self._base))
        row = Row(
            model=self._name,
            copy=copy,
            type=type_name,
            quantizer=quantizer,
            sha256=digest(out),
            text_sha256=digest(self._args.file),
            context=found["context"],
            n_tokens=found["n_tokens"],
            base_perplexity=round(base, 5),
            perplexity=round(found["perplexity"], 5),
            ratio=round(found["kl"]["ratio"], 6),
            divergence=round(found["kl"]["divergence"], 6),
            divergence_standard_error=round(found["kl"]["divergence_standard_error"], 6),
            commit=commit(),
            llama_cpp_python=version,
        )
        out.unlink()
        return row

    def _quantize(self, model: Path, out: Path, type_name: str, quantizer: str) -> str:
        if quantizer == THEIRS:
            side = [self._args.llama_python, str(HERE / "llama_quantize.py")]
            version: str = answer_of([*side, str(model), str(out), "--type", type_name])["version"]
            return version
        command = [*POTLUCK, "quantize", str(model), str(out), "--type", type_name]
        if subprocess.run(command, check=False).returncode:
            raise Failed(f"{type_name} was not written")
        return ""

    def _scored(self, model: Path, *options: str) -> dict[str, Any]:
        threads = ["--threads", str(self._args.threads)]
        return answer_of([*POTLUCK, "perplexity", str(model), *options, *threads, "--json"])


def means(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each type and quantizer: KL of all copies together, and of each."""
    for key in dict.fromkeys((row.type, row.quantizer) for row in rows):
        found = [row.divergence for row in rows if (row.type, row.quantizer) == key]
        each = " ".join(f"{value:.4f}" for value in found)
        yield f"{key[0]:8} {key[1]:10} mean KL {np.mean(found):.4f} ({each})"


def append(file: Path, row: Row) -> None:
    """Adds a line to the results."""
    is_new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [f.name for f in fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="F16", type=Path, help="a GGUF file with F16 matrices")
    parser.add_argument("--folder", type=Path, required=True, help="for files that come and go")
    parser.add_argument("--file", type=Path, required=True, help="the text")
    parser.add_argument("--copies", type=int, default=3, help="with noise (3)")
    parser.add_argument("--types", nargs="+", default=TYPES, help=f"default: {' '.join(TYPES)}")
    parser.add_argument("--chunks", type=int, default=12, help="windows of 512 tokens (12)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-python", help="of an environment with llama-cpp-python")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    try:
        for copy in range(args.copies + 1):
            for row in Comparing(args).rows(copy):
                print(row, flush=True)
                rows.append(row)
                if args.csv:
                    append(args.csv, row)
    except (PotluckError, Failed, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(means(rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
