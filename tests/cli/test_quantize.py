"""`potluck quantize`: what people see, and that wrong turns are said in two lines."""

from __future__ import annotations

import fcntl
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from potluck import cli, gguf
from potluck.model import config_of
from potluck.testing import TinyShape, write_tiny

SHAPE = TinyShape("f16", dim=256, n_layers=2, head_dim=64, ffn_dim=512)
POTLUCK = [sys.executable, "-c", "import sys, potluck.cli; sys.exit(potluck.cli.main())"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf", SHAPE)


def test_a_model_becomes_a_smaller_one_that_can_be_served(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.gguf"
    assert cli.main(["quantize", str(model), str(out), "--type", "Q4_K"]) == 0
    said = capsys.readouterr()
    assert re.search(r"small\.gguf will take .* kB as q4_k_m; the disk has \d.* free", said.err)
    assert re.search(r"^types  q4_k .* kB, q6_k .* kB, f32 .* kB, in 21 tensors$", said.out, re.M)
    assert f"next   potluck serve {out}" in said.out
    file = gguf.read(out)
    assert file.integer("general.file_type") == 15
    assert config_of(file) == config_of(gguf.read(model))
    assert file.size_bytes < model.stat().st_size / 3


def test_json_is_one_object(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.gguf"
    command = ["quantize", str(model), str(out), "--type", "q8_0", "--threads", "1", "--json"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(out)
    assert found["size_bytes"] == out.stat().st_size
    assert list(found["types"]) == ["q8_0", "f32"]


def test_quantizing_twice_is_noted(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once, twice = tmp_path / "once.gguf", tmp_path / "twice.gguf"
    assert cli.main(["quantize", str(model), str(once), "--type", "q8_0"]) == 0
    assert "precision" not in capsys.readouterr().err
    assert cli.main(["quantize", str(once), str(twice), "--type", "q4_0"]) == 0
    assert "q8_0 has lost precision before and loses more now" in capsys.readouterr().err


def test_a_synthetic_model_can_be_written(tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    assert cli.main(["quantize", "synthetic:tiny-f16", str(out), "--type", "q4_0"]) == 0
    assert gguf.read(out).text("general.architecture") == "llama"


@pytest.mark.parametrize(
    ("words", "code", "said", "remedy"),
    [
        (["IN", "new", "--type", "q3"], 2, "type 'q3' is unknown", "types: f32, f16"),
        (["IN", "new"], 2, "--type is missing", "potluck quantize --help"),
        (["nowhere.gguf", "new", "--type", "f16"], 1, "no such file", "potluck list"),
        (["IN", "IN", "--type", "f16"], 1, "is the input", "name another file"),
        (["IN", "IN", "--type", "f16", "--force"], 1, "is the input", "name another file"),
        (["IN", "old", "--type", "f16"], 1, "exists already", "--force writes over it"),
        (["IN", "no/new", "--type", "f16"], 1, "no: no such folder", "make it"),
        (["IN", ".", "--type", "f16"], 1, "a folder", "name a file in it"),
        (["old", "new", "--type", "f16"], 1, "not a GGUF file", ""),
        (["IN", "new", "--type", "f16", "--threads", "0"], 2, "--threads", ""),
    ],
)
def test_wrong_turns_are_two_lines_and_change_nothing(
    tmp_path: Path,
    model: Path,
    words: list[str],
    code: int,
    said: str,
    remedy: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old").write_bytes(b"an old file")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    command = [str(model) if word == "IN" else word for word in words]
    assert cli.main(["quantize", *command]) == code
    errors = capsys.readouterr().err
    assert said in errors
    assert remedy in errors
    assert errors.startswith("potluck: error: ")
    assert errors.count("\n") <= 2
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_model_in_use_by_another_command_is_refused(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, part = tmp_path / "x.gguf", tmp_path / "x.gguf.part"
    with part.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert cli.main(["quantize", str(model), str(out), "--type", "f32"]) == 1
    assert "x.gguf: another process is writing it" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_can_be_gone_on_from(tmp_path: Path, model: Path) -> None:
    """A limit on a file's size stands for the full disk: the system refuses in the same call."""
    before, out = model.read_bytes(), tmp_path / "x.gguf"
    limited = (
        "import resource, sys, potluck.cli;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000));"
        "sys.exit(potluck.cli.main())"
    )
    command = ["quantize", str(model), str(out), "--type", "f32"]
    done = subprocess.run(
        [sys.executable, "-c", limited, *command], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(r"^potluck: error: can't write .*x\.gguf\.part: ", done.stderr, re.M)
    assert "make room; the same command again goes on where it was" in done.stderr
    assert not out.exists()
    done = subprocess.run([*POTLUCK, *command], capture_output=True, text=True, check=True)
    assert "going on after the 1." in done.stderr
    again = tmp_path / "y.gguf"
    assert cli.main(["quantize", str(model), str(again), "--type", "f32"]) == 0
    assert out.read_bytes() == again.read_bytes()
    assert model.read_bytes() == before


def test_ctrl_c_keeps_what_was_done(tmp_path: Path, model: Path) -> None:
    """Interrupted by the signal itself, at the first progress that is told."""
    out = tmp_path / "x.gguf"
    interrupted = (
        "import os, signal, sys, potluck.cli\n"
        "from potluck.cli import writing\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "writing._Bar.show = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(potluck.cli.main())\n"
    )
    command = ["quantize", str(model), str(out), "--type", "f32"]
    done = subprocess.run(
        [sys.executable, "-c", interrupted, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert "stopped; the same command again goes on where it was" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert (tmp_path / "x.gguf.part").stat().st_size > 0
    assert cli.main(command) == 0
    assert config_of(gguf.read(out)).n_layers == 2
    assert [p.name for p in tmp_path.iterdir() if ".part" in p.name] == []
