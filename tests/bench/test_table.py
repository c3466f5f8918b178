"""bench/table.py: from lines of results to the table of the README."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

HEADER = (
    "cpu,isa,threads,model,type,test,potluck_tps,llama_tps,ratio,"
    "potluck_of_bandwidth,potluck_over_one,llama_over_one"
)


@pytest.fixture
def table(script: Callable[[str], ModuleType], tmp_path: Path) -> Callable[..., list[str]]:
    """The lines of the table that such results give, a list of lines a file."""
    module = script("table")

    def make(*files: list[str]) -> list[str]:
        for number, lines in enumerate(files):
            (tmp_path / f"{number}.csv").write_text("\n".join([HEADER, *lines]) + "\n")
        made: str = module.table(module.rows(tmp_path))
        assert made.endswith("|\n")
        return made.splitlines()

    return make


def test_a_test_is_a_row_and_a_thread_count_a_column(table: Callable[..., list[str]]) -> None:
    assert table(
        [
            "Zen,avx2,1,7b.Q4_0,Q4_0,pp512,21.04,6.4,3.2875,,,",
            "Zen,avx2,1,7b.Q4_0,Q4_0,tg128,5.2,3.45,1.507,0.951,,",
            "Zen,avx2,2,7b.Q4_0,Q4_0,pp512,1042.4,512.6,2.03,,,",
            "Zen,avx2,2,7b.Q4_0,Q4_0,tg128,7.8,6.5,1.2,0.97,,",
        ]
    ) == [
        "| model | test | 1 thread | 2 threads |",
        "|---|---|---|---|",
        "| 7b Q4_0 | reading a prompt of 512 | **3.29x** 21.0 / 6.40 t/s "
        "| **2.03x** 1,042 / 513 t/s |",
        "|  | making 128 tokens | **1.51x** 5.20 / 3.45 t/s, 95% of memory "
        "| **1.20x** 7.80 / 6.50 t/s, 97% of memory |",
    ]


def test_depth_and_sessions_are_said(table: Callable[..., list[str]]) -> None:
    lines = table(
        [
            "Zen,avx2,1,m,Q4_K,tg64@d4096,4,2,2,0.9,,",
            "Zen,avx2,1,m,Q4_K,tg32x4,20,10,2,0.5,2.61,1.6",
        ]
    )
    assert lines[2:] == [
        "| m Q4_K | making 64 tokens, after 4,096 positions "
        "| **2.00x** 4.00 / 2.00 t/s, 90% of memory |",
        "|  | making 32 tokens in each of 4 sessions "
        "| **2.00x** 20.0 / 10.0 t/s, 2.61x of one (llama.cpp 1.60x) |",
    ]


def test_a_kv_in_bytes_has_rows_of_its_own(script: Callable[[str], ModuleType]) -> None:
    made = ("Zen", "avx2", "1", "m", "F16", "pp8", "1", "1", "1.5", "", "", "")
    row = dict(zip(HEADER.split(","), made, strict=True))
    found = [{**row, "kv_type": "f16"}, {**row, "kv_type": "q8", "ratio": "1.7"}]
    lines = script("table").table(found).splitlines()
    assert lines[2:] == [
        "| m F16 | reading a prompt of 8 | **1.50x** 1.00 / 1.00 t/s |",
        "|  | reading a prompt of 8, KV in q8 | **1.70x** 1.00 / 1.00 t/s |",
    ]


def test_each_type_of_a_model_has_its_rows(table: Callable[..., list[str]]) -> None:
    lines = table(
        ["Zen,avx2,1,7b.Q4_0,Q4_0,pp8,1,1,1,,,"], ["Zen,avx2,1,7b.q5_k,Q5_K,pp8,1,1,1,,,"]
    )
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 7b Q4_0", "| 7b Q5_K"]


def test_what_was_measured_last_counts(table: Callable[..., list[str]]) -> None:
    lines = table(
        ["Zen,avx2,1,m,F16,pp8,1,1,1.1,,,", "Zen,avx2,1,m,F16,pp8,1,1,1.2,,,"],
        ["Zen,avx2,1,m,F16,pp8,1,1,0.8,,,"],
    )
    assert len(lines) == 3
    assert "**0.80x**" in lines[2]  # also where we lose


def test_what_was_not_measured_is_empty(table: Callable[..., list[str]]) -> None:
    lines = table(["Zen,avx2,1,m,F16,pp8,1,1,1,,,", "Zen,avx2,2,m,F16,pp9,1,1,1,,,"])
    assert [line.split("|")[3:5] for line in lines[2:]] == [
        [" **1.00x** 1.00 / 1.00 t/s ", "  "],
        ["  ", " **1.00x** 1.00 / 1.00 t/s "],
    ]


def test_a_single_session_run_for_comparison_is_left_out(table: Callable[..., list[str]]) -> None:
    tests = ("tg128", "tg32", "tg32x2", "tg16@d64", "pp8")
    lines = table([f"Zen,avx2,1,m,F16,{test},1,1,1,,," for test in tests])
    assert len(lines) == 2 + 4
    assert not any("making 32 tokens |" in line for line in lines)


def test_another_machine_has_a_table_of_its_own(table: Callable[..., list[str]]) -> None:
    lines = table(["Zen,avx2,1,m,F16,pp8,1,1,1,,,"], ["Pi,neon,4,m,F16,pp8,1,1,1,,,"])
    assert [line for line in lines if line.endswith(":")] == ["Zen, avx2:", "Pi, neon:"]
    assert [line for line in lines if "thread" in line] == [
        "| model | test | 1 thread |",
        "| model | test | 4 threads |",
    ]
