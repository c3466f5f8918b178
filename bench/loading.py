"""How fast a shard loads and how much memory that takes: first starts, second starts, mapped
weights of which only a part fits, and tensors that were delivered without the file.

Each way runs in a process of its own, so that its peak of memory is its own, and all of them take
turns. Figures: seconds until the shard is ready, GB/s of the file's bytes, peak resident memory
beyond what the process had before, seconds of the first and of a later step of one token.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from potluck import catalogue, engine, gguf, model
from potluck.packs import MappedWeights, PackFolder
from potluck.plan import Span
from potluck.tensor_store import TensorStore

WAYS = (
    "arena",
    "arena, small pages",
    "arena, delivered",
    "mmap, first",
    "mmap, second",
    "mmap, part stays",
    "mmap, delivered",
)
KV_BYTES = 2**26
LATER_STEPS = 10
_PR_SET_THP_DISABLE = 41  # linux/prctl.h


def run_one(path: str, way: str, threads: int, packs: Path, resident_share: float) -> None:
    """One way in this process; prints its figures as JSON."""
    if way == "arena, small pages":
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    file = catalogue.open_model(path)
    if way.endswith("delivered"):
        file = _delivered(file, packs.with_name("tensors"))
    config = model.config_of(file)
    span = Span(0, config.n_layers)
    tensors = model.span_tensors(file, config, span, embeds=True, has_head=True)
    n_bytes = sum(tensor.size_bytes for tensor in tensors)
    machine = engine.Engine(threads)
    before = _memory("VmRSS")
    started = time.perf_counter()
    shard = engine.Shard(
        machine,
        engine.config_for(config),
        span.start,
        span.stop,
        embeds=True,
        has_head=True,
        kv_bytes=KV_BYTES,
    )
    if way.startswith("arena"):
        engine.load(shard, file, tensors, lambda _: None)
    else:
        stays = int(n_bytes * resident_share) if way == "mmap, part stays" else 2**60
        MappedWeights(shard, file, tensors, PackFolder(packs)).load(lambda *_: None, stays)
    load_seconds = time.perf_counter() - started
    load_peak = _memory("VmHWM") - before
    step = _steps(shard, config.vocab)
    first, later = step(), statistics.median(step() for _ in range(LATER_STEPS))
    figures = {
        "load_seconds": load_seconds,
        "gb_per_second": n_bytes / load_seconds / 1e9,
        "load_peak_mb": load_peak / 1e6,
        "peak_mb": (_memory("VmHWM") - before) / 1e6,
        "file_mb": n_bytes / 1e6,
        "first_step_seconds": first,
        "step_seconds": later,
        "n_streamed": shard.n_streamed,
    }
    print(json.dumps(figures))


def _steps(shard: engine.Shard, vocab: int) -> Callable[[], float]:
    """Each call: seconds of one more token."""
    shard.open(1, LATER_STEPS + 1)
    logits = np.empty((1, vocab), np.float32)
    positions = iter(range(LATER_STEPS + 1))

    def step() -> float:
        at = next(positions)
        started = time.perf_counter()
        shard.forward(np.array([at + 5], np.int32), [engine.RowSpan(1, at, 1, 1)], logits)
        return time.perf_counter() - started

    return step


def _memory(key: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{key}:\s+(\d+) kB", text)
    assert found is not None, key
    return 1024 * int(found[1])


def deliver(path: str, root: Path) -> None:
    """Puts the model's tensors into a store, and their sums beside them."""
    file = catalogue.open_model(path)
    store, sums = TensorStore(root), {}
    with file.path.open("rb") as source:
        store.put_header(file.header_sha256, source.read(file.data_offset_bytes))
        for tensor in file.tensors.values():
            source.seek(tensor.offset_bytes)
            data = source.read(tensor.size_bytes)
            sha256 = hashlib.sha256(data).digest()
            with store.writer(sha256, len(data)) as writer:
                writer.write(data[writer.offset :])
                writer.finish()
            sums[tensor.name] = sha256.hex()
    (root / "sums.json").write_text(json.dumps(sums), encoding="ascii")


def _delivered(file: gguf.GgufFile, root: Path) -> gguf.GgufFile:
    """The same model as a worker has it that was sent its tensors."""
    store = TensorStore(root)
    sums = json.loads((root / "sums.json").read_text(encoding="ascii"))
    stored = {name: store.path_of(bytes.fromhex(sha256)) for name, sha256 in sums.items()}
    return gguf.read_header(store.header_path(file.header_sha256), file.size_bytes, stored)


def measure(args: argparse.Namespace, packs: Path) -> dict[str, list[dict[str, float]]]:
    """Figures by way, of each round."""
    figures: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        print(f"\rround {number + 1}/{args.rounds}", end="", file=sys.stderr)
        for way in WAYS:
            if way in ("mmap, first", "mmap, delivered"):
                shutil.rmtree(packs, ignore_errors=True)
            if args.warm and way.endswith("delivered"):
                for path in packs.with_name("tensors").glob("??/*"):
                    _read(path)
            elif args.warm:
                _read(Path(args.model))
            command = [sys.executable, __file__, args.model, "--way", way]
            command += ["--threads", str(args.threads), "--packs", str(packs)]
            command += ["--resident-share", str(args.resident_share)]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            figures[way].append(json.loads(out))
    print(file=sys.stderr)
    return figures


def _read(path: Path) -> None:
    """Brings a file into the page cache."""
    buffer = bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def report(figures: dict[str, list[dict[str, float]]], out: Path | None) -> None:
    """A table of medians; rows of it as CSV."""
    keys = list(next(iter(figures.values()))[0])
    rows = [
        {"way": way, **{k: round(statistics.median(r[k] for r in runs), 4) for k in keys}}
        for way, runs in figures.items()
    ]
    head = (
        "",
        "load s",
        "GB/s",
        "load peak MB",
        "peak MB",
        "file MB",
        "step 1 s",
        "step s",
        "read",
    )
    print("{:20}{:>8}{:>7}{:>14}{:>9}{:>9}{:>10}{:>9}{:>6}".format(*head))
    for row in rows:
        way, seconds, rate, load_peak, peak, size, first, later, streamed = row.values()
        print(
            f"{way:20}{seconds:8.3f}{rate:7.2f}{load_peak:14.0f}{peak:9.0f}{size:9.0f}"
            f"{first:10.3f}{later:9.4f}{streamed:6.0f}"
        )
    if out is not None:
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=["way", *keys])
            writer.writeheader()
            writer.writerows(rows)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a GGUF, such as bench/write_model.py writes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", action="store_true", help="read the file first, each time")
    parser.add_argument(
        "--resident-share", type=float, default=0.6, help="of the weights, in 'part stays'"
    )
    parser.add_argument(
        "--packs", type=Path, help="folder for packs and tensors (default: a temporary one)"
    )
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        run_one(args.model, args.way, args.threads, args.packs, args.resident_share)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root = args.packs or Path(folder)
        deliver(args.model, root / "tensors")
        report(measure(args, root / "packs"), args.csv)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
