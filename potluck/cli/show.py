"""Show what a model file holds and what serving it would take."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass

from potluck import catalogue, gguf
from potluck.cli import quantities, terminal
from potluck.errors import ModelError
from potluck.gguf import GgufFile
from potluck.model import (
    ModelConfig,
    config_of,
    embedding_bytes,
    head_bytes,
    kv_bytes_per_token,
    layer_bytes,
)
from potluck.plan import Span

HELP = "Show what a model file holds and needs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck show`."""
    parser.add_argument("model", metavar="MODEL", help="a name, or the path of a GGUF file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


@dataclass(frozen=True, slots=True)
class Shape:
    """The model's numbers, if potluck can serve it; the fields are those of --json."""

    context_tokens: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab: int
    layer_bytes: list[int]
    embedding_bytes: int
    head_bytes: int  # norm and head of the last stage
    tied_embeddings: bool  # the head is the embedding again: one stage alone loads it once
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a file holds; the fields are those of --json. `problem`: why potluck can't serve it."""

    name: str
    path: str
    size_bytes: int
    architecture: str
    shape: Shape | None
    problem: str
    weights_bytes: int
    types: dict[str, int]  # bytes of each type, the largest first
    vocabulary: str  # of which kind; empty: none
    n_tokens: int
    has_chat_template: bool


def run(args: argparse.Namespace) -> int:
    """Prints the file's facts, also of a file that potluck can't serve, with the reason."""
    report = report_of(gguf.read(catalogue.resolve(args.model)))
    if args.json:
        print(json.dumps(asdict(report)))
        return 0
    rows = tuple(_rows(report))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {_printable(value)}")
    types = tuple(
        (name, quantities.size(n_bytes), f"{n_bytes / report.weights_bytes:.1%}")
        for name, n_bytes in report.types.items()
    )
    if types:
        print()
        columns = ("type", "bytes", "share")
        terminal.print_tables([terminal.Table(columns, types, frozenset({"bytes", "share"}))])
    return 0


def report_of(file: GgufFile) -> Report:
    """The facts of `file`. Raises ModelError if they are of another type than they must be."""
    types: Counter[str] = Counter()
    for tensor in file.tensors.values():
        types[tensor.type_name] += tensor.size_bytes
    shape, problem = None, ""
    try:
        shape = _shape(file, config_of(file))
    except ModelError as error:
        problem = error.message.removeprefix(f"{file.path}: ")
    kind, tokens = "", 0
    if "tokenizer.ggml.tokens" in file.metadata:
        kind = file.text("tokenizer.ggml.model", "")
        if pre := file.text("tokenizer.ggml.pre", ""):
            kind = f"{kind} ({pre})"
        tokens = len(file.array("tokenizer.ggml.tokens", str))
    return Report(
        name=file.text("general.name", file.path.stem),
        path=str(file.path),
        size_bytes=file.size_bytes,
        architecture=file.text("general.architecture", ""),
        shape=shape,
        problem=problem,
        weights_bytes=types.total(),
        types=dict(types.most_common()),
        vocabulary=kind,
        n_tokens=tokens,
        has_chat_template="tokenizer.chat_template" in file.metadata,
    )


def _shape(file: GgufFile, config: ModelConfig) -> Shape:
    return Shape(
        context_tokens=config.context_tokens,
        dim=config.dim,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        ffn_dim=config.ffn_dim,
        vocab=config.vocab,
        layer_bytes=[layer_bytes(file, config, layer) for layer in range(config.n_layers)],
        embedding_bytes=embedding_bytes(file, config),
        head_bytes=head_bytes(file, config),
        tied_embeddings=config.tied_embeddings,
        kv_bytes_per_token=kv_bytes_per_token(config, Span(0, config.n_layers)),
    )


def _rows(report: Report) -> list[tuple[str, str]]:
    """What people read above the table of types."""
    rows = [
        ("name", report.name),
        ("file", f"{report.path} ({quantities.size(report.size_bytes)})"),
        ("architecture", report.architecture or "not said"),
    ]
    if report.shape is None:
        rows.append(("not servable", report.problem))
    else:
        rows += _shape_rows(report.shape)
    vocabulary = f"{report.vocabulary}, {quantities.count(report.n_tokens, 'token')}"
    return [
        *rows,
        ("weights", quantities.memory(report.weights_bytes)),
        ("vocabulary", vocabulary if report.n_tokens else "none"),
        ("chat template", "yes" if report.has_chat_template else "no"),
    ]


def _printable(text: str) -> str:
    """`text` from a stranger's file: a terminal must not obey it."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text[:500])


def _shape_rows(shape: Shape) -> list[tuple[str, str]]:
    heads = f"{shape.n_heads} heads of {shape.head_dim}, {shape.n_kv_heads} of keys and values"
    smallest, largest = min(shape.layer_bytes), max(shape.layer_bytes)
    each = quantities.memory(smallest)
    if smallest != largest:
        each = f"{each} to {quantities.memory(largest)}"
    context_bytes = shape.context_tokens * shape.kv_bytes_per_token
    tied = " (the embedding again)"
    context = f"{quantities.count(shape.context_tokens, 'token')} at most"
    return [
        ("context", context),
        ("shape", f"dim {shape.dim:,}, {heads}, ffn {shape.ffn_dim:,}, vocab {shape.vocab:,}"),
        ("layers", f"{shape.n_layers} of {each}"),
        ("embedding", quantities.memory(shape.embedding_bytes)),
        ("head", quantities.memory(shape.head_bytes) + (tied if shape.tied_embeddings else "")),
        (
            "KV",
            f"{quantities.memory(shape.kv_bytes_per_token)} a token,"
            f" {quantities.memory(context_bytes)} for a full context",
        ),
    ]
