"""`potluck convert`: what people see, and that nothing but a whole file gets the final name."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from potluck import cli, gguf
from potluck.cli import writing
from potluck.model import config_of
from potluck.testing import write_hugging_face, write_meta, write_tiny
from potluck.testing.checkpoints import CUT_IN_8
from potluck.testing.torch_file import write_torch

SHAPE = CUT_IN_8
# Its files are larger than the disk of a test that fills it.
LARGE = replace(SHAPE, dim=512, head_dim=64, ffn_dim=1024, n_layers=4)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_meta(tmp_path / "65B", SHAPE, n_shards=8, tokenizer_above=True)


def sums(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_a_checkpoint_becomes_a_model_and_the_next_command_is_said(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my model.gguf"
    assert cli.main(["convert", str(checkpoint), str(out), "--type", "f16"]) == 0
    said = capsys.readouterr()
    assert config_of(gguf.read(out)).context_tokens == 2048
    assert gguf.read(out).text("general.name") == "LLaMA 65B"
    assert "note: params.json does not say the context's length" in said.err
    assert re.search(r"will take 3\d\d\.\d kB as f16; the disk has \d.* free", said.err)
    assert re.search(r"^file   .*my model\.gguf \(3\d\d\.\d kB\)$", said.out, re.M)
    assert re.search(r"^types  f16 .* kB, f32 .* kB, in 21 tensors$", said.out, re.M)
    assert "chat   no template in it" in said.out
    assert f"next   potluck serve '{out}'" in said.out
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_json_is_one_object_and_options_reach_the_file(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.gguf"
    options = ["--type", "F32", "--context", "333", "--name", "Bread", "--threads", "1", "--json"]
    assert cli.main(["convert", str(checkpoint), str(out), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(out)
    assert found["size_bytes"] == out.stat().st_size
    assert (found["n_tensors"], found["notes"], list(found["types"])) == (21, [], ["f32"])
    assert found["has_chat_template"] is False
    file = gguf.read(out)
    assert (config_of(file).context_tokens, file.text("general.name")) == (333, "Bread")


@pytest.mark.parametrize("kind", ["meta", "hugging face", "gguf"])
def test_every_kind_of_source_gives_the_same_weights(tmp_path: Path, kind: str) -> None:
    if kind == "meta":
        source = write_meta(tmp_path / "m", SHAPE, n_shards=2)
    elif kind == "hugging face":
        source = write_hugging_face(tmp_path / "m", SHAPE)
    else:
        source = write_tiny(tmp_path / "tiny.gguf", SHAPE)
    out, tiny = tmp_path / "x.gguf", write_tiny(tmp_path / "y.gguf", SHAPE)
    assert cli.main(["convert", str(source), str(out), "--type", "f16"]) == 0
    found, expected = gguf.read(out), gguf.read(tiny)
    assert list(found.tensors) == list(expected.tensors)
    for name, tensor in found.tensors.items():
        if len(tensor.shape) > 1:  # norms went through f16
            a, b = (
                f.path.read_bytes()[f.tensors[name].offset_bytes :][: tensor.size_bytes]
                for f in (found, expected)
            )
            assert a == b, name


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 1) -> list[str]:
    """The lines of the error."""
    assert cli.main(arguments) == code
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("potluck: error: "))
    assert len(lines) - first <= 2
    return lines[first:]


def test_a_pickle_that_calls_is_refused_and_does_not_run(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = tmp_path / "canary"
    evil = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    write_torch(checkpoint / "consolidated.03.pth", [], pickled=evil)
    before = sums(checkpoint)
    lines = failing(["convert", str(checkpoint), str(tmp_path / "x.gguf"), "--type", "f16"], capsys)
    assert lines[0] == "potluck: error: refusing posix.system in consolidated.03.pth"
    assert not canary.exists()
    assert sums(checkpoint) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["65B", "tokenizer.model"]


def test_a_missing_file_a_wrong_type_and_nothing_at_all_are_one_line(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "x.gguf")
    (checkpoint / "consolidated.05.pth").unlink()
    lines = failing(["convert", str(checkpoint), out, "--type", "f16"], capsys)
    assert lines[0].endswith("65B: 7 of 8 files, consolidated.05.pth is missing")
    lines = failing(["convert", str(checkpoint), out, "--type", "q9"], capsys, code=2)
    assert "'q9'" in lines[0]
    assert "q4_0" in lines[1]
    lines = failing(["convert", str(tmp_path / "nowhere"), out, "--type", "f16"], capsys)
    assert lines[0].endswith("nowhere: no such file or folder")
    assert "consolidated.00.pth" in lines[1]
    lines = failing(["convert", str(checkpoint), out], capsys, code=2)
    assert lines[0] == "potluck: error: --type is missing"
    assert not Path(out).exists()


def test_what_is_there_is_written_over_only_if_told_so(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.gguf"
    out.write_bytes(b"mine")
    command = ["convert", str(checkpoint), str(out), "--type", "f16"]
    assert "exists already" in failing(command, capsys)[0]
    assert out.read_bytes() == b"mine"
    assert cli.main([*command, "--force"]) == 0
    gguf.read(out)
    capsys.readouterr()
    # Never over its own input.
    shard = checkpoint / "consolidated.02.pth"
    before = sums(checkpoint)
    command = ["convert", str(checkpoint), str(shard), "--type", "f16", "--force"]
    assert "is the input" in failing(command, capsys)[0]
    assert sums(checkpoint) == before


def test_a_full_disk_in_the_middle_leaves_no_file_of_that_name_and_can_be_gone_on_from(
    tmp_path: Path, potluck: list[str]
) -> None:
    """A limit on a file's size stands for the full disk: the system refuses in the same call."""
    source = write_meta(tmp_path / "m", LARGE, n_shards=2)
    before = sums(source)
    out = tmp_path / "x.gguf"
    limited = (
        "import resource, sys, potluck.cli;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000));"
        "sys.exit(potluck.cli.main())"
    )
    command = ["convert", str(source), str(out), "--type", "f16"]
    done = subprocess.run(
        [*potluck[:2], limited, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "potluck: error: can't write" in done.stderr
    assert "make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert sums(source) == before
    done = subprocess.run([*potluck, *command], capture_output=True, text=True, check=True)
    assert "going on after" in done.stderr
    again = tmp_path / "y.gguf"
    assert cli.main(["convert", str(source), str(again), "--type", "f16"]) == 0
    assert out.read_bytes() == again.read_bytes()
    assert sums(source) == before


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "write_model", stopped)
    command = ["convert", str(checkpoint), str(tmp_path / "x.gguf"), "--type", "f16"]
    assert cli.main(command) == 130
    said = capsys.readouterr()
    assert said.out == ""
    assert "stopped; the same command again goes on" in said.err
