"""Log-probabilities of known tokens: the same bits for any split and chunks, and the engine's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from potluck import engine, gguf, model
from potluck.plan import Span
from potluck.rpc.v1 import types_pb2

VOCAB, N, FIRST = 421, 40, 12
TOKENS = [(i * 104729 + i * i * 31) % VOCAB for i in range(N)]
SAMPLING = types_pb2.Sampling(prompt_logprobs=1, temperature=0.9, seed=3)
Command = types_pb2.KvCommand


async def scores(r: Any, chunk: int) -> list[tuple[int, int, str]]:
    """(position, token, bits) of the tokens from FIRST on; the last row's pick is not one."""
    found: list[tuple[int, int, str]] = []
    opened = [Command(open=Command.Open(session=1, max_tokens=64))]
    for start in range(0, N, chunk):
        stop = min(start + chunk, N)
        want = max(0, stop - max(start, FIRST - 1))
        rows = types_pb2.Rows(
            session=1,
            start_position=start,
            token_ids=TOKENS[start:stop],
            want_logits=want,
            sampling=SAMPLING,
            scored_ids=TOKENS[stop - want + 1 : stop + 1],
        )
        result = await r.run(*opened, rows)
        opened = []
        assert not result.failures
        for entry in result.rows:
            assert all(len(pick.top) == 1 for pick in entry.picks[: len(rows.scored_ids)])
            found += [(p.position, p.token_id, p.logprob.hex()) for p in entry.picks]
    return found[:-1]


async def test_one_worker_or_two_and_any_chunks_give_the_engines_bits(
    rig: Callable[[int], Any],
) -> None:
    seen, path = [], Path()
    for cuts, chunk in [((), N), ((), 7), ((1,), N), ((3,), 9)]:
        async with rig(len(cuts) + 1) as r:
            await r.load(cuts)
            seen.append(await scores(r, chunk))
            path = r.model
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert [position for position, _, _ in seen[0]] == list(range(FIRST, N))
    assert [token for _, token, _ in seen[0]] == TOKENS[FIRST:]
    assert len({bits for _, _, bits in seen[0]}) == N - FIRST, "they must differ"
    assert [bits for _, _, bits in seen[0]] == local_bits(path)


def local_bits(path: Path) -> list[str]:
    file = gguf.read(path)
    config = model.config_of(file)
    shard = engine.Shard(
        engine.Engine(1),
        engine.config_for(config),
        0,
        config.n_layers,
        embeds=True,
        has_head=True,
        kv_bytes=2**20,
    )
    tensors = model.span_tensors(file, config, Span(0, config.n_layers), embeds=True, has_head=True)
    engine.load(shard, file, tensors, lambda done: None)
    shard.open(1, N)
    logits = np.empty((N, VOCAB), np.float32)
    shard.forward(np.array(TOKENS, np.int32), [engine.RowSpan(1, 0, N, N)], logits)
    return [
        float(np.float32(float(logits[i, TOKENS[i + 1]]) - engine.log_sum_exp(logits[i]))).hex()
        for i in range(FIRST - 1, N - 1)
    ]
