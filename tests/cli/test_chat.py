"""`potluck chat`: what it remembers, its commands, and Ctrl-C on a terminal."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pexpect  # type: ignore[import-untyped]  # publishes no types
import pytest

from potluck.cli.conversation import Conversation
from potluck.errors import UsageError
from potluck.replies import AnswerOptions, Message
from potluck.rpc.v1 import inference_pb2

if TYPE_CHECKING:
    from tests.cli.conftest import FakeService

PROMPT = ">[ \x08]"  # prompt_toolkit draws the blank by moving over it


def messages(service: FakeService, index: int) -> list[tuple[str, str]]:
    request = service.asked[index]
    assert isinstance(request, inference_pb2.ChatRequest)
    return [(m.role, m.content) for m in request.messages]


def test_a_conversation_sends_what_was_said_so_far() -> None:
    talk = Conversation(system="Be brief.")
    talk.answered("Hi", "Hello.")
    assert talk.asked("And?") == [
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello."),
        Message("user", "And?"),
    ]
    talk.command("/reset")
    talk.command("/system")
    assert talk.asked("x") == [Message("user", "x")]


def test_an_answer_that_never_began_is_not_remembered() -> None:
    talk = Conversation()
    talk.answered("Hi", "")
    assert talk.asked("x") == [Message("user", "x")]


def test_set_changes_how_answers_are_made_within_the_ranges() -> None:
    talk = Conversation()
    assert talk.command("/set") == "all settings are the defaults"
    assert talk.command("/set temperature 0.5") == "temperature 0.5"
    assert talk.command("/set top-k 40") == "temperature 0.5, top-k 40"
    talk.command("/set stop END ##")
    assert talk.options == AnswerOptions(temperature=0.5, top_k=40, stop=("END", "##"))
    talk.command("/set temperature default")
    talk.command("/set stop default")
    assert talk.options == AnswerOptions(top_k=40)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/set temperature 7", "temperature: 0 to 2, not 7"),
        ("/set colour red", "no setting 'colour'"),
        ("/set temperature", "/set temperature takes one value"),
        ("/sing", "unknown command /sing"),
    ],
)
def test_a_wrong_command_changes_nothing(line: str, says: str) -> None:
    talk = Conversation()
    with pytest.raises(UsageError) as raised:
        talk.command(line)
    assert raised.value.message == says
    assert talk == Conversation()


def ask(potluck: list[str], service: FakeService, *options: str, said: str = "") -> str:
    done = subprocess.run(
        [*potluck, "chat", "--connect", service.address, *options],
        input=said,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert "5 tokens, 2.0 tokens/s" in done.stderr
    return done.stdout


@pytest.mark.cluster
def test_from_a_pipe_each_line_is_a_message(service: FakeService, potluck: list[str]) -> None:
    out = ask(potluck, service, "--system", "Be brief.", said="Where?\n/set top-k 3\nAnd?\n")
    assert out == "Paris is a city.\nParis is a city.\n"
    assert messages(service, 1) == [
        ("system", "Be brief."),
        ("user", "Where?"),
        ("assistant", "Paris is a city."),
        ("user", "And?"),
    ]
    assert [request.options.top_k for request in service.asked] == [0, 3]


@pytest.mark.cluster
def test_from_a_file_too(service: FakeService, potluck: list[str], tmp_path: Path) -> None:
    script = tmp_path / "lines"
    script.write_text("Where?\n\n/quit\nnever\n")
    with script.open() as lines:
        subprocess.run(
            [*potluck, "chat", "--connect", service.address],
            stdin=lines,
            check=True,
            timeout=30,
            capture_output=True,
        )
    assert len(service.asked) == 1


@pytest.mark.cluster
def test_one_message_and_out(service: FakeService, potluck: list[str]) -> None:
    assert ask(potluck, service, "--message", "Where?") == "Paris is a city.\n"


@pytest.mark.cluster
def test_an_error_in_a_pipe_ends_it(service: FakeService, potluck: list[str]) -> None:
    service.refuse = (grpc.StatusCode.OUT_OF_RANGE, "9 tokens; the context is 8")
    done = subprocess.run(
        [*potluck, "chat", "--connect", service.address],
        input="x\ny\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("potluck: error: 9 tokens; the context is 8\n")
    assert len(service.asked) == 1


def on_terminal(potluck: list[str], service: FakeService) -> pexpect.spawn:
    # A plain terminal: prompt_toolkit then asks it nothing that no terminal is there to answer.
    environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "NO_COLOR": "1"}
    return pexpect.spawn(
        potluck[0],
        [*potluck[1:], "chat", "--connect", service.address],
        env=environment,
        timeout=20,
        encoding="utf-8",
        dimensions=(24, 80),
    )


@pytest.mark.cluster
def test_ctrl_c_stops_the_answer_and_not_the_program(
    service: FakeService, potluck: list[str]
) -> None:
    service.words = [" on"] * 1000
    service.pause_seconds = 0.02
    terminal = on_terminal(potluck, service)
    terminal.expect("tiny at ")
    terminal.expect(PROMPT)
    terminal.send("count\r")
    terminal.expect(" on on")
    terminal.sendintr()
    terminal.expect(r"\(stopped\)")
    assert service.cancelled.wait(5)
    terminal.expect(PROMPT)
    service.words, service.pause_seconds = ["fine"], 0.0
    terminal.send("again\r")
    terminal.expect("fine")
    terminal.expect("1 token, first after")
    terminal.expect(PROMPT)
    said = messages(service, 1)
    assert [role for role, _ in said] == ["user", "assistant", "user"]
    assert said[1][1].startswith(" on on")  # what the person saw of it is remembered
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


@pytest.mark.cluster
def test_on_a_terminal_an_error_ends_the_answer_only(
    service: FakeService, potluck: list[str]
) -> None:
    service.refuse = (grpc.StatusCode.OUT_OF_RANGE, "9 tokens; the context is 8")
    terminal = on_terminal(potluck, service)
    terminal.expect(PROMPT)
    terminal.send("first line\x1b\rsecond\r")  # Alt-Enter: a message of two lines
    terminal.expect("potluck: error: 9 tokens; the context is 8")
    terminal.expect("/reset forgets the conversation")
    assert messages(service, 0) == [("user", "first line\nsecond")]
    terminal.expect(PROMPT)
    terminal.sendintr()  # while typing: a new prompt
    terminal.expect(PROMPT)
    terminal.send("/quit\r")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
