"""Conversations as prompts: what the template wrote and what a person wrote stay apart."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from coordinator.chat import (
    BUILT_IN,
    OUTPUT_LIMIT,
    Message,
    built_in,
    checked,
    fill,
    parts_of,
    with_placeholders,
)
from potluck.errors import UsageError

USER = Message("user", "Hi.")
TALK = (
    Message("system", "Be kind."),
    USER,
    Message("assistant", "Hello!"),
    Message("user", "Bye."),
)


def prompt(name: str, *messages: Message) -> str:
    return "".join(text for text, _ in fill(built_in(name), messages, "<s>", "</s>"))


def rendered(messages: tuple[Message, ...], layout: str = "[{role}]{content}") -> str:
    return "".join(layout.format(**message) for message in with_placeholders(messages))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
            "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye.<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "llama-2",
            "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi. [/INST] Hello! </s>"
            "<s>[INST] Bye. [/INST]",
        ),
        (
            "llama-3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] Be kind.\n\nHi. [/INST] Hello!</s>[INST] Bye. [/INST]"),
        ("vicuna", "<s>Be kind. USER: Hi. ASSISTANT: Hello!</s>USER: Bye. ASSISTANT:"),
        (
            "alpaca",
            "<s>Be kind.\n\n### Instruction:\nHi.\n\n### Response:Hello!</s>\n\n"
            "### Instruction:\nBye.\n\n### Response:",
        ),
    ],
)
def test_a_built_in_template_makes_the_prompt_its_models_learned(name: str, expected: str) -> None:
    assert prompt(name, *TALK) == expected


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\nHi.\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "Add.\n\n### Input:\n1 2\n\n### Response:"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the user's questions. USER: Hi. ASSISTANT:"
)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("alpaca", "Hi.", f"<s>{ALPACA}"),
        ("alpaca", "Add.\n\n### Input:\n1 2", f"<s>{ALPACA_WITH_INPUT}"),
        ("vicuna", "Hi.", f"<s>{VICUNA}"),
        ("llama-2", " Hi.\n", "<s>[INST] Hi. [/INST]"),
        (
            "llama-3",
            "\nHi. ",
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("chatml", "Hi. ", "<|im_start|>user\nHi. <|im_end|>\n<|im_start|>assistant\n"),
        ("mistral", "Hi. ", "<s>[INST] Hi.  [/INST]"),
    ],
)
def test_one_question_is_written_exactly_as_the_source_writes_it(
    name: str, content: str, expected: str
) -> None:
    assert prompt(name, Message("user", content)) == expected


def test_llama_2_takes_a_system_message_and_a_question_as_one_text() -> None:
    talk = (
        Message("system", " Be kind. "),
        Message("user", "\n Hi. "),
        Message("assistant", " A "),
    )
    expected = "<s>[INST] <<SYS>>\n Be kind. \n<</SYS>>\n\n\n Hi. [/INST] A </s>"
    assert prompt("llama-2", *talk) == expected


def test_alpaca_and_vicuna_bring_their_own_system_message() -> None:
    assert prompt("alpaca", USER).startswith("<s>Below is an instruction that describes a task.")
    assert prompt("vicuna", USER).startswith("<s>A chat between a curious user and an artificial")
    assert prompt("vicuna", *TALK).count("A chat between") == 0


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_only_contents_are_marked_as_a_persons(name: str) -> None:
    parts = fill(built_in(name), TALK, "<s>", "</s>")
    assert [text for text, is_template in parts if not is_template] == [m.content for m in TALK]


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_content_that_looks_like_a_slot_is_content(name: str) -> None:
    message = Message("user", "{content} {start} {system}</s>")
    assert (message.content, False) in fill(built_in(name), [message], "<s>", "</s>")


def test_a_system_message_without_a_users_behind_it_is_refused_where_it_has_no_turn() -> None:
    messages = [USER, Message("system", "late")]
    with pytest.raises(UsageError, match="user's message after the system's"):
        prompt("llama-2", *messages)
    assert "late" in prompt("chatml", *messages)


def test_an_unknown_template_is_answered_with_the_names() -> None:
    with pytest.raises(UsageError, match="alpaca, vicuna, llama-2, llama-3, chatml, mistral"):
        built_in("nope")


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages: 1 to 1,000, not 0"),
        ([USER] * 1001, "messages: 1 to 1,000, not 1,001"),
        ([USER] * 100_000, "messages: 1 to 1,000, not 100,000"),
        ([Message("system", "x")], "none is from the user"),
        (
            [USER, Message("robot", "x")],
            r"messages\[1\].role: system, user, assistant, not 'robot'",
        ),
        ([Message("x" * 9999, "x")], r"messages\[0\].role"),
        ([USER, Message("user", "")], r"messages\[1\].content: is empty"),
    ],
)
def test_messages_that_cannot_be_answered_are_refused_by_field(
    messages: list[Message], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as refusal:
        checked(messages)
    assert len(refusal.value.message) < 200


def test_a_thousand_messages_are_fine() -> None:
    assert len(checked([USER] * 1000)) == 1000


def test_a_template_sees_no_content_but_the_white_space_around_it() -> None:
    shown = with_placeholders([Message("user", "  secret \n"), Message("assistant", " \n")])
    assert "secret" not in str(shown)
    assert (shown[0]["content"][:2], shown[0]["content"][-2:]) == ("  ", " \n")
    assert shown[1]["content"] == " \n"


@given(
    st.lists(st.text(max_size=12).filter(str.strip), min_size=1, max_size=6),
)
def test_contents_come_back_whole_and_in_order(contents: list[str]) -> None:
    messages = tuple(Message("user", content) for content in contents)
    parts = parts_of(rendered(messages), messages, "m")
    whole = "".join(text for text, _ in parts)
    assert whole == "".join(f"[user]{content}" for content in contents)
    assert [text for text, is_template in parts if not is_template] == [c.strip() for c in contents]


def test_content_that_spells_a_placeholder_is_content() -> None:
    messages = (Message("user", "\ue0001\ue001"), Message("user", "x"))
    parts = parts_of(rendered(messages), messages, "m")
    assert [text for text, is_template in parts if not is_template] == ["\ue0001\ue001", "x"]


def test_a_placeholder_that_the_template_invents_is_its_text() -> None:
    parts = parts_of("\ue0000\ue001 \ue0007\ue001", (USER,), "m")
    assert parts == [("", True), ("Hi.", False), (" \ue0007\ue001", True)]


def test_a_template_that_trims_gets_trimmed_content() -> None:
    messages = (Message("user", "  two  "),)
    text = with_placeholders(messages)[0]["content"].strip()
    assert parts_of(f"<{text}>", messages, "m") == [("<", True), ("two", False), (">", True)]


def test_a_template_that_leaves_out_the_last_message_is_refused() -> None:
    with pytest.raises(UsageError, match="chat template of m leaves out the last message"):
        parts_of("nothing", (USER,), "m")


def test_a_template_that_repeats_contents_without_end_is_refused() -> None:
    message = Message("user", "x" * 100_000)
    with pytest.raises(UsageError, match="makes 100,000,000 letters"):
        parts_of("\ue0000\ue001" * 1000, (message,), "m")
    assert OUTPUT_LIMIT == 1 << 20
