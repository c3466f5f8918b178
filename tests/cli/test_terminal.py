"""Lines about waits, tables, and numbers as people read them."""

from __future__ import annotations

import io

import pytest

from potluck.cli import quantities, terminal, values
from potluck.cli.terminal import Line, Table


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")], ids=["NO_COLOR", "dumb"]
)
def test_people_who_want_no_colour_get_plain_lines(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.is_live(Screen())
    assert not terminal.is_live(io.StringIO())
    monkeypatch.setenv(name, value)
    assert not terminal.is_live(Screen())


def test_a_plain_board_speaks_when_a_state_changes_and_every_few_seconds() -> None:
    times = iter([0.0, 0.1, 4.0, 5.1, 5.2, 99.0])
    out = io.StringIO()
    board = terminal._PlainBoard(out, lambda: next(times))
    for state, done in [
        ("loading", 1),
        ("loading", 2),
        ("loading", 50),
        ("loading", 60),
        ("ready", 100),
        ("ready", 100),
    ]:
        board.show([Line("w1", state, done, 100)])
    assert out.getvalue().splitlines() == [
        "w1: loading 1%",
        "w1: loading 60%",
        "w1: ready 100%",
    ]


def test_a_live_board_draws_bars_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Screen()
    with terminal.board(screen) as board:
        board.show([Line("w1", "loading", 50, 100, "5 MB/s"), Line("w2", "ready")])
    drawn = screen.getvalue()
    assert "w1" in drawn
    assert "━" in drawn
    assert drawn.endswith("\x1b[2K")  # the last thing it does is to clear its line


def test_a_meter_says_how_far_how_fast_and_how_long() -> None:
    meter = terminal.Meter("smollm2", "downloading")
    assert meter.line(0, 100_000_000, now=0.0).note == "0 B of 100.0 MB"
    assert (
        meter.line(20_000_000, 100_000_000, now=2.0).note
        == "20.0 MB of 100.0 MB, 10.0 MB/s, 8.0 s left"
    )


def test_a_rate_follows_the_newest_seconds() -> None:
    rate = quantities.Rate()
    for second in range(10):
        rate.update(second * 10, float(second))
    assert rate.per_second == 10
    for second in range(10, 20):
        rate.update(90 + (second - 9) * 100, float(second))
    assert rate.per_second == 100
    assert rate.seconds_left(90 + 1000 + 500) == 5
    rate.update(0, 21.0)
    assert rate.per_second == 0
    assert rate.seconds_left(100) is None


def test_a_plain_table_is_aligned_and_has_no_trailing_blanks() -> None:
    table = Table(("worker", "ms"), (("w1", "2.34"), ("long-name", "12")), frozenset({"ms"}))
    assert terminal.plain_rows(table) == [
        "worker       ms",
        "w1         2.34",
        "long-name    12",
    ]


def test_numbers_read_as_people_say_them() -> None:
    assert quantities.size(98_300_000) == "98.3 MB"
    assert quantities.size(12) == "12 B"
    assert quantities.memory(2**31) == "2.0 GiB"
    assert quantities.duration(3.44) == "3.4 s"
    assert quantities.duration(52) == "0:52"
    assert quantities.duration(3800) == "1:03:20"
    assert quantities.milliseconds(0.00234) == "2.34"
    assert quantities.milliseconds(0.1234) == "123"
    assert quantities.count(1, "worker") == "1 worker"
    assert quantities.count(1024, "token") == "1,024 tokens"


def test_names_that_are_counted_are_joined() -> None:
    ids = ["hub", "pi-1", "pi-2", "pi-3", "pi-5", "x-9", "x-10", "y-2", "a1", "a2"]
    assert quantities.names(ids) == "hub, pi-1 to pi-3, pi-5, x-9 to x-10, y-2, a1, a2"
    assert quantities.names([]) == ""


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("500", 500), ("2 GiB", 2**31), ("1.5GB", 1_500_000_000), ("3k", 3000), ("1mib", 2**20)],
)
def test_a_size_may_have_a_unit(text: str, n_bytes: int) -> None:
    assert values.size_bytes(text) == n_bytes
