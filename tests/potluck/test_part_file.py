"""A part file: what is on the disk is gone on from, and nothing of anybody is lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from potluck import part_file
from potluck.errors import ModelError
from potluck.part_file import PartFile


def begun(target: Path, data: bytes = b"first", identity: str = "a") -> None:
    """An interrupted writing."""
    with PartFile(target, identity) as part:
        part.begin()
        part.append(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_whole_file_has_its_name_and_nothing_beside_it(tmp_path: Path) -> None:
    with PartFile(tmp_path / "x", "a") as part:
        assert (part.done_bytes, part.discarded) == (0, False)
        part.begin()
        part.append(b"first ")
        part.append(memoryview(b"second"))
        assert names(tmp_path) == ["x.part", "x.part.json"]
        part.finish()
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"first second"


def test_an_interrupted_writing_goes_on_behind_its_last_append(tmp_path: Path) -> None:
    begun(tmp_path / "x")
    with PartFile(tmp_path / "x", "a") as part:
        assert part.done_bytes == 5
        part.begin()
        part.append(b" second")
        part.finish()
    assert (tmp_path / "x").read_bytes() == b"first second"


def test_a_killed_writer_loses_what_was_not_synced_and_no_more(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\n"
        "from potluck import part_file\n"
        "part = part_file.PartFile(pathlib.Path(sys.argv[1]), 'a')\n"
        "part.begin()\n"
        "part_file.SYNC_SECONDS = -1\n"
        "part.append(b'synced')\n"
        "part_file.SYNC_SECONDS = 1000\n"
        "part.append(b'lost')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x"], check=False)
    assert done.returncode == -9
    assert (tmp_path / "x.part").read_bytes() == b"syncedlost"
    with PartFile(tmp_path / "x", "a") as part:
        assert part.done_bytes == 6
        part.begin()
        assert (tmp_path / "x.part").read_bytes() == b"synced"


def test_bytes_of_something_else_are_begun_afresh(tmp_path: Path) -> None:
    begun(tmp_path / "x", identity="a")
    with PartFile(tmp_path / "x", "b") as part:
        assert (part.done_bytes, part.discarded) == (0, True)
        part.begin()
        part.append(b"b")
        part.finish()
    assert (tmp_path / "x").read_bytes() == b"b"


def test_until_begin_nothing_changes(tmp_path: Path) -> None:
    """A refusal for lack of room, say, must not cost what another command had done."""
    begun(tmp_path / "x", identity="a")
    for identity in ("b", "a"):
        with pytest.raises(ZeroDivisionError), PartFile(tmp_path / "x", identity):
            raise ZeroDivisionError
    with PartFile(tmp_path / "x", "a") as part:
        assert part.done_bytes == 5


def test_nothing_is_left_of_what_had_not_begun(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), PartFile(tmp_path / "x", "a"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "record", ["", "nonsense", "{}", '{"identity": "a", "done_bytes": 99}', "[]", "\xff"]
)
def test_a_record_that_says_nothing_true_is_begun_afresh(tmp_path: Path, record: str) -> None:
    begun(tmp_path / "x")
    (tmp_path / "x.part.json").write_bytes(record.encode("latin-1"))
    with PartFile(tmp_path / "x", "a") as part:
        assert (part.done_bytes, part.discarded) == (0, True)


def test_a_record_that_is_half_old_is_begun_afresh(tmp_path: Path) -> None:
    begun(tmp_path / "x")
    record = tmp_path / "x.part.json"
    assert record.stat().st_size == part_file.RECORD_BYTES
    text = record.read_text()
    assert '"done_bytes": 5' in text
    record.write_text(text.replace('"done_bytes": 5', '"done_bytes": 4'))
    with PartFile(tmp_path / "x", "a") as part:
        assert (part.done_bytes, part.discarded) == (0, True)


def test_a_strangers_part_file_is_left_alone(tmp_path: Path) -> None:
    stranger = tmp_path / "x.part"
    stranger.write_bytes(b"of a browser")
    with pytest.raises(ModelError, match="nothing says that potluck began it") as refusal:
        PartFile(tmp_path / "x", "a")
    assert "move it away" in refusal.value.remedy
    assert stranger.read_bytes() == b"of a browser"
    with PartFile(tmp_path / "x", "a", force=True) as part:
        part.begin()
        part.finish()
    assert (tmp_path / "x").read_bytes() == b""


def test_a_file_that_is_there_is_not_written_over_unless_told_so(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"dear")
    with pytest.raises(ModelError, match="exists already") as refusal:
        PartFile(target, "a")
    assert "--force" in refusal.value.remedy
    assert names(tmp_path) == ["x"]
    with PartFile(target, "a", force=True) as part:
        part.begin()
        part.append(b"new")
        assert target.read_bytes() == b"dear"
        part.finish()
    assert target.read_bytes() == b"new"


def test_a_device_or_pipe_keeps_its_place_whatever_force_says(tmp_path: Path) -> None:
    """As root, a file in the place of /dev/null would break the machine."""
    os.mkfifo(tmp_path / "x")
    with pytest.raises(ModelError, match="not a regular file"):
        PartFile(tmp_path / "x", "a", force=True)
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").is_fifo()


def test_a_file_that_appears_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with PartFile(target, "a") as part:
        part.begin()
        target.write_bytes(b"dear")
        with pytest.raises(ModelError, match="exists already"):
            part.finish()
    assert target.read_bytes() == b"dear"


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with PartFile(tmp_path / "x", "a") as part:
        part.begin()
        with pytest.raises(ModelError, match="another process is writing it"):
            PartFile(tmp_path / "x", "a")
        part.append(b"mine")
        part.finish()
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_a_lock_on_what_was_renamed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first writer ends between the second's opening and its locking."""
    target = tmp_path / "x"
    first = PartFile(target, "a")
    first.begin()
    first.append(b"first")
    real = os.fstat

    def late(descriptor: int) -> os.stat_result:
        monkeypatch.setattr(os, "fstat", real)
        first.finish()
        return real(descriptor)

    monkeypatch.setattr(os, "fstat", late)
    with pytest.raises(ModelError, match="exists already"):
        PartFile(target, "a")
    assert target.read_bytes() == b"first"


def test_a_full_disk_is_one_line_and_can_be_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def full(descriptor: int, data: memoryview) -> int:
        """Takes some of the bytes before it is full."""
        if len(data) > 3:
            return real(descriptor, data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with PartFile(tmp_path / "x", "a") as part:
        part.begin()
        part.append(b"first")
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(ModelError, match=r"can't write .*: No space left on device") as refusal:
            part.append(b"second")
        monkeypatch.undo()
    assert refusal.value.remedy == f"make room; {part_file.GO_ON}"
    assert names(tmp_path) == ["x.part", "x.part.json"]
    with PartFile(tmp_path / "x", "a") as part:
        assert part.done_bytes == 5
        part.begin()
        part.append(b"second")
        part.finish()
    assert (tmp_path / "x").read_bytes() == b"firstsecond"


def test_what_cannot_become_whole_goes(tmp_path: Path) -> None:
    with PartFile(tmp_path / "x", "a") as part:
        part.begin()
        part.append(b"first")
        part.abandon()
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_a_part_file_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    part, other = tmp_path / "x.part", tmp_path / "other"
    other.write_bytes(b"dear")
    if kind == "folder":
        part.mkdir()
    elif kind == "pipe":
        os.mkfifo(part)
    else:
        part.symlink_to(other)
    with pytest.raises(ModelError, match=r"x\.part"):
        PartFile(tmp_path / "x", "a", force=True)
    assert other.read_bytes() == b"dear"


def test_a_folder_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(ModelError, match="x: a folder"):
        PartFile(tmp_path / "x", "a", force=True)
