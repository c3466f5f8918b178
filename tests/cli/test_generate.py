"""`potluck generate`: text as it comes, one object with --json, Ctrl-C."""

from __future__ import annotations

import io
import json
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from potluck.cli import command_line as cli
from potluck.rpc.v1 import inference_pb2

if TYPE_CHECKING:
    from tests.cli.conftest import FakeService


def asked(service: FakeService) -> inference_pb2.GenerateRequest:
    request = service.asked[-1]
    assert isinstance(request, inference_pb2.GenerateRequest)
    return request


def test_stdout_is_the_answer_and_nothing_else(
    service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "Where?", "--connect", service.address]) == 0
    said = capsys.readouterr()
    assert said.out == "Paris is a city.\n"
    assert said.err == ""
    assert asked(service).text == "Where?"


def test_json_is_one_object_with_the_names_people_know(
    service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["generate", "x", "--connect", service.address, "--json", "--logprobs", "1"]
    assert cli.main(line) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["text"] == "Paris is a city."
    assert report["tokens"] == [10, 11, 12, 13, 14]
    assert report["logprobs"][1] == {
        "token": 11,
        "logprob": -1.0,
        "top": [{"token": 11, "logprob": -1.0}],
    }
    assert report["finish_reason"] == "length"
    assert report["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
    assert report["timings"]["tokens_per_second"] == 2.0
    assert report["timings"]["prompt_tokens_per_second"] == 8.0
    assert report["seed"] == 7


def test_logprobs_are_null_unless_asked_for(
    service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "x", "--connect", service.address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["logprobs"] is None


def test_every_option_reaches_the_service(service: FakeService) -> None:
    line = (
        "generate x --max-tokens 9 --temperature 0.5 --top-k 40 --top-p 0.9 --min-p 0.1 "
        "--repetition-penalty 1.25 --presence-penalty -1 --frequency-penalty 2 --seed 42 "
        "--stop END --stop ## --model tiny"
    )
    assert cli.main([*line.split(), "--connect", service.address]) == 0
    options = asked(service).options
    assert (options.max_tokens, options.top_k, options.seed) == (9, 40, 42)
    assert (options.temperature, options.top_p, options.min_p) == (0.5, 0.9, 0.1)
    assert options.repetition_penalty == 1.25
    assert (options.presence_penalty, options.frequency_penalty) == (-1, 2)
    assert list(options.stop) == ["END", "##"]
    assert options.model == "tiny"


def test_greedy_is_told_from_unset(service: FakeService) -> None:
    assert cli.main(["generate", "x", "--connect", service.address]) == 0
    assert not asked(service).options.HasField("temperature")
    assert not asked(service).options.HasField("seed")
    assert cli.main(["generate", "x", "--temperature", "0", "--connect", service.address]) == 0
    assert asked(service).options.HasField("temperature")


def test_a_short_context_shortens_what_nobody_asked_for(
    service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.context_tokens = 64
    assert cli.main(["generate", "x", "--connect", service.address]) == 0
    assert capsys.readouterr().out == "Paris is a city.\n"
    asked_tokens = [request.options.max_tokens for request in service.asked]
    assert asked_tokens == [256, 0]
    assert cli.main(["generate", "x", "--max-tokens", "99", "--connect", service.address]) == 1
    assert "the context is 64" in capsys.readouterr().err


def test_a_dash_reads_the_prompt_from_stdin(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("žluť\n".encode())))
    assert cli.main(["generate", "-", "--connect", service.address]) == 0
    assert asked(service).text == "žluť\n"


def test_a_prompt_that_is_not_text_is_refused(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert cli.main(["generate", "-", "--connect", service.address]) == 2
    assert "not UTF-8: byte 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.OUT_OF_RANGE, 1),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 1),
        (grpc.StatusCode.UNAVAILABLE, 1),
        (grpc.StatusCode.NOT_FOUND, 1),
        (grpc.StatusCode.INTERNAL, 1),
    ],
)
def test_what_the_service_refuses_is_said_with_its_remedy(
    code: grpc.StatusCode,
    exit_code: int,
    service: FakeService,
    capsys: pytest.CaptureFixture[str],
) -> None:
    service.refuse = (code, "the queue is 12 long\ntry again later")
    assert cli.main(["generate", "x", "--connect", service.address]) == exit_code
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("potluck: error: ")
    assert first.endswith("the queue is 12 long")
    assert second == "  try again later"


def test_an_error_in_mid_answer_stands_below_what_came(
    service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.refuse = (grpc.StatusCode.UNAVAILABLE, "layers [0, 8) are unserved")
    service.refuse_after = 2
    assert cli.main(["generate", "x", "--connect", service.address]) == 1
    said = capsys.readouterr()
    assert said.out == "Paris is\n"
    assert "layers [0, 8) are unserved" in said.err


def test_nobody_at_the_address_says_what_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "x", "--connect", "127.0.0.1:1"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "potluck: error: nobody answers at 127.0.0.1:1"
    assert "potluck serve" in second


@pytest.mark.cluster
def test_ctrl_c_ends_the_answer_everywhere_with_130(
    service: FakeService, potluck: list[str]
) -> None:
    service.words = [" on"] * 1000
    service.pause_seconds = 0.02
    asker = subprocess.Popen(
        [*potluck, "generate", "x", "--connect", service.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert asker.stdout is not None
    assert asker.stdout.read(3) == b" on"
    asker.send_signal(signal.SIGINT)
    rest, said = asker.communicate(timeout=20)
    assert asker.returncode == 130
    assert rest.endswith(b"\n")
    assert said == b""
    assert service.cancelled.wait(5)
