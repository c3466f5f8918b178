"""Show what a model file holds and what serving it would take."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from potluck import catalogue
from potluck.cli import quantities, terminal, values
from potluck.cli.worker_memory import WorkerShare, shares
from potluck.errors import ModelError, UsageError
from potluck.gguf import GgufFile
from potluck.model import (
    KvType,
    ModelConfig,
    config_of,
    embedding_bytes,
    head_bytes,
    kv_bytes_per_token,
    layer_bytes,
)
from potluck.plan import Span

HELP = "Show what a model file holds and needs"
USUAL_CONTEXT_TOKENS = 4096  # that `serve` takes, if the model's is not shorter
USUAL_WORKERS = (1, 2, 3, 4, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `potluck show`."""
    parser.add_argument(
        "model", metavar="MODEL", help="a name (`potluck list`), or the path of a GGUF file"
    )
    parser.add_argument(
        "--context",
        type=values.whole(1),
        metavar="N",
        help="tokens that a session may have (default: the model's, up to 4096)",
    )
    parser.add_argument(
        "--workers",
        type=values.whole(1, 256),
        metavar="N",
        help="show what each of N equal workers holds (default: of 1, 2, 3, 4 and 8)",
    )
    parser.add_argument(
        "--kv-type",
        choices=[kv_type.value for kv_type in KvType],
        default=KvType.F16.value,
        help="how keys and values are kept (f16)",
    )
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
    kv_bytes_per_token: int  # f16
    kv_q8_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What equal workers hold, by their number; the fields are those of --json."""

    context_tokens: int  # of one session
    kv_type: str
    workers: dict[int, list[WorkerShare]]


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
    is_synthetic: bool  # random weights, no file


def run(args: argparse.Namespace) -> int:
    """Prints the file's facts, also of a file that potluck can't serve, with the reason."""
    file = catalogue.open_model(args.model)
    report = report_of(file)
    memory = None if report.shape is None else _memory(file, args)
    if args.json:
        shown = asdict(report) | {"memory": None if memory is None else asdict(memory)}
        print(json.dumps(shown))
        return 0
    rows = tuple(_rows(report))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {_printable(value)}")
    tables = [_types_table(report)] if report.types else []
    if memory is not None:
        tables.append(_memory_table(memory))
    if tables:
        print()
        terminal.print_tables(tables)
    return 0


def _types_table(report: Report) -> terminal.Table:
    rows = tuple(
        (name, quantities.size(n_bytes), f"{n_bytes / report.weights_bytes:.1%}")
        for name, n_bytes in report.types.items()
    )
    return terminal.Table(("type", "bytes", "share"), rows, frozenset({"bytes", "share"}))


def _memory(file: GgufFile, args: argparse.Namespace) -> Memory:
    """Of the numbers of workers that were asked for, or of usual ones. Raises UsageError."""
    config = config_of(file)
    context_tokens = args.context or min(USUAL_CONTEXT_TOKENS, config.context_tokens)
    if context_tokens > config.context_tokens:
        raise UsageError(f"--context {context_tokens}: the model's is {config.context_tokens}")
    if args.workers and args.workers > config.n_layers:
        raise UsageError(f"--workers {args.workers}: each needs one of {config.n_layers} layers")
    numbers = [args.workers] if args.workers else USUAL_WORKERS
    kv_type = KvType(args.kv_type)
    held = {
        n: shares(file, config, n, context_tokens, kv_type) for n in numbers if n <= config.n_layers
    }
    return Memory(context_tokens, kv_type.value, held)


def _memory_table(memory: Memory) -> terminal.Table:
    """A row for each number of workers; for one number alone, a row for each worker."""
    tokens = quantities.count(memory.context_tokens, "token")
    title = f"Memory of equal workers, one session of {tokens}, KV {memory.kv_type}"
    figures = ("weights", "KV", "memory")
    if len(memory.workers) > 1:
        columns = ("workers", "layers each", *(f"{name} each" for name in figures))
        rows = [(str(n), *_ranges(held)) for n, held in memory.workers.items()]
    else:
        columns = ("worker", "layers", *figures)
        (held,) = memory.workers.values()
        rows = [(str(i + 1), *_ranges([share])) for i, share in enumerate(held)]
    return terminal.Table(columns, tuple(rows), frozenset(columns), title)


def _ranges(held: Sequence[WorkerShare]) -> tuple[str, ...]:
    """Layers, weights, KV and memory: the least to the most of these workers."""
    counts = [share.n_layers for share in held]
    layers = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    sizes = (
        [share.weights_bytes for share in held],
        [share.kv_bytes for share in held],
        [share.memory_bytes for share in held],
    )
    return layers, *(_between(each) for each in sizes)


def _between(sizes: Sequence[int]) -> str:
    """ "3.8 GiB", or "3.6 to 3.8 GiB"."""
    least, most = quantities.memory(min(sizes)), quantities.memory(max(sizes))
    if least == most:
        return most
    same_unit = least.split()[1] == most.split()[1]
    return f"{least.split()[0] if same_unit else least} to {most}"


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
        is_synthetic=file.synthetic is not None,
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
        kv_q8_bytes_per_token=kv_bytes_per_token(config, Span(0, config.n_layers), KvType.Q8),
    )


def _rows(report: Report) -> list[tuple[str, str]]:
    """What people read above the table of types."""
    rows = [
        ("name", report.name),
        (
            ("file", f"none: random weights, in a file {quantities.size(report.size_bytes)}")
            if report.is_synthetic
            else ("file", f"{report.path} ({quantities.size(report.size_bytes)})")
        ),
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
            f" {quantities.memory(context_bytes)} for a full context"
            f" (q8: {quantities.memory(shape.kv_q8_bytes_per_token)} a token)",
        ),
    ]
