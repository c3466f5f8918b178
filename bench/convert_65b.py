"""The way of LLaMA-65B from Meta's files to 4 bits at true size, on a machine without 130 GB.

Eight files of true shape are written sparse: 130 GB long, a few MB of disk; one layer's pages get
random f16 values, 1.6 GB, so that a rate is not that of zeros alone. All 80 layers are the input;
--layers of them are written (by default as many as fit on the disk): Meta's files to the type, and
Meta's files to f16 and that to the type, as `potluck convert` and `potluck quantize` do it. Each
step runs in a process of its own, so that its peak of resident memory (VmHWM) is its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from potluck.cli import quantities, terminal, values, writing
from potluck.convert import open_source
from potluck.tensor_source import ModelSource, rows_and_cols
from potluck.testing.sentence_piece_file import write_sentence_pieces
from potluck.testing.torch_file import VALUE_BYTES, TorchTensor, write_torch
from potluck.type_mix import choice_of

DIM, N_HEADS, FFN_DIM, VOCAB = 8192, 64, 22_016, 32_000
N_LAYERS, N_SHARDS = 80, 8
LAYER_VALUES = 4 * DIM * DIM + 3 * DIM * FFN_DIM
ENDS_VALUES = 2 * VOCAB * DIM
_FREE_SHARE = 0.5  # of the disk, that is taken at most
_RANDOM_VALUES = 2**22  # that are repeated: making 800 million takes longer than reading them


def write_checkpoint(folder: Path) -> Path:
    """LLaMA-65B's files, of holes but for layer 0. Returns `folder`."""
    folder.mkdir(parents=True)
    params = {
        "dim": DIM,
        "multiple_of": 256,
        "n_heads": N_HEADS,
        "n_layers": N_LAYERS,
        "norm_eps": 1e-05,
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(params))
    write_sentence_pieces(folder.parent / "tokenizer.model", VOCAB)
    random = np.random.default_rng(65).normal(0, 0.02, _RANDOM_VALUES).astype("<f2")
    for shard in range(N_SHARDS):
        tensors = [
            _filled(t, random) if t.name.startswith("layers.0.") else t for t in _shard_tensors()
        ]
        write_torch(folder / f"consolidated.{shard:02}.pth", tensors)
    return folder


def _shard_tensors() -> Iterator[TorchTensor]:
    """What each of the eight files holds, in Meta's order; holes."""

    def hole(name: str, *shape: int) -> TorchTensor:
        return TorchTensor(name, "f16", shape, None)

    n = N_SHARDS
    yield hole("tok_embeddings.weight", VOCAB, DIM // n)
    yield hole("norm.weight", DIM)
    yield hole("output.weight", VOCAB // n, DIM)
    for layer in range(N_LAYERS):
        at = f"layers.{layer}"
        for w in ("wq", "wk", "wv"):
            yield hole(f"{at}.attention.{w}.weight", DIM // n, DIM)
        yield hole(f"{at}.attention.wo.weight", DIM, DIM // n)
        yield hole(f"{at}.feed_forward.w1.weight", FFN_DIM // n, DIM)
        yield hole(f"{at}.feed_forward.w2.weight", DIM, FFN_DIM // n)
        yield hole(f"{at}.feed_forward.w3.weight", FFN_DIM // n, DIM)
        yield hole(f"{at}.attention_norm.weight", DIM)
        yield hole(f"{at}.ffn_norm.weight", DIM)
    yield hole("rope.freqs", DIM // N_HEADS // 2)


def _filled(tensor: TorchTensor, random: np.ndarray) -> TorchTensor:
    n = tensor.n_values
    values = np.resize(random, n)  # repeats
    assert len(np.unique(values[:1000])) > 500
    return replace(tensor, data=values.tobytes())


def some_layers(source: ModelSource, n_layers: int) -> ModelSource:
    """The model without its layers from `n_layers` on."""

    def stays(name: str) -> bool:
        return not name.startswith("blk.") or int(name.split(".")[1]) < n_layers

    return replace(
        source,
        metadata=[
            (key, n_layers if key == "llama.block_count" else value)
            for key, value in source.metadata
        ],
        tensors=[t for t in source.tensors if stays(t.name)],
        identity=f"{source.identity} {n_layers}",
    )


def run_step(source_path: Path, out: Path, type_name: str, n_layers: int, threads: int) -> None:
    """One conversion in this process; prints its figures as JSON."""
    started = time.perf_counter()
    source = some_layers(open_source(source_path), n_layers)
    opened_seconds = time.perf_counter() - started
    read_bytes = sum(
        rows_and_cols(t.shape)[0] * rows_and_cols(t.shape)[1] * VALUE_BYTES[t.type_name]
        for t in source.tensors
    )
    summary = writing.write(source, out, choice_of(type_name), threads=threads, force=True)
    figures = {
        "opened_seconds": opened_seconds,
        "read_bytes": read_bytes,
        "written_bytes": summary.size_bytes,
        "seconds": summary.seconds,
        "peak_bytes": _peak_bytes(),
    }
    print(json.dumps(figures))


def _peak_bytes() -> int:
    """Most memory that was ever resident in this process (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def layers_that_fit(free_bytes: int) -> int:
    """Of which the f16 file and a file of a byte a value take at most a share of the disk."""
    room = free_bytes * _FREE_SHARE - 3 * ENDS_VALUES
    return max(1, min(N_LAYERS, int(room / (3 * LAYER_VALUES))))


@contextmanager
def a_folder(folder: Path | None) -> Iterator[Path]:
    """A new folder in `folder` (else where temporary files go), gone afterwards."""
    made = Path(tempfile.mkdtemp(prefix="65b-", dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def main() -> None:
    """Writes the checkpoint, runs the steps, prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--type", default="q4_0", help="of the last file (default: q4_0)")
    parser.add_argument("--layers", type=values.whole(1, N_LAYERS), help="of 80, to be written")
    parser.add_argument("--threads", type=values.whole(1), default=0, help="default: all")
    parser.add_argument("--folder", type=Path, help="on a disk with room")
    parser.add_argument("--direct", action="store_true", help="leave out the way by f16")
    parser.add_argument("--step", nargs=3, metavar=("SRC", "OUT", "TYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        source, out, type_name = args.step
        run_step(Path(source), Path(out), type_name, args.layers, args.threads)
        return
    with a_folder(args.folder) as folder:
        n_layers = args.layers or layers_that_fit(shutil.disk_usage(folder).free)
        checkpoint = _written(folder / "65B", n_layers)
        direct, f16, quantized = (folder / f"{n}.gguf" for n in ("direct", "f16", "quantized"))
        rows = [_measured(checkpoint, direct, args.type, n_layers, args.threads)]
        if not args.direct:
            rows.append(_measured(checkpoint, f16, "f16", n_layers, args.threads))
            rows.append(_measured(f16, quantized, args.type, n_layers, args.threads))
            same = "the same bytes" if _same(direct, quantized) else "DIFFERENT bytes"
            terminal.note(f"both ways give {same}")
        columns = ("step", "layers", "read", "written", "seconds", "read/s", "peak memory")
        terminal.print_tables([terminal.Table(columns, tuple(rows), frozenset(columns[1:]))])


def _written(folder: Path, n_layers: int) -> Path:
    """The checkpoint, with what it claims and what it takes said."""
    started = time.perf_counter()
    files = list(write_checkpoint(folder).glob("*.pth"))
    claimed = quantities.size(sum(f.stat().st_size for f in files))
    taken = quantities.size(sum(f.stat().st_blocks * 512 for f in files))
    seconds = quantities.duration(time.perf_counter() - started)
    terminal.note(
        f"65B: {len(files)} files of {claimed} that take {taken}, made in {seconds};"
        f" {n_layers} of {N_LAYERS} layers are written"
    )
    return folder


def _measured(
    source: Path, out: Path, type_name: str, n_layers: int, threads: int
) -> tuple[str, ...]:
    """One step in a process of its own, as a row of the table."""
    options = ["--layers", str(n_layers), *(["--threads", str(threads)] if threads else [])]
    command = [sys.executable, __file__, *options, "--step", str(source), str(out), type_name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    kind = "Meta's files" if source.is_dir() else "f16"
    return (
        f"{kind} to {type_name}",
        str(n_layers),
        quantities.size(found["read_bytes"]),
        quantities.size(found["written_bytes"]),
        f"{found['seconds']:.1f}",
        f"{quantities.size(found['read_bytes'] / found['seconds'])}/s",
        quantities.memory(found["peak_bytes"]),
    )


def _same(a: Path, b: Path) -> bool:
    """Whether two files hold the same bytes."""
    with a.open("rb") as one, b.open("rb") as other:
        while True:
            data = one.read(2**24)
            if data != other.read(2**24):
                return False
            if not data:
                return True


if __name__ == "__main__":
    main()
