"""Weights that are mapped and twice as large as memory: slow, and the same bits."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np

from potluck import engine, gguf, model
from potluck.plan import Span
from potluck.testing import TinyShape, write_tiny

LARGER_THAN_MEMORY = """
import re, resource, sys
from pathlib import Path
import numpy as np
from potluck import engine, gguf, model, packs
from potluck.plan import Span

ROOM = 64 * 2**20  # of memory; the weights are twice that

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

file = gguf.read(sys.argv[1])
config = model.config_of(file)
tensors = model.span_tensors(file, config, Span(0, 8), embeds=True, has_head=True)
assert sum(t.size_bytes for t in tensors) > 2 * ROOM
machine = engine.Engine(2)
limit = status("VmData") + ROOM
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

def empty():
    return engine.Shard(machine, engine.config_for(config), 0, 8, embeds=True, has_head=True,
                        kv_bytes=2**20)

try:
    engine.load(empty(), file, tensors, lambda _: None)
    sys.exit("the limit does not bind")
except MemoryError:
    pass
before = status("VmRSS")
shard = empty()
folder = packs.PackFolder(Path(sys.argv[2]))
packs.MappedWeights(shard, file, tensors, folder).load(lambda *_: None, ROOM)
shard.open(1, 64)
logits = np.empty((4, config.vocab), np.float32)
for at in range(4):
    row = [engine.RowSpan(1, at, 1, 1)]
    shard.forward(np.array([7 + at], np.int32), row, logits[at:at + 1])
assert shard.n_streamed > 0
grown = status("VmHWM") - before
assert grown < ROOM + 8 * 2**20, grown
sys.stdout.buffer.write(logits.tobytes())
"""


def test_a_shard_twice_as_large_as_memory_runs_and_gives_the_same_bits(tmp_path: Path) -> None:
    shape = TinyShape("f32", dim=512, n_layers=8, n_heads=8, n_kv_heads=8, head_dim=64)
    shape = dataclasses.replace(shape, ffn_dim=2048)
    path = write_tiny(tmp_path / "large.gguf", shape)
    done = subprocess.run(
        [sys.executable, "-c", LARGER_THAN_MEMORY, str(path), str(tmp_path / "packs")],
        capture_output=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr.decode()
    file = gguf.read(path)
    config = model.config_of(file)
    tensors = model.span_tensors(file, config, Span(0, 8), embeds=True, has_head=True)
    shard = engine.Shard(
        engine.Engine(2),
        engine.config_for(config),
        0,
        8,
        embeds=True,
        has_head=True,
        kv_bytes=2**20,
    )
    engine.load(shard, file, tensors, lambda _: None)
    shard.open(1, 64)
    expected = np.empty((4, config.vocab), np.float32)
    for at in range(4):
        ids, row = np.array([7 + at], np.int32), [engine.RowSpan(1, at, 1, 1)]
        shard.forward(ids, row, expected[at : at + 1])
    assert done.stdout == expected.tobytes()
