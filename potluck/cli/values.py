"""Values of options: `type=` functions for argparse that check ranges and say them.

What is refused here ends with exit code 2 before anything runs.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable

from potluck.written_size import bytes_of


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A whole number of at least `low`, and at most `high` if there is one."""
    wanted = f"{low} to {high}" if high is not None else f"{low} or more"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"a whole number, not {text!r}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{wanted}, not {text}")
        return value

    return parse


MOST_VALUES = 64  # of one list: more would be a slip, such as 1-4096 without a step


def wholes(low: int, high: int) -> Callable[[str], list[int]]:
    """Whole numbers from `low` to `high` as llama-bench takes them: "128,512", "1-8*2", "0-90+30".

    A range without a step goes up by one.
    """
    one = whole(low, high)

    def part(text: str) -> list[int]:
        found = re.fullmatch(r"(\d+)-(\d+)(?:([+*])(\d+))?", text)
        if not found:
            return [one(text)]
        value, last, step = one(found[1]), one(found[2]), int(found[4] or 1)
        values: list[int] = []
        while value <= last and len(values) <= MOST_VALUES:
            values.append(value)
            following = value * step if found[3] == "*" else value + step
            if following <= value:
                raise argparse.ArgumentTypeError(f"{text} never ends")
            value = following
        if not values:
            raise argparse.ArgumentTypeError(f"{text} holds no number")
        return values

    def parse(text: str) -> list[int]:
        values = [value for piece in text.split(",") for value in part(piece)]
        if len(values) > MOST_VALUES:
            raise argparse.ArgumentTypeError(f"{MOST_VALUES} values at most, not {text}")
        return values

    return parse


def pair(low: int, high: int) -> Callable[[str], list[tuple[int, int]]]:
    """Two whole numbers with a comma between them; a list, to be used with Several."""
    one = whole(low, high)

    def parse(text: str) -> list[tuple[int, int]]:
        first, comma, second = text.partition(",")
        if not comma:
            raise argparse.ArgumentTypeError(f"two numbers such as 512,128, not {text!r}")
        return [(one(first), one(second))]

    return parse


class Several(argparse.Action):
    """An option whose values are lists and which may be given again: all of them, in order."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002  argparse fixes the signature
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,  # noqa: ARG002  argparse fixes the signature
    ) -> None:
        """Takes the place of the default, and follows what was given before."""
        assert isinstance(values, list)
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else [*before, *values])


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """A number from `low` (above it, if `above`) to `high`; never NaN or infinite."""
    wanted = f"above {low:g}, at most {high:g}" if above else f"{low:g} to {high:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"a number, not {text!r}") from None
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{wanted}, not {text}")
        return value

    return parse


def plain(text: str) -> str:
    """A text as it is. Bytes of the command line that are not UTF-8 come as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"not UTF-8 from character {error.start} on") from None
    return text


def stop_text(text: str) -> str:
    """A text that ends an answer: 1 to 128 bytes."""
    if not 1 <= len(plain(text).encode("utf-8")) <= 128:
        raise argparse.ArgumentTypeError("a text of 1 to 128 bytes")
    return text


def size_bytes(text: str) -> int:
    """Bytes: "500000000", "2 GiB", "1.5GB". Raises ArgumentTypeError."""
    try:
        return bytes_of(text)
    except ValueError as wrong:
        raise argparse.ArgumentTypeError(str(wrong)) from None


def from_environment(name: str) -> str | None:
    """POTLUCK_<name>, as an option's default: argparse takes it through the option's `type=`."""
    return os.environ.get(f"POTLUCK_{name}") or None
