"""What every command has in common: help, errors in two lines, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from potluck.cli import command_line as cli
from potluck.cli import generate, status


@pytest.mark.parametrize("command", cli.command_names())
def test_every_command_has_help_and_a_line_about_itself(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--help"]) == 0
    assert f"usage: potluck {command}" in capsys.readouterr().out
    about = cli.summary_of(command)
    assert about
    assert "\n" not in about
    assert len(about) < 68  # it stands in one line of 80 columns


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert [c for c in cli.command_names() if f"\n  {c} " not in listed] == []
    assert max(len(line) for line in listed.splitlines()) <= 80


def test_nothing_is_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("usage: potluck COMMAND")


@pytest.mark.parametrize(
    ("line", "says", "does"),
    [
        (["genrate"], "unknown command 'genrate'; did you mean 'generate'?", "potluck --help"),
        (["--jsno"], "unknown option '--jsno'", "potluck --help"),
        (["generate"], "PROMPT is missing", "potluck generate --help"),
        (["generate", "x", "y"], "'y' is one argument too many", "potluck generate --help"),
        (["generate", "x", "--max-token", "3"], "unknown option --max-token; did you", "--help"),
        (["generate", "x", "--top-p", "2"], "--top-p: above 0, at most 1, not 2", "--help"),
        (["generate", "x", "--temperature", "nan"], "--temperature: 0 to 2, not nan", "--help"),
        (["generate", "x", "--seed", "-1"], "--seed: 0 to 9223372036854775807, not -1", "--help"),
        (["generate", "x", "--stop", ""], "--stop: a text of 1 to 128 bytes", "--help"),
        (["generate", "a\udcff"], "PROMPT: not UTF-8 from character 1 on", "--help"),
        (["generate", "x", "--logprobs", "2"], "--logprobs are printed with --json", "add --json"),
        (["generate", "x", "--connect", "a:99999"], "port 99999 is not between", ""),
        (["serve"], "MODEL is missing", "potluck serve --help"),
        (["serve", "x", "--context", "0"], "--context: 1 or more, not 0", "potluck serve --help"),
        (["serve", "x", "--memory", "12 gigs"], "--memory: bytes or a size such as", "--help"),
        (["bench", "x", "-p", "0", "-n", "0"], "leave nothing to measure", ""),
        (["join"], "HOST:PORT is missing", "potluck join --help"),
        (["completion", "tcsh"], "invalid choice: 'tcsh'", "potluck completion --help"),
    ],
)
def test_a_wrong_command_line_is_two_lines_and_exit_2(
    line: list[str], says: str, does: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line) == 2
    said = capsys.readouterr()
    assert said.out == ""
    first, _, second = said.err.partition("\n")
    assert first.startswith("potluck: error: ")
    assert says in first
    assert does in second
    assert said.err.count("\n") <= 2


def test_an_environment_value_is_checked_like_an_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POTLUCK_THREADS", "many")
    assert cli.main(["bench", "x"]) == 2
    assert "a whole number, not 'many'" in capsys.readouterr().err


def test_version_names_what_a_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["potluck", "protocol", "engine", "python", "platform"]


def test_a_defect_shows_no_traceback_and_goes_to_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own_folders: Path
) -> None:
    def broken(args: object) -> int:
        raise RuntimeError("the sky fell")

    monkeypatch.setattr(status, "run", broken)
    assert cli.main(["status"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("potluck: error: a defect in potluck: RuntimeError: the sky fell\n")
    assert "Traceback" not in said
    log = own_folders / "state" / "potluck" / "logs" / "potluck.log"
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("module", "remedy"),
    [("prompt_toolkit.history", "pip install 'potluck[server]'"), ("numpy", "--force-reinstall")],
)
def test_a_missing_package_says_what_to_type(
    module: str, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def needs(args: object) -> int:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(generate, "run", needs)
    assert cli.main(["generate", "x"]) == 1
    said = capsys.readouterr().err
    assert module.partition(".")[0] in said
    assert remedy in said.splitlines()[1]


def test_a_reader_that_had_enough_is_no_error_to_talk_about(potluck: list[str]) -> None:
    talker = subprocess.Popen(
        [*potluck, "completion", "bash"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert talker.stdout is not None
    talker.stdout.close()
    _, said = talker.communicate(timeout=30)
    assert (talker.returncode, said) == (1, "")


def test_one_command_loads_no_other(potluck: list[str]) -> None:
    code = (
        "import sys, potluck.cli\n"
        "potluck.cli.main(['generate', 'x', '--connect', 'a b/c'])\n"
        "print([m for m in ('grpc', 'numpy', 'rich', 'potluck.cli.chat') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_option(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in cli.command_names())
    assert "max-tokens" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
