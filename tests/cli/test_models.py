"""The commands about models: pull, list, show, rm and tokenize, on tiny files and no network."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.config import ROWS_LIMIT
from coordinator.planner import plan_for, sizes_of
from coordinator.scheduler import rows_that_fit
from potluck import catalogue, cli, gguf, tokenizer
from potluck.cli.worker_memory import shares
from potluck.download import OnProgress, Progress
from potluck.errors import Unreachable
from potluck.model import KvType, config_of, kv_bytes_per_token
from potluck.plan import Span, WorkerId, WorkerInfo
from potluck.rpc import options
from potluck.testing import TinyShape, tiny_metadata, write_gguf, write_tiny


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache."""
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("POTLUCK_OFFLINE", "1")
    return tmp_path / "cache" / "models"


@pytest.fixture
def tiny(cache: Path) -> Path:
    """A model called `tiny`, put into the cache by hand."""
    (cache / "tiny").mkdir(parents=True)
    return write_tiny(cache / "tiny" / "tiny.gguf")


def document(capsys: pytest.CaptureFixture[str], *line: str) -> Any:
    """What a command prints with --json: one document, and nothing else."""
    assert cli.main([*line, "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return json.loads(said.out)


def test_list_shows_what_is_here_and_what_can_be_pulled(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["list"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "size", "where", "what"]
    assert rows[0].startswith("smollm2  98.4 MB  potluck pull smollm2  SmolLM2-135M-Instruct")
    assert rows[1].split()[0] == "tiny"
    assert "here" in rows[1]
    assert document(capsys, "list")[1] == {
        "name": "tiny",
        "is_here": True,
        "size_bytes": tiny.stat().st_size,
        "path": str(tiny),
        "about": "",
    }


def test_show_tells_what_serving_would_take(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = document(capsys, "show", "tiny")
    file = gguf.read(tiny)
    config = config_of(file)
    assert shown["architecture"] == "llama"
    assert shown["problem"] == ""
    assert shown["shape"]["n_layers"] == len(shown["shape"]["layer_bytes"]) == config.n_layers
    assert shown["shape"]["kv_bytes_per_token"] == kv_bytes_per_token(config, Span(0, 2))
    assert shown["weights_bytes"] == sum(shown["types"].values())
    assert shown["weights_bytes"] == sum(t.size_bytes for t in file.tensors.values())
    assert shown["n_tokens"] == config.vocab
    assert cli.main(["show", str(tiny)]) == 0
    said = capsys.readouterr().out
    for words in (
        "context        256 tokens",
        "layers         2 of",
        "a token",
        "q4_0",
        "421 tokens",
    ):
        assert words in said


def test_show_tells_what_equal_workers_hold(capsys: pytest.CaptureFixture[str]) -> None:
    line = ("show", "synthetic:65b-q4_0")
    assert cli.main(list(line)) == 0
    said = capsys.readouterr().out
    for words in (
        "file           none: random weights, in a file 36.8 GB",
        "layers         80 of 434.3 MiB",
        "2.5 MiB a token",
        "Memory of equal workers, one session of 2,048 tokens, KV f16",
    ):
        assert words in said
    held = document(capsys, *line, "--context", "1000", "--kv-type", "q8")["memory"]
    assert (held["context_tokens"], held["kv_type"]) == (1000, "q8")
    assert list(held["workers"]) == ["1", "2", "3", "4", "8"]
    for n, each in held["workers"].items():
        assert len(each) == int(n)
        assert sum(share["n_layers"] for share in each) == 80
        kv = sum(share["kv_bytes"] for share in each)
        assert kv == 1008 * 2 * 80 * 64 * 132  # whole pages of 16


@pytest.mark.parametrize("model", ["synthetic:65b-q4_0", "synthetic:8b-q4_k_m", "tied"])
@pytest.mark.parametrize("n_workers", [1, 2, 3, 4, 8])
def test_shares_of_equal_workers_are_those_of_the_planner(
    model: str, n_workers: int, tmp_path: Path
) -> None:
    if model == "tied":
        write_tiny(tmp_path / "t.gguf", TinyShape(n_layers=9, tied=True))
        model = str(tmp_path / "t.gguf")
    file = catalogue.open_model(model)
    config = config_of(file)
    held = shares(file, config, n_workers, 200, KvType.Q8)
    fit = rows_that_fit(config.dim, options.MESSAGE_BYTES - options.ENVELOPE_BYTES)
    sizes = sizes_of(file, config, min(ROWS_LIMIT, fit), KvType.Q8)
    workers = [
        WorkerInfo(WorkerId(f"w{i}"), f"127.0.0.1:{i + 1}", "scalar", 1, 2**40, 2**40, 1e10)
        for i in range(n_workers)
    ]
    plan = plan_for(sizes, workers, 200, 1)
    assert [s.n_layers for s in held] == [stage.span.n_layers for stage in plan.stages]
    assert [s.memory_bytes for s in held] == [stage.memory_bytes for stage in plan.stages]
    assert [s.kv_bytes for s in held] == [stage.kv_bytes for stage in plan.stages]


@pytest.mark.parametrize(
    ("options_", "says"),
    [
        (["--workers", "5"], "--workers 5: each needs one of 4 layers"),
        (["--context", "4096"], "--context 4096: the model's is 2048"),
        (["--context", "0"], "1 or more, not 0"),
    ],
)
def test_show_refuses_what_the_model_has_not(
    options_: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["show", "synthetic:tiny-q4_0", *options_]) == 2
    assert says in capsys.readouterr().err


def test_show_of_some_workers_has_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "synthetic:tiny-q4_0", "--workers", "3"]) == 0
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert rows[0].split() == ["worker", "layers", "weights", "KV", "memory"]
    assert [row.split()[:2] for row in rows[1:]] == [["1", "2"], ["2", "1"], ["3", "1"]]


def test_synthetic_models_are_listed_and_not_pulled(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    assert "need no file: synthetic:65b-q4_0 (tiny, 1b, 7b," in capsys.readouterr().err
    for command in ("pull", "rm"):
        assert cli.main([command, "synthetic:7b-q4_0"]) == 2
        said = capsys.readouterr()
        assert "'synthetic:7b-q4_0' has no file" in said.err
        assert len(said.err.splitlines()) == 2


def test_show_says_why_a_model_cannot_be_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = dict(tiny_metadata(TinyShape())) | {"general.architecture": "mamba"}
    path = write_gguf(tmp_path / "m.gguf", list(metadata.items()), [])
    assert cli.main(["show", str(path)]) == 0
    assert "not servable   architecture" in capsys.readouterr().out
    assert document(capsys, "show", str(path))["shape"] is None


def test_show_sends_no_escape_sequence_of_a_file_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = dict(tiny_metadata(TinyShape())) | {"general.name": "\x1b[31mred\x1b]0;title\x07\n"}
    path = write_gguf(tmp_path / "m.gguf", list(metadata.items()), [])
    assert cli.main(["show", str(path)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\ufffd[31mred\ufffd]0;title\ufffd\ufffd\n" in said


@pytest.mark.parametrize("vocabulary", ["bpe", "spm"])
def test_tokenize_prints_the_ids(
    vocabulary: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tiny(tmp_path / "t.gguf", TinyShape(vocabulary=vocabulary))
    expected = tokenizer.load(gguf.read(path)).encode("hello <s>", add_start=True)
    assert document(capsys, "tokenize", str(path), "hello <s>") == {"tokens": expected}
    assert cli.main(["tokenize", str(path), "hello <s>"]) == 0
    assert capsys.readouterr().out == " ".join(map(str, expected)) + "\n"


def test_tokenize_works_on_a_vocabulary_alone_whatever_the_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = {k: v for k, v in tiny_metadata(TinyShape(vocabulary="spm")) if "tokenizer" in k}
    metadata["general.architecture"] = "whatever"
    path = write_gguf(tmp_path / "v.gguf", list(metadata.items()), [])
    with_start = document(capsys, "tokenize", str(path), "hi")["tokens"]
    without = document(capsys, "tokenize", str(path), "hi", "--no-bos")["tokens"]
    assert with_start[1:] == without
    assert without


def test_tokenize_reads_stdin_for_a_dash(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "naïve\n\n日本 "
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    from_stdin = document(capsys, "tokenize", "tiny", "-")
    assert from_stdin == document(capsys, "tokenize", "tiny", text)


def test_tokenize_refuses_what_is_not_utf_8(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert cli.main(["tokenize", "tiny", "-"]) == 2
    assert "the text is not UTF-8: byte 2" in capsys.readouterr().err
    assert cli.main(["tokenize", "tiny", "a\udcff"]) == 2
    assert "the text is not UTF-8: byte 1" in capsys.readouterr().err


def test_rm_deletes_the_model_and_says_how_much_is_free_again(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size_bytes = tiny.stat().st_size
    assert document(capsys, "rm", "tiny") == {"name": "tiny", "freed_bytes": size_bytes}
    assert not tiny.exists()
    assert cli.main(["rm", "tiny"]) == 1
    assert "tiny is not on this machine" in capsys.readouterr().err


def test_pull_prints_the_path_alone_on_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny(tmp_path / "t.gguf")

    def pulled(name: str, on_progress: OnProgress) -> Path:
        for done in range(0, 101, 20):
            on_progress(Progress("downloading", done, 100))
        on_progress(Progress("checking", 0, 0))
        return path

    monkeypatch.setattr(catalogue, "pull", pulled)
    assert cli.main(["pull", "tiny"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{path}\n"
    assert "tiny: downloading" in said.err
    assert "tiny: checking" in said.err
    assert cli.main(["pull", "tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"name": "tiny", "path": str(path), "size_bytes": path.stat().st_size}


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (["pull", "../x"], 2, "'../x' is not a model name"),
        (["pull", "x" * 300], 2, "is not a model name"),
        (["pull", "nope"], 1, "no model is called nope"),
        (["pull", "smollm2"], 2, "POTLUCK_OFFLINE"),
        (["rm", "/etc/x"], 2, "'/etc/x' is not a model name"),
        (["show", "nope"], 1, "no model is called nope"),
        (["show", "./nope.gguf"], 1, "no such file"),
        (["show", "tests"], 1, "'tests': a folder, not a model file"),
        (["show", "./tests"], 1, "`potluck convert --help`"),
        (["show", "smollm2"], 1, "smollm2 is not on this machine yet\n  potluck pull smollm2"),
        (["tokenize", "smollm2", "x"], 1, "smollm2 is not on this machine yet"),
        (["tokenize", "/dev/null", "x"], 1, "/dev/null"),
        (["tokenize", "x"], 2, "TEXT is missing"),
    ],
)
def test_what_goes_wrong_is_one_line_and_what_to_do(
    line: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err
    assert said.err.startswith("potluck: error: ")
    assert said.err.count("\n") <= 2


def test_a_network_that_fails_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str, on_progress: OnProgress) -> Path:
        raise Unreachable("http://127.0.0.1:9/simple: refused", remedy="is the network up?")

    monkeypatch.setattr(catalogue, "pull", unreachable)
    assert cli.main(["pull", "smollm2"]) == 1
    assert capsys.readouterr().err.endswith("refused\n  is the network up?\n")
