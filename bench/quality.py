"""What each weight type and a KV in bytes cost: perplexity and the distance from the F16 model.

Writes the model as F16 and as each type with `potluck quantize`, unless the files are in --folder
already, and lets `potluck perplexity` score a text with each, and llama.cpp, if there is one, with
the same files. Rows go to a results file; `bench/quality_table.py` makes docs/quality.md of it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import pydoc_data.topics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import potluck
from potluck import catalogue, gguf
from potluck.errors import PotluckError
from potluck.logit_base import BaseFile

HERE = Path(__file__).resolve().parent
BASE = "f16"
TYPES = ["q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_1", "q4_0"]
# CPython's own documentation of its language, which every installation brings: English with some
# code. So many letters are 52 windows of SmolLM2.
TEXT_LETTERS = 110_000
POTLUCK = [sys.executable, "-c", "import sys, potluck.cli; sys.exit(potluck.cli.main())"]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the results; bench/README.md describes the columns."""

    model: str
    type: str
    kv_type: str
    sha256: str
    size_bytes: int
    bits_per_weight: float
    text: str
    text_sha256: str
    context: int
    n_tokens: int
    perplexity: float
    standard_error: float
    ratio: float
    ratio_standard_error: float
    divergence: float
    divergence_standard_error: float
    divergence_p99: float
    divergence_max: float
    same_top: float
    change_rms: float
    llama_perplexity: float | None
    llama_standard_error: float | None
    over_llama: float | None
    potluck: str
    commit: str
    llama_cpp_python: str


class Failed(Exception):
    """A program that we need did not do its work; it has said why."""


def text_of(folder: Path) -> tuple[Path, str]:
    """The usual text as a file, and its name for the results."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))[:TEXT_LETTERS]
    path = folder / "topics.txt"
    path.write_text(text, encoding="utf-8", newline="\n")
    version = ".".join(map(str, sys.version_info[:3]))
    return path, f"topics of CPython {version}"


def digest(path: Path) -> str:
    """The first 12 digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def commit() -> str:
    """Of potluck's sources; with a + if something is changed."""
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def answer_of(command: Sequence[str]) -> dict[str, Any]:
    """The JSON that a program prints; its notes go to our stderr. Raises Failed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Failed(f"{command[-1]}: exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def written(source: Path, folder: Path, type_name: str) -> Path:
    """The model as `type_name` in `folder`, made now if it is not there. Raises Failed."""
    name = source.name.removesuffix(".gguf").partition(".")[0]
    path = folder / f"{name}.{type_name}.gguf"
    if not path.exists():
        command = [*POTLUCK, "quantize", str(source), str(path), "--type", type_name]
        if subprocess.run(command, check=False).returncode:
            raise Failed(f"{path.name} was not written")
    return path


def bits_per_weight(path: Path) -> float:
    """Of all tensors together."""
    tensors = gguf.read(path).tensors.values()
    n_weights = sum(tensor.rows * tensor.cols for tensor in tensors)
    return 8 * sum(tensor.size_bytes for tensor in tensors) / n_weights


class Scoring:
    """One text, one base, one way of running both programs."""

    def __init__(self, args: argparse.Namespace, text: Path, text_name: str, base: Path) -> None:
        self._args = args
        self._text = text
        self._text_name = text_name
        self._base = base

    def save_base(self, model: Path) -> None:
        """Writes what the F16 model predicts."""
        self._potluck(model, "--file", str(self._text), "--save-base", str(self._base))

    def row(self, model: Path, type_name: str, kv_type: str) -> Row:
        """What both programs make of one file. Raises Failed."""
        found = self._potluck(model, "--kl-base", str(self._base), "--kv-type", kv_type)
        kl = found["kl"]
        theirs = self._llama(model, kv_type) if self._args.llama_python else {}
        return Row(
            model=model.name.partition(".")[0],
            type=type_name,
            kv_type=kv_type,
            sha256=digest(model),
            size_bytes=model.stat().st_size,
            bits_per_weight=round(bits_per_weight(model), 3),
            text=self._text_name,
            text_sha256=digest(self._text),
            context=found["context"],
            n_tokens=found["n_tokens"],
            perplexity=round(found["perplexity"], 5),
            standard_error=round(found["standard_error"], 5),
            **{name: round(kl[name], 6) for name in _OF_KL},
            llama_perplexity=round(theirs["perplexity"], 5) if theirs else None,
            llama_standard_error=round(theirs["standard_error"], 5) if theirs else None,
            over_llama=round(found["perplexity"] / theirs["perplexity"], 5) if theirs else None,
            potluck=potluck.__version__,
            commit=commit(),
            llama_cpp_python=theirs.get("version", ""),
        )

    def _potluck(self, model: Path, *options: str) -> dict[str, Any]:
        command = [*POTLUCK, "perplexity", str(model), *options, *self._common(), "--json"]
        return answer_of(command)

    def _llama(self, model: Path, kv_type: str) -> dict[str, Any]:
        side = [self._args.llama_python, str(HERE / "llama_quality.py"), str(model)]
        options = ["--file", str(self._text), "--kv-type", kv_type, *self._common()]
        with BaseFile(self._base) as base:
            tokens = base.tokens.astype("<i4").tobytes()
            n_windows = base.shape.n_windows
        found = answer_of([*side, *options, "--chunks", str(n_windows)])
        if found["tokens_sha256"] != hashlib.sha256(tokens).hexdigest():
            raise Failed(f"{model.name}: llama.cpp cuts the text into other tokens")
        return found

    def _common(self) -> list[str]:
        args = self._args
        return ["--context", str(args.context), "--threads", str(args.threads)]


_OF_KL = (
    "ratio",
    "ratio_standard_error",
    "divergence",
    "divergence_standard_error",
    "divergence_p99",
    "divergence_max",
    "same_top",
    "change_rms",
)


def measured(args: argparse.Namespace) -> Iterator[Row]:
    """The base, its KV in bytes, then each type. Raises Failed, PotluckError."""
    source = catalogue.resolve(args.model)
    args.folder.mkdir(parents=True, exist_ok=True)
    text, name = (args.file, args.file.name) if args.file else text_of(args.folder)
    base_model = written(source, args.folder, BASE)
    scoring = Scoring(args, text, name, args.folder / "base.logits")
    scoring.save_base(base_model)
    yield scoring.row(base_model, BASE, "f16")
    yield scoring.row(base_model, BASE, "q8")
    for type_name in args.types:
        yield scoring.row(written(base_model, args.folder, type_name), type_name, "f16")


def append(file: Path, row: Row) -> None:
    """Adds a line to the results."""
    is_new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [f.name for f in fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))


def check(file: Path | None) -> None:
    """What would fail after long work is refused before. Raises SystemExit."""
    if file and file.exists():
        with file.open(encoding="utf-8") as found:
            if next(csv.reader(found), []) != [f.name for f in fields(Row)]:
                raise SystemExit(f"{file} has other columns; name a new file")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="path or catalogue name")
    parser.add_argument("--folder", type=Path, required=True, help="for models, text and base")
    parser.add_argument("--types", nargs="+", default=TYPES, help=f"default: {' '.join(TYPES)}")
    parser.add_argument("--file", type=Path, help="a text of your own")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window (512)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-python", help="of an environment with llama-cpp-python")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    check(args.csv)
    try:
        for row in measured(args):
            print(row, flush=True)
            if args.csv:
                append(args.csv, row)
    except (PotluckError, Failed) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
