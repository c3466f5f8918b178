"""What a chat remembers: the messages and how answers are made. Pure; `/` commands change it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace

from potluck.cli import asking, values
from potluck.errors import UsageError
from potluck.replies import AnswerOptions, Message

HELP = """\
/set NAME VALUE   how answers are made, such as temperature 0.2; VALUE may be default
/set              what differs from the defaults
/system TEXT      what the model is told to be; without TEXT: nothing
/reset            forget the conversation
/help             this
/quit             leave (also Ctrl-D)"""


@dataclass
class Conversation:
    """The turns so far, oldest first, without the system message. For one task."""

    options: AnswerOptions = field(default_factory=AnswerOptions)
    system: str = ""
    turns: list[Message] = field(default_factory=list)

    def asked(self, text: str) -> list[Message]:
        """The messages to send with `text` as the newest. Nothing is remembered yet."""
        start = [Message("system", self.system)] if self.system else []
        return [*start, *self.turns, Message("user", text)]

    def answered(self, text: str, answer: str) -> None:
        """Remembers a turn; one that was stopped as far as it came, an empty one not at all."""
        if answer:
            self.turns += [Message("user", text), Message("assistant", answer)]

    def command(self, line: str) -> str:
        """Runs a `/` command other than /quit; what to tell. UsageError: unknown, out of range."""
        name, _, rest = line.partition(" ")
        match name:
            case "/set":
                return self._set(rest.split())
            case "/system":
                self.system = rest.strip()
                return "the model is told so" if self.system else "no system message"
            case "/reset":
                self.turns.clear()
                return "the conversation is forgotten"
            case "/help":
                return HELP
            case _:
                raise UsageError(f"unknown command {name}", remedy="/help lists them")

    def _set(self, words: list[str]) -> str:
        if not words:
            return self._settings()
        name = words[0].replace("-", "_")
        if name == "stop":
            texts = () if words[1:] == ["default"] else tuple(words[1:])
            self.options = replace(self.options, stop=tuple(values.stop_text(t) for t in texts))
        elif name not in asking.NUMBERS:
            known = ", ".join([*(n.replace("_", "-") for n in asking.NUMBERS), "stop"])
            raise UsageError(f"no setting {words[0]!r}", remedy=f"there are {known}")
        elif len(words) != 2:
            raise UsageError(f"/set {words[0]} takes one value")
        else:
            self._set_number(name, words[1])
        return self._settings()

    def _set_number(self, name: str, text: str) -> None:
        if text == "default":
            value = getattr(AnswerOptions(), name)
        else:
            try:
                value = asking.NUMBERS[name][0](text)
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"{name.replace('_', '-')}: {error}") from None
        self.options = replace(self.options, **{name: value})

    def _settings(self) -> str:
        """What differs from the defaults."""
        plain = AnswerOptions()
        changed = [
            f"{name.replace('_', '-')} {getattr(self.options, name)}"
            for name in asking.NUMBERS
            if getattr(self.options, name) != getattr(plain, name)
        ]
        if self.options.stop:
            changed.append("stop " + " ".join(repr(t) for t in self.options.stop))
        return ", ".join(changed) or "all settings are the defaults"
