"""One stage's shard in a process of its own: loads a span, then times steps when it is told to.

    python -m bench.stage_times MODEL START STOP [--threads 1]

Says "ready" once it is loaded. Each line of standard input is a kind of step and its rows: "decode
2" is a token of each of two sessions, all with picks, "prompt 64" a chunk of one prompt without.
Each is run for --seconds and answered by one line: the median seconds of a step. Two of these told
at the same time are two machines that share this one's memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np

from potluck import catalogue, engine
from potluck.model import ModelConfig, config_of, kv_bytes_per_token, span_tensors
from potluck.plan import Span

POSITIONS = 512  # of each session
SESSIONS = 4  # that decode; one more has a prompt
_START = 48  # position of decoded tokens: a short prompt and half of an answer
_MIDDLE = 224  # of a prompt of 512 in chunks of 64: as much before it as behind it


class TimedStage:
    """The loaded span. Positions are overwritten, so that every step does the same work."""

    def __init__(self, model: str, span: Span, threads: int) -> None:
        file = catalogue.open_model(model)
        self.config: ModelConfig = config_of(file)
        self._embeds = span.start == 0
        self._has_head = span.stop == self.config.n_layers
        self._shard = engine.Shard(
            engine.Engine(threads),
            engine.config_for(self.config),
            span.start,
            span.stop,
            embeds=self._embeds,
            has_head=self._has_head,
            kv_bytes=(SESSIONS + 1) * POSITIONS * kv_bytes_per_token(self.config, span),
        )
        tensors = span_tensors(
            file, self.config, span, embeds=self._embeds, has_head=self._has_head
        )
        engine.load(self._shard, file, tensors, lambda _: None)
        for session in range(1, SESSIONS + 2):
            self._shard.open(session, POSITIONS)
            for start in range(0, _MIDDLE, 32):
                self._step(session, start, 32)

    def decode(self, rows: int) -> float:
        """Seconds of a step with a token of each of so many sessions."""
        spans = [engine.RowSpan(s, _START, 1, 1) for s in range(1, rows + 1)]
        return self._run(spans, rows, rows)

    def prompt(self, rows: int) -> float:
        """Seconds of a chunk in the middle of a prompt."""
        return self._step(SESSIONS + 1, _MIDDLE, rows)

    def _step(self, session: int, start: int, rows: int) -> float:
        return self._run([engine.RowSpan(session, start, rows, 0)], rows, 0)

    def _run(self, spans: list[engine.RowSpan], rows: int, picks: int) -> float:
        rng = np.random.default_rng(rows)
        dim, vocab = self.config.dim, self.config.vocab
        ids = rng.integers(0, vocab, rows, dtype=np.int32)
        given = ids if self._embeds else rng.standard_normal((rows, dim), dtype=np.float32)
        shape = (picks, vocab) if self._has_head else (rows, dim)
        taken = np.empty(shape, np.float32)
        started = time.perf_counter()
        self._shard.forward(given, spans, taken)
        return time.perf_counter() - started


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("start", type=int)
    parser.add_argument("stop", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    stage = TimedStage(args.model, Span(args.start, args.stop), args.threads)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, rows = line.split()
        step = {"decode": stage.decode, "prompt": stage.prompt}[kind]
        seconds: list[float] = []
        until = time.perf_counter() + args.seconds
        while time.perf_counter() < until or len(seconds) < 3:
            seconds.append(step(int(rows)))
        print(statistics.median(seconds), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
