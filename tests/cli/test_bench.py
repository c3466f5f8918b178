"""`potluck bench`: grids, llama-bench's field names, and figures that follow from each other."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from potluck import catalogue, gguf, testing
from potluck.cli import command_line as cli
from potluck.cli import measuring, memory, timing
from potluck.errors import UsageError
from potluck.model import KvType

# What llama-bench prints with `-o json`, in its order: get_fields() and the samples.
LLAMA_BENCH = [
    "build_commit",
    "build_number",
    "cpu_info",
    "gpu_info",
    "backends",
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "n_batch",
    "n_ubatch",
    "n_threads",
    "cpu_mask",
    "cpu_strict",
    "poll",
    "type_k",
    "type_v",
    "n_gpu_layers",
    "n_cpu_moe",
    "split_mode",
    "main_gpu",
    "no_kv_offload",
    "flash_attn",
    "devices",
    "tensor_split",
    "tensor_buft_overrides",
    "load_mode",
    "lazy_mode",
    "embeddings",
    "no_op_offload",
    "no_host",
    "repack",
    "fit_target",
    "fit_min_ctx",
    "n_prompt",
    "n_gen",
    "n_depth",
    "test_time",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
    "samples_ns",
    "samples_ts",
]
OURS = [
    *("n_sessions", "isa", "read_bandwidth", "gb_per_second", "gmac_per_second"),
    *("n_layers", "model_n_layers"),
]
# Its types; all else is text.
NUMBERS = [
    "build_number",
    "n_batch",
    "n_ubatch",
    "n_threads",
    "poll",
    "model_size",
    "model_n_params",
    "n_gpu_layers",
    "main_gpu",
    "n_prompt",
    "n_gen",
    "n_depth",
    "avg_ns",
    "stddev_ns",
    "no_op_offload",
    "n_cpu_moe",
    "fit_target",
    "fit_min_ctx",
    "flash_attn",
]
YES_OR_NO = ["no_kv_offload", "cpu_strict", "embeddings", "no_host", "repack"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    testing.write_tiny(path)
    return path


def bench(model: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    line = ["bench", str(model), "-t", "1", "--isa", "scalar", "--json", *options]
    assert cli.main(line) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_json_has_the_names_of_llama_bench(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench(model, "-p", "7", "-n", "5", "-b", "3", "-r", "2", capsys=capsys)
    assert [list(row) for row in rows] == [LLAMA_BENCH + OURS] * 3
    prompt, one, three = rows
    assert (prompt["n_prompt"], prompt["n_gen"], prompt["n_batch"]) == (7, 0, 7)
    assert (one["n_prompt"], one["n_gen"], one["n_batch"]) == (0, 5, 1)
    assert (three["n_prompt"], three["n_gen"], three["n_batch"]) == (0, 5, 3)
    assert [row["n_sessions"] for row in rows] == [1, 1, 3]
    assert {row["isa"] for row in rows} == {"scalar"}
    assert {row["n_threads"] for row in rows} == {1}


def test_json_has_the_types_of_llama_bench(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = bench(model, "-p", "4", "-n", "0", "-r", "1", capsys=capsys)
    kinds = {name: type(row[name]) for name in LLAMA_BENCH}
    expected: dict[str, type] = dict.fromkeys(LLAMA_BENCH, str)
    expected |= dict.fromkeys(NUMBERS, int) | dict.fromkeys(YES_OR_NO, bool)
    expected |= dict.fromkeys(["avg_ts", "stddev_ts"], float)
    expected |= dict.fromkeys(["samples_ns", "samples_ts"], list)
    assert kinds == expected


def test_lists_ranges_and_repeated_options_make_a_grid(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["-p", "3,5", "-p", "6", "-n", "2", "-d", "0-40+20", "-b", "2-4*2", "-r", "1"]
    rows = bench(model, *options, "-pg", "4,2", "-t", "2", capsys=capsys)
    tests = [
        (r["n_threads"], r["n_depth"], r["n_prompt"], r["n_gen"], r["n_sessions"]) for r in rows
    ]
    assert tests == [
        (threads, depth, *test)
        for threads in (1, 2)
        for depth in (0, 20, 40)
        for test in (
            *((p, 0, 1) for p in (3, 5, 6)),
            *((0, 2, k) for k in (1, 2, 4)),
            *((4, 2, k) for k in (1, 2, 4)),
        )
    ]


def test_the_figures_follow_from_the_samples(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = bench(model, "-p", "0", "-n", "4", "-r", "3", capsys=capsys)
    assert len(row["samples_ns"]) == len(row["samples_ts"]) == 3
    assert row["avg_ns"] == pytest.approx(sum(row["samples_ns"]) / 3, abs=1)
    assert row["samples_ts"][0] == pytest.approx(4e9 / row["samples_ns"][0], rel=1e-3)
    assert row["stddev_ts"] >= 0
    # Weights once a step; positions 1, 2, 3 and 4 of two layers: 2 KV heads of 16 keys and values.
    kv = 10 * 2 * 2 * 2 * 16 * 2
    read = row["gb_per_second"] * row["avg_ns"] - kv
    assert 0.5 * row["model_size"] < read / 4 <= row["model_size"]


def test_keys_and_values_in_bytes_are_measured_and_counted(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["-p", "0", "-n", "4", "-r", "1", "--kv-type", "q8"]
    (row,) = bench(model, *options, capsys=capsys)
    assert (row["type_k"], row["type_v"]) == ("q8", "q8")
    kv = 10 * 2 * 2 * 2 * (16 + 4)
    subject = timing.subject_of(gguf.read(model), KvType.Q8)
    assert subject.bytes_read(measuring.Test.named("tg4")) == 4 * subject.weight_bytes + kv


def test_all_tokens_of_all_sessions_count(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-p", "0", "-n", "0", "-pg", "6,2", "-b", "4", "-d", "8", "-r", "1"]
    _, four = bench(model, *options, capsys=capsys)
    assert four["avg_ts"] == pytest.approx(4 * 8 * 1e9 / four["avg_ns"], rel=1e-3)
    assert four["gb_per_second"] is None


def test_csv_has_llama_benchs_columns(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-p", "4", "-n", "2", "-r", "1", "-t", "1", "-o", "csv"]
    assert cli.main(["bench", str(model), *options]) == 0
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == [n for n in LLAMA_BENCH if not n.startswith("samples")] + OURS
    prompt, made = (dict(zip(header, row, strict=True)) for row in rows)
    assert (prompt["n_prompt"], made["n_gen"], made["repack"]) == ("4", "2", "1")


def test_json_lines_are_one_object_a_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-p", "4,5", "-n", "2", "-r", "1", "-t", "1", "-o", "jsonl"]
    assert cli.main(["bench", str(model), *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["n_prompt"] for row in rows] == [4, 5, 0]


@pytest.mark.parametrize("output", ["table", "md"])
def test_people_get_a_table(output: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-p", "4", "-n", "2", "-b", "2", "-d", "16", "-r", "1", "-t", "1", "-o", output]
    assert cli.main(["bench", str(model), *options]) == 0
    shown = capsys.readouterr().out
    assert [name in shown for name in ("pp4@d16", "tg2@d16", "tg2x2@d16")] == [True] * 3
    assert ("Memory reads" in shown) == (output == "table")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-p", "4", "-n", "999999"], "tg999999: 999999 tokens; the model's context is 256"),
        (
            ["-p", "4", "-d", "250", "-n", "8"],
            "tg8@d250: depth 250 and 8 tokens; the model's context is 256",
        ),
        (["-p", "0", "-n", "0"], "leave nothing to measure"),
        (["-p", "128,many"], "-p/--n-prompt: a whole number, not 'many'"),
        (["-p", "128,,256"], "-p/--n-prompt: a whole number, not ''"),
        (["-n", "-3"], "-n/--n-gen: 0 to 1048576, not -3"),
        (["-d", "1-9999"], "-d/--n-depth: 64 values at most"),
        (["-d", "4-8*1"], "4-8*1 never ends"),
        (["-d", "8-4"], "8-4 holds no number"),
        (["-b", "0"], "-b/--batch: 1 to 256, not 0"),
        (["-t", "0"], "-t/--threads: 1 to 1024, not 0"),
        (["-r", "0"], "-r/--repetitions: 1 to 1000, not 0"),
        (["-pg", "512"], "two numbers such as 512,128, not '512'"),
        (["-o", "xml"], "invalid choice: 'xml'"),
        (["--kv-type", "q4"], "--kv-type: invalid choice: 'q4'"),
        (["--layers", "0"], "--layers: 1 to 4096, not 0"),
        (["--layers", "most"], "--layers: a whole number, not 'most'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    options: list[str], says: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", str(model), *options]) == 2
    said = capsys.readouterr()
    assert says in said.err.splitlines()[0]
    assert len(said.err.splitlines()) <= 2
    assert said.out == ""


def test_unknown_kernels_are_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(model), "-p", "4", "-n", "0", "--isa", "nonsense"]) == 1
    assert "nonsense" in capsys.readouterr().err


def test_kv_that_does_not_fit_is_refused_with_its_bytes(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "share_bytes", lambda n_workers: 2**20)
    assert cli.main(["bench", str(model), "-p", "8", "-n", "8", "-d", "120", "-b", "64"]) == 1
    said = capsys.readouterr()
    # 64 sessions of 8 pages of 16 positions of 256 bytes.
    assert "the KV of 64 sessions of up to 128 positions takes 2.0 MiB" in said.err
    assert "1.0 MiB are free" in said.err
    assert said.out == ""


def test_the_first_layers_and_the_head_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = testing.write_tiny(tmp_path / "deep.gguf", testing.TinyShape(n_layers=6))
    (whole,) = bench(path, "-p", "4", "-n", "0", "-r", "1", capsys=capsys)
    (part,) = bench(path, "-p", "4", "-n", "0", "-r", "1", "--layers", "2", capsys=capsys)
    assert (whole["n_layers"], whole["model_n_layers"]) == (6, 6)
    assert (part["n_layers"], part["model_n_layers"]) == (2, 6)
    assert part["model_type"] == whole["model_type"] + ", 2 of 6 layers"
    file = gguf.read(path)
    gone = [t for t in file.tensors.values() if t.name.startswith(("blk.2", "blk.3", "blk.4"))]
    gone += [t for t in file.tensors.values() if t.name.startswith("blk.5")]
    assert whole["model_size"] - part["model_size"] == sum(t.size_bytes for t in gone)


def test_more_layers_than_there_are_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", str(model), "-p", "4", "-n", "0", "--layers", "3"]) == 2
    assert "--layers 3: tiny q4_0 1 has 2" in capsys.readouterr().err


def free_for(model: str, n_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that so many layers of a model and the test pp4 just fit into."""
    part = timing.subject_of(catalogue.open_model(model), n_layers=n_layers)
    tests = [measuring.Test.named("pp4")]
    needed = part.size_bytes + part.kv_bytes(tests) + part.buffer_bytes(tests)
    monkeypatch.setattr(memory, "share_bytes", lambda n_workers: needed)


def test_as_many_layers_of_a_synthetic_model_as_fit_are_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "synthetic:tiny-q4_k_m"
    free_for(name, 3, monkeypatch)
    line = ["bench", name, "-t", "1", "-p", "4", "-n", "0", "-r", "1", "--json"]
    assert cli.main(line) == 0
    said = capsys.readouterr()
    assert "3 of 4 layers fit into memory and are measured\n" in said.err
    (row,) = json.loads(said.out)
    assert (row["n_layers"], row["model_n_layers"]) == (3, 4)
    assert row["model_type"].startswith("llama ")
    assert row["model_type"].endswith(" Q4_K, 3 of 4 layers")
    assert row["model_filename"] == name
    assert cli.main([*line, "--layers", "4"]) == 1
    assert "take --layers 3: as many as fit" in capsys.readouterr().err


def test_files_are_measured_in_part_only_if_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = testing.write_tiny(tmp_path / "deep.gguf", testing.TinyShape(n_layers=6))
    free_for(str(path), 5, monkeypatch)
    line = ["bench", str(path), "-t", "1", "-p", "4", "-n", "0", "-r", "1", "--json"]
    assert cli.main(line) == 1
    assert "take --layers 5: as many as fit" in capsys.readouterr().err
    assert cli.main([*line, "--layers", "fit"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["n_layers"] == 5


def test_not_one_layer_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "share_bytes", lambda n_workers: 10_000)
    assert cli.main(["bench", "synthetic:tiny-q4_0", "-p", "4", "-n", "0"]) == 1
    said = capsys.readouterr().err
    assert "9.8 KiB are free" in said
    assert "--layers" not in said


def test_a_name_of_a_test_says_all_of_it() -> None:
    for name in ("pp512", "tg128", "pp512@d4096", "tg64x4@d4096", "pp16+tg4x2"):
        assert measuring.Test.named(name).name == name
    assert measuring.Test.named("tg32x1").name == "tg32"


@pytest.mark.parametrize("name", ["", "512", "pp", "pp0", "tg8x0", "tg8x257", "tg8 ", "@d9", "x4"])
def test_what_names_no_test_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        measuring.Test.named(name)


def test_each_session_has_room_for_its_longest_test() -> None:
    tests = [measuring.Test.named(name) for name in ("pp512", "tg8x3@d64", "tg16x2")]
    assert measuring.rooms(tests) == [512, 72, 72]
