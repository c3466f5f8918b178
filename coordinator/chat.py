"""What a conversation looks like as a prompt: checks messages, keeps content apart from template.

Built-in templates are data (`BUILT_IN`) and need no engine. A model's own Jinja template is
rendered elsewhere (templates.py) with a placeholder in each content's place, and the contents are
put in here: so the prompt's parts say which text the template wrote and which a person, and only
the template's special tokens count (Tokenizer.encode_template). Pure.

The price: a template sees no content. White space around it is shown to the template, which may
trim it; a template that searches for words in contents finds none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from potluck.errors import UsageError

MESSAGES_LIMIT = 1000
OUTPUT_LIMIT = 1 << 20  # letters that a template may add to the contents
ROLES = ("system", "user", "assistant")
Part = tuple[str, bool]  # text, whether the template wrote it

# Letters of the private use area: no template's filter changes them, no vocabulary has them.
_PLACEHOLDER = re.compile("\ue000([0-9]{1,4})\ue001")
_SLOT = re.compile(r"\{(start|end|content|trimmed|system)\}")
# How Alpaca's instructions bring what they are about.
_INPUT = "\n\n### Input:\n"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A template by name: a pattern a role, filled in and joined.

    {content} is the message's, {trimmed} the same without white space around it; {start} and {end}
    are the model's tokens. {system} in `user`: a system message stands inside the user's that
    follows it, else it has a turn of its own.
    """

    system: str
    user: str
    assistant: str
    reply: str  # what the model's answer continues
    opening: str = ""
    default_system: str = ""  # where the conversation brings none
    input_system: str = ""  # and its first message has an input, as Alpaca's may

    @property
    def folds_system(self) -> bool:
        """Whether system messages have no turn of their own."""
        return "{system}" in self.user


# Sources, in this order: stanford_alpaca's train.py (whose examples have one turn); FastChat's
# conversation vicuna_v1.1; llama's generation.py; llama3's tokenizer.py; OpenAI's ChatML;
# Mistral-7B-Instruct's model card.
BUILT_IN: Mapping[str, BuiltIn] = MappingProxyType(
    {
        "alpaca": BuiltIn(
            opening="{start}",
            default_system=(
                "Below is an instruction that describes a task."
                " Write a response that appropriately completes the request."
            ),
            input_system=(
                "Below is an instruction that describes a task, paired with an input that provides"
                " further context. Write a response that appropriately completes the request."
            ),
            system="{content}\n\n",
            user="### Instruction:\n{content}\n\n",
            assistant="### Response:{content}{end}\n\n",
            reply="### Response:",
        ),
        "vicuna": BuiltIn(
            opening="{start}",
            default_system=(
                "A chat between a curious user and an artificial intelligence assistant. The"
                " assistant gives helpful, detailed, and polite answers to the user's questions."
            ),
            system="{content} ",
            user="USER: {content} ",
            assistant="ASSISTANT: {content}{end}",
            reply="ASSISTANT:",
        ),
        "llama-2": BuiltIn(
            system="<<SYS>>\n{content}\n<</SYS>>\n\n",
            user="{start}[INST] {system}{trimmed} [/INST]",
            assistant=" {trimmed} {end}",
            reply="",
        ),
        "llama-3": BuiltIn(
            opening="{start}",
            system="<|start_header_id|>system<|end_header_id|>\n\n{trimmed}<|eot_id|>",
            user="<|start_header_id|>user<|end_header_id|>\n\n{trimmed}<|eot_id|>",
            assistant="<|start_header_id|>assistant<|end_header_id|>\n\n{trimmed}<|eot_id|>",
            reply="<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        "chatml": BuiltIn(
            system="<|im_start|>system\n{content}<|im_end|>\n",
            user="<|im_start|>user\n{content}<|im_end|>\n",
            assistant="<|im_start|>assistant\n{content}<|im_end|>\n",
            reply="<|im_start|>assistant\n",
        ),
        "mistral": BuiltIn(
            opening="{start}",
            system="{content}\n\n",
            user="[INST] {system}{content} [/INST]",
            assistant=" {content}{end}",
            reply="",
        ),
    }
)


def built_in(name: str) -> BuiltIn:
    """The template called `name`. Raises UsageError with the names there are."""
    if name not in BUILT_IN:
        raise UsageError(f"--chat-template {name}: one of {', '.join(BUILT_IN)}")
    return BUILT_IN[name]


def checked(messages: Sequence[Message]) -> tuple[Message, ...]:
    """`messages` if they can be answered. Raises UsageError naming the field and its range."""
    if not 1 <= len(messages) <= MESSAGES_LIMIT:
        raise UsageError(f"messages: 1 to {MESSAGES_LIMIT:,}, not {len(messages):,}")
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            raise UsageError(f"messages[{i}].role: {', '.join(ROLES)}, not {message.role[:40]!r}")
        if message.role == "user" and not message.content:
            raise UsageError(f"messages[{i}].content: is empty; a user's message needs a text")
    if all(message.role != "user" for message in messages):
        raise UsageError("messages: none is from the user; at least one must be")
    return tuple(messages)


def fill(template: BuiltIn, messages: Sequence[Message], start: str, end: str) -> list[Part]:
    """The prompt's parts by a built-in template; `start` and `end` are the texts of the tokens.

    Raises UsageError if a system message has no user's message to stand in.
    """
    if messages[0].role != "system" and (system := _default_system(template, messages[0])):
        messages = [Message("system", system), *messages]
    tokens = {"start": [(start, True)], "end": [(end, True)]}
    parts = _filled(template.opening, tokens)
    folded: list[Part] = []
    for message in messages:
        pattern = {"system": template.system, "user": template.user}.get(
            message.role, template.assistant
        )
        # Behind a system message only the end is trimmed: the two are one text for LLaMA 2.
        trimmed = message.content.rstrip() if folded else message.content.strip()
        slots = {"content": [(message.content, False)], "trimmed": [(trimmed, False)]}
        slots |= tokens | {"system": folded}
        turn = _filled(pattern, slots)
        if message.role == "system" and template.folds_system:
            folded = [*folded, *turn]
            continue
        if message.role == "user":
            folded = []
        parts += turn
    if folded:
        raise UsageError("messages: this chat template needs a user's message after the system's")
    return parts + _filled(template.reply, tokens)


def with_placeholders(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages for a Jinja template: contents are placeholders between their own white space."""
    return [
        {"role": message.role, "content": _placeholder(i, message.content)}
        for i, message in enumerate(messages)
    ]


def parts_of(rendered: str, messages: Sequence[Message], template_name: str) -> list[Part]:
    """The prompt's parts from what a template made of `with_placeholders(messages)`.

    Raises UsageError if the last message is not in it, or if contents were repeated without end.
    """
    parts = list(_split(rendered, [message.content.strip() for message in messages]))
    last = messages[-1].content.strip()
    if last and (last, False) not in parts:
        raise UsageError(f"the chat template of {template_name} leaves out the last message")
    length = sum(len(text) for text, _ in parts)
    if length > OUTPUT_LIMIT + sum(len(message.content) for message in messages):
        raise UsageError(
            f"the chat template of {template_name} makes {length:,} letters of this conversation"
        )
    return parts


def _default_system(template: BuiltIn, first: Message) -> str:
    has_input = template.input_system and _INPUT in first.content
    return template.input_system if has_input else template.default_system


def _placeholder(index: int, content: str) -> str:
    core = content.strip()
    return content.replace(core, f"\ue000{index}\ue001", 1) if core else content


def _split(rendered: str, contents: Sequence[str]) -> Iterator[Part]:
    at = 0
    for match in _PLACEHOLDER.finditer(rendered):
        index = int(match[1])
        if index < len(contents):  # any other is the template's own text
            yield rendered[at : match.start()], True
            yield contents[index], False
            at = match.end()
    yield rendered[at:], True


def _filled(pattern: str, slots: Mapping[str, Sequence[Part]]) -> list[Part]:
    """`pattern` with its slots filled in; the rest of it is the template's text."""
    parts: list[Part] = []
    at = 0
    for match in _SLOT.finditer(pattern):
        parts += [(pattern[at : match.start()], True), *slots.get(match[1], ())]
        at = match.end()
    return [part for part in [*parts, (pattern[at:], True)] if part[0]]
