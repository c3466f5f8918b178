"""Our side of bench/compare.py: the whole model in one engine, no network.

Reads orders as JSON lines and answers each with one: `read` measures the memory, `open` makes a
test ready (depth filled, warmed up), `run` times it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from potluck import engine, gguf
from potluck.cli import measuring, timing
from potluck.errors import PotluckError
from potluck.model import KvType

READ_BYTES = 2**29  # of the bandwidth; far beyond every last cache
READ_ROUNDS = 5


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--kv-type", default="f16")
    parser.add_argument("--tests", nargs="+", required=True)
    args = parser.parse_args()
    try:
        serve(args)
    except PotluckError as error:
        print(f"potluck: error: {error.message}", file=sys.stderr)
        return 1
    return 0


def serve(args: argparse.Namespace) -> None:
    """Loads, then answers until the input ends."""
    tests = [measuring.Test.named(name) for name in args.tests]
    machine = engine.Engine(args.threads, args.isa)
    subject = timing.subject_of(gguf.read(args.model), KvType(args.kv_type))
    loaded = timing.Loaded(subject, machine, tests, lambda _: None)
    answer(isa=machine.isa)
    test = tests[0]
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "read":
            answer(bytes_per_second=machine.read_bandwidth(READ_BYTES, READ_ROUNDS))
        elif order["do"] == "open":
            test = measuring.Test.named(order["test"])
            loaded.warm_up(test)
            answer()
        else:
            answer(seconds=loaded.run(test))


def answer(**fields: object) -> None:
    """One line."""
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
