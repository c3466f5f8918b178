"""argparse with our manners: errors are UsageError, nothing is abbreviated."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from potluck.errors import UsageError
from potluck.near_words import nearest


class Parser(argparse.ArgumentParser):
    """The parser of one command. No abbreviations: a new option would change their meaning."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises UsageError instead of printing the usage and leaving."""
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            message = f"{missing} is missing"
        message = message.removeprefix("argument ")  # "argument --top-p: ..."
        raise UsageError(message, remedy=f"see `{self.prog} --help`")

    def option_strings(self) -> list[str]:
        """Every option as it is typed."""
        return [option for action in self._actions for option in action.option_strings]

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """As parse_args, but an unknown option is named with the nearest known one."""
        args, unknown = self.parse_known_args(arguments)
        if not unknown:
            return args
        name = unknown[0].partition("=")[0]
        if name.startswith("-"):
            self.error(f"unknown option {name}{nearest(name, self.option_strings())}")
        return self.error(f"{unknown[0]!r} is one argument too many")
