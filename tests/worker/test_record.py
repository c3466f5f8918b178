"""The file of measured figures: one process at a time, never in the way."""

from __future__ import annotations

import fcntl
import json
import threading
import time
from pathlib import Path

import pytest

from potluck.errors import Cancelled
from worker import record


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path))
    return tmp_path


def test_a_figure_is_known_until_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    with record.opened() as figures:
        assert figures.get("a", 60) is None
        figures.put("a", [1.5, {"b": 2}])
        assert figures.get("a", 60) == [1.5, {"b": 2}]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 59)
    with record.opened() as figures:
        assert figures.get("a", 60) == [1.5, {"b": 2}]
        assert figures.get("a", 58) is None


def test_figures_of_yesterday_leave_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with record.opened() as figures:
        figures.put("old", 1.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    with record.opened() as figures:
        figures.put("new", 2.0)
    assert list(json.loads((cache / record.FILE_NAME).read_text())) == ["new"]


def test_one_after_the_other_has_the_file() -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(i: int) -> None:
        with record.opened() as figures:
            inside.append(i)
            most.append(len(inside))
            time.sleep(0.01)
            figures.put(str(i), i)
            inside.remove(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6
    with record.opened() as figures:
        assert [figures.get(str(i), 60) for i in range(6)] == list(range(6))


def test_a_process_that_never_ends_its_turn_is_not_waited_for_for_ever(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "PATIENCE_SECONDS", 0.05)
    with (cache / record.FILE_NAME).open("a+", encoding="utf-8") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        with record.opened() as figures:
            figures.put("a", 1.0)
            assert figures.get("a", 60) is None  # measured for itself
        with pytest.raises(Cancelled), record.opened(lambda: True):
            pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": [1, "b"]}', "[" * 10**5, "\0"])
def test_a_damaged_file_holds_nothing_and_is_made_whole(cache: Path, text: str) -> None:
    (cache / record.FILE_NAME).write_text(text)
    with record.opened() as figures:
        assert figures.get("a", 60) is None
        figures.put("a", 1.0)
    with record.opened() as figures:
        assert figures.get("a", 60) == 1.0
