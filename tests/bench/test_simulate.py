"""The simulator against tables that were computed without it, and against arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from coordinator.scheduler import Limits

Script = Callable[[str], ModuleType]

# LLaMA-65B in Q4_0 on four equal laptops: bytes swept and multiplications a token, bytes/s, bytes
# of a row in f16. The tables below are of U / max(Lambda(m), G tau(m)) and
# (ceil(P/c) + N-1) * max(c t_c, t_mem): closed forms of a pipeline, not of this program.
N_STAGES, WEIGHT_BYTES, MACS, READ, ROW_BYTES = 4, 36.7e9, 65.2e9, 50e9, 16384
WIRED, WIFI = (0.0003, 940e6 / 8), (0.003, 200e6 / 8)  # latency, bytes/s
FILLED = {  # multiplications a second: sessions -> tokens/s
    0.3e12: {1: 1.36, 2: 2.71, 4: 5.43, 8: 10.6, 16: 16.6, 32: 18.2, 64: 18.4},
    0.6e12: {1: 1.36, 2: 2.72, 4: 5.43, 8: 10.8, 16: 21.1, 32: 33.1, 64: 36.4},
    1.2e12: {1: 1.36, 2: 2.72, 4: 5.44, 8: 10.9, 16: 21.7, 32: 42.1, 64: 65.9},
}
PREFILL = {  # multiplications a second: rows of a chunk -> seconds of 512 tokens
    0.3e12: {512: 111, 256: 69.5, 128: 48.7, 64: 38.3, 32: 33.0, 16: 30.4, 8: 29.1},
    0.6e12: {512: 55.6, 256: 34.8, 128: 24.3, 64: 19.1, 32: 16.5, 16: 15.2, 8: 14.6},
    1.2e12: {512: 27.8, 256: 17.4, 128: 12.2, 64: 9.6, 32: 8.3, 16: 7.6, 8: 12.3},
}
WITHIN = 0.03


@pytest.fixture
def simulation(script: Script) -> ModuleType:
    return script("simulation")


def laptops(simulation: ModuleType, macs: float, link: tuple[float, float], power: float) -> object:
    """Four stages; the coordinator is on the first one's machine."""
    curve = simulation.RowCurve(WEIGHT_BYTES / N_STAGES / READ, MACS / N_STAGES / macs, power=power)
    stages = [simulation.SimulatedStage(f"l{i}", lambda w: curve.seconds(w.rows)) for i in range(4)]
    links = [simulation.SimulatedLink(*link) for _ in range(N_STAGES)]
    local = simulation.SimulatedLink(0.0, 1e12)
    return simulation.Pipe(tuple(stages), (local, *links), ROW_BYTES)


def limits(sessions: int = 1, chunk: int = 64) -> Limits:
    return Limits(
        n_stages=N_STAGES,
        max_sessions=sessions,
        queue=0,
        chunk_tokens=chunk,
        step_tokens=1024,
        step_picks=1024,
        kv_tokens=sessions * 1024,
    )


@pytest.mark.parametrize(("link", "expected"), [(WIRED, 1.36), (WIFI, 1.34)])
def test_one_session_gets_no_faster_by_more_stages(
    simulation: ModuleType, link: tuple[float, float], expected: float
) -> None:
    pipe = laptops(simulation, 0.6e12, link, power=4)
    outcome = simulation.simulate(pipe, limits(), [simulation.Arrival(8, 64)])
    assert outcome.tokens_per_second == pytest.approx(expected, rel=WITHIN)
    busy = [outcome.utilisation(stage) for stage in range(N_STAGES)]
    assert busy == pytest.approx([0.25] * N_STAGES, rel=WITHIN)


@pytest.mark.parametrize("macs", FILLED)
@pytest.mark.parametrize("gap_seconds", [0.0, 0.4])
def test_many_sessions_fill_the_pipeline(
    simulation: ModuleType, macs: float, gap_seconds: float
) -> None:
    pipe = laptops(simulation, macs, WIRED, power=4)
    found = {}
    for n in FILLED[macs]:
        asked = [simulation.Arrival(8, 256, gap_seconds * i) for i in range(n)]
        found[n] = simulation.simulate(pipe, limits(n), asked).tokens_per_second
    assert found == pytest.approx(FILLED[macs], rel=WITHIN)


@pytest.mark.parametrize("macs", PREFILL)
def test_a_prompt_fills_the_pipeline_by_chunks(simulation: ModuleType, macs: float) -> None:
    pipe = laptops(simulation, macs, WIRED, power=float("inf"))
    found = {}
    for chunk in PREFILL[macs]:
        outcome = simulation.simulate(pipe, limits(1, chunk), [simulation.Arrival(512, 1)])
        found[chunk] = outcome.first_token_seconds
    assert found == pytest.approx(PREFILL[macs], rel=WITHIN)


def test_rows_of_a_step_cost_what_memory_and_arithmetic_say(simulation: ModuleType) -> None:
    curve = simulation.RowCurve(0.1835, 65.2e9 / 4 / 0.3e12, power=4)
    found = [round(1000 * curve.seconds(m)) for m in (1, 2, 3, 4, 6, 8, 16)]
    assert found == pytest.approx([184, 189, 207, 241, 334, 438, 870], abs=1)
    assert curve.seconds(0) == 0


def test_links_on_one_medium_take_turns(simulation: ModuleType) -> None:
    quick = [simulation.SimulatedStage(f"s{i}", lambda w: 0.001) for i in range(3)]

    def first_token(medium: str) -> float:
        link = simulation.SimulatedLink(0.0, 1e6, medium)
        local = simulation.SimulatedLink(0.0, 1e12)
        pipe = simulation.Pipe(tuple(quick), (local, link, link, local), 10_000, step_bytes=0)
        three = simulation.Limits(3, 1, 0, 10, 1024, 1024, 1024)
        outcome = simulation.simulate(pipe, three, [simulation.Arrival(100, 1)])
        return float(outcome.first_token_seconds)

    # Ten chunks of 100 kB over two links of 1 MB/s: side by side, or all twenty one by one.
    assert first_token("") == pytest.approx(1.1 + 0.003, abs=0.001)
    assert first_token("air") == pytest.approx(2.0 + 0.003, abs=0.01)


def test_a_slow_stage_is_the_one_that_is_busy(simulation: ModuleType) -> None:
    speeds = (0.01, 0.04)
    stages = [
        simulation.SimulatedStage(f"s{i}", lambda w, s=s: s if w.rows else 0.0)
        for i, s in enumerate(speeds)
    ]
    pipe = simulation.Pipe(tuple(stages), (simulation.SimulatedLink(0.0, 1e12),) * 3, 4)
    two = simulation.Limits(2, 2, 0, 64, 1024, 1024, 1024)
    outcome = simulation.simulate(pipe, two, [simulation.Arrival(4, 100)] * 2)
    assert outcome.tokens_per_second == pytest.approx(1 / 0.04, rel=0.02)
    assert outcome.utilisation(1) == pytest.approx(1.0, abs=0.01)
    assert outcome.utilisation(0) == pytest.approx(0.25, abs=0.01)


def test_more_people_than_places_wait_in_line(simulation: ModuleType) -> None:
    pipe = laptops(simulation, 0.6e12, WIRED, power=4)
    few = Limits(N_STAGES, 2, 2, 64, 1024, 1024, 2048)
    outcome = simulation.simulate(pipe, few, [simulation.Arrival(8, 4)] * 4)
    waits = sorted(times[0] for times in outcome.token_times.values())
    assert waits[2] > 3 * 0.7 > waits[1]
    assert all(len(times) == 4 for times in outcome.token_times.values())
    with pytest.raises(ValueError, match="ask for more"):
        _ = outcome.tokens_per_second


def test_a_pipe_has_a_link_on_either_side_of_each_stage(simulation: ModuleType) -> None:
    with pytest.raises(ValueError, match="0 stages have 2 links"):
        simulation.Pipe((), (simulation.SimulatedLink(0, 1),) * 2, 4)
