"""A base of logits: llama.cpp's format, written whole or not at all, and read with doubt."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from potluck.errors import ModelError
from potluck.logit_base import BaseFile, BaseShape, BaseWriter, encode
from potluck.perplexity import n_scored

VOCAB, WINDOW, N = 11, 8, 3  # an odd vocabulary: one code a row means nothing
ROWS = n_scored(WINDOW)


def tokens(vocab: int = VOCAB) -> np.ndarray:
    return (np.arange(N * WINDOW, dtype=np.int32) * 7 % vocab).reshape(N, WINDOW)


def logits(vocab: int = VOCAB, spread: float = 3.0) -> np.ndarray:
    """[N * ROWS, vocab]"""
    random = np.random.default_rng(5)
    found = random.normal(2.0, spread, (N * ROWS, vocab)).astype(np.float32)
    assert len(np.unique(found)) > vocab
    return found


def written(path: Path, values: np.ndarray) -> Path:
    with BaseWriter(path, tokens(), VOCAB) as writer:
        for start in range(0, len(values), 2):
            writer.write(values[start : start + 2])
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return written(tmp_path / "base.bin", logits())


def log_softmax(values: np.ndarray) -> np.ndarray:
    wide = values.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    out: np.ndarray = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return out


def plain_row(row: list[float]) -> bytes:
    """As the format's description says, one number after the other."""
    largest = max(row)
    least = max(min(row), largest - 16)
    log_sum = math.log(sum(math.exp(x - largest) for x in row))
    scale = np.float32(np.float32(largest) - np.float32(least)) / np.float32(65535)
    head = struct.pack("<2f", scale, least - largest - log_sum)
    codes = [round(max(0.0, x - least) / float(scale)) if scale else 0 for x in row]
    pad = [0] if len(row) % 2 else []
    return head + struct.pack(f"<{len(row) + len(pad)}H", *codes, *pad)


def test_the_file_is_laid_out_as_the_format_says(base: Path) -> None:
    raw = base.read_bytes()
    assert raw[:20] == b"_logits_" + struct.pack("<3i", WINDOW, VOCAB, N)
    assert raw[20 : 20 + 4 * WINDOW * N] == tokens().astype("<i4").tobytes()
    row_bytes = 8 + 2 * (VOCAB + 1)
    assert len(raw) == 20 + 4 * WINDOW * N + N * ROWS * row_bytes
    for i, row in enumerate(logits().tolist()):
        at = 20 + 4 * WINDOW * N + i * row_bytes
        found, wanted = raw[at : at + row_bytes], plain_row(row)
        assert struct.unpack("<2f", found[:8]) == pytest.approx(struct.unpack("<2f", wanted[:8]))
        codes, wanted_codes = (np.frombuffer(x[8:], "<u2").astype(int) for x in (found, wanted))
        assert abs(codes - wanted_codes).max() <= 1, "but for the rounding of a code in f32"
        assert codes.max() == 65535


def test_what_was_written_is_read_again(base: Path) -> None:
    wanted = log_softmax(logits())
    with BaseFile(base) as file:
        assert file.shape == BaseShape(WINDOW, VOCAB, N)
        assert file.tokens.tolist() == tokens().tolist()
        for window in range(N):
            found = file.rows(window, 0, ROWS)
            assert found.dtype == np.float32
            expected = wanted[window * ROWS : (window + 1) * ROWS]
            assert abs(found - expected).max() < 16 / 65535
            assert (file.rows(window, 1, 2) == found[1:3]).all()


def test_what_is_far_less_likely_is_written_as_e_to_the_minus_16(tmp_path: Path) -> None:
    values = logits(spread=20.0)
    wanted = log_softmax(values)
    wanted = np.maximum(wanted, wanted.max(axis=1, keepdims=True) - 16)
    assert (wanted > log_softmax(values)).any()
    with BaseFile(written(tmp_path / "wide", values)) as file:
        assert abs(file.rows(0, 0, ROWS) - wanted[:ROWS]).max() < 16 / 65535


def test_equal_logits_are_written_too(tmp_path: Path) -> None:
    with BaseFile(written(tmp_path / "flat", np.ones((N * ROWS, VOCAB), np.float32))) as file:
        assert file.rows(1, 0, 1)[0] == pytest.approx([-math.log(VOCAB)] * VOCAB)


def test_codes_reach_both_ends_whatever_the_scale() -> None:
    for spread in (1e-6, 0.1, 15.9999, 1e4):
        row = np.array([[0.0, spread, spread / 3]], np.float32)
        codes = encode(row).view("<u2")[0, 4:7]
        assert (codes.min(), codes.max()) == (0, 65535)


def test_one_windows_rows_of_a_real_vocabulary_take_25_megabytes() -> None:
    shape = BaseShape(512, 49_152, 1)
    assert (shape.row_bytes, shape.window_bytes) == (98_312, 25_069_560)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda raw: raw[:-1], "bytes; 3 windows of 8 tokens and 11 logits take"),
        (lambda raw: raw + b"\0", "take"),
        (lambda raw: raw[:19], "19 bytes are no base"),
        (lambda raw: b"", "0 bytes are no base"),
        (lambda raw: b"_logitz_" + raw[8:], "it begins with b'_logitz_'"),
        (lambda raw: raw[:8] + struct.pack("<i", -8) + raw[12:], "3 windows of -8 tokens"),
        (lambda raw: raw[:8] + struct.pack("<i", 2**31 - 1) + raw[12:], "take"),
        (lambda raw: raw[:12] + struct.pack("<i", -1) + raw[16:], "a vocabulary of -1"),
        (lambda raw: raw[:12] + struct.pack("<i", 2**30) + raw[16:], "a vocabulary of"),
        (lambda raw: raw[:16] + struct.pack("<i", 0) + raw[20:], "0 windows"),
        (lambda raw: raw[:16] + struct.pack("<i", 2**31 - 1) + raw[20:], "take"),
        (lambda raw: raw[:20] + struct.pack("<i", VOCAB) + raw[24:], "token 11; the vocabulary"),
        (lambda raw: raw[:20] + struct.pack("<i", -1) + raw[24:], "token -1; the vocabulary"),
    ],
)
def test_a_file_that_is_not_what_it_claims_is_refused(base: Path, damage: Any, says: str) -> None:
    base.write_bytes(damage(base.read_bytes()))
    with pytest.raises(ModelError, match=r"base\.bin") as error:
        BaseFile(base)
    assert says in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("scale", "least"),
    [
        (math.nan, -5.0),
        (math.inf, -5.0),
        (1e-4, math.nan),
        (1e-4, -math.inf),
        (-1e-4, -1.0),
        (1e-3, -5.0),
        (0.0, 3.0),
        (3e38, -5.0),
    ],
)
def test_a_row_without_probabilities_is_named(base: Path, scale: float, least: float) -> None:
    raw = bytearray(base.read_bytes())
    shape = BaseShape(WINDOW, VOCAB, N)
    struct.pack_into("<2f", raw, shape.rows_at + shape.window_bytes + shape.row_bytes, scale, least)
    base.write_bytes(raw)
    with BaseFile(base) as file:
        file.rows(0, 0, ROWS)
        with pytest.raises(ModelError, match=r"window 2, row 2: scale .* give no probabilities"):
            file.rows(1, 0, ROWS)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4))
def test_whatever_bytes_change_it_is_read_or_refused(
    tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    path = tmp_path / "fuzzed"
    path.unlink(missing_ok=True)  # what is no base any more is not written over
    raw = bytearray(written(path, logits()).read_bytes())
    for at, value in changes:
        raw[at] = value
    path.write_bytes(raw)
    try:
        with BaseFile(path) as file:
            for window in range(file.shape.n_windows):
                rows = file.rows(window, 0, n_scored(file.shape.window_tokens))
                assert np.isfinite(rows).all()
    except ModelError:
        pass


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "none"):
        with pytest.raises(ModelError, match=r"regular file|can't be opened"):
            BaseFile(tmp_path / name)


def test_a_file_that_shrinks_while_it_is_read_is_refused(base: Path) -> None:
    with BaseFile(base) as file:
        os.truncate(base, 150)
        with pytest.raises(ModelError, match="shrank"):
            file.rows(2, 0, ROWS)


def test_a_base_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "base.bin"
    path.write_bytes(b"_logits_ of an older one")
    with BaseWriter(path, tokens(), VOCAB) as writer:
        writer.write(logits()[:4])
        assert path.read_bytes() == b"_logits_ of an older one"
    assert [p.name for p in tmp_path.iterdir()] == ["base.bin"]
    assert path.read_bytes() == b"_logits_ of an older one"
    with contextlib.suppress(KeyboardInterrupt), BaseWriter(path, tokens(), VOCAB) as writer:
        writer.write(logits())
        raise KeyboardInterrupt
    assert path.read_bytes() == b"_logits_ of an older one"
    assert [p.name for p in tmp_path.iterdir()] == ["base.bin"]


@pytest.mark.parametrize("name", ["base.bin", "base.bin.part"])
def test_nothing_but_an_older_base_is_written_over(tmp_path: Path, name: str) -> None:
    dear = tmp_path / name
    dear.write_bytes(b"GGUF, or a text")
    with pytest.raises(ModelError, match=rf"{name} is there and no base of logits"):
        BaseWriter(tmp_path / "base.bin", tokens(), VOCAB)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {name: b"GGUF, or a text"}


def test_a_pipe_or_a_device_keeps_its_place(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="not a regular file"):
        BaseWriter(tmp_path / "pipe", tokens(), VOCAB)
    assert (tmp_path / "pipe").is_fifo()


def test_two_writers_of_one_base_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "base.bin"
    with BaseWriter(path, tokens(), VOCAB) as writer:
        with pytest.raises(ModelError, match="another process is writing it"):
            BaseWriter(path, tokens(), VOCAB)
        writer.write(logits())
    with BaseFile(path) as file:
        assert file.shape.n_windows == N


def test_too_little_room_is_said_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    many = np.zeros((1, 512), np.int32)
    with pytest.raises(ModelError, match="25 MB are needed, 5 MB are free"):
        BaseWriter(tmp_path / "base.bin", many, 49_152)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = BaseWriter(tmp_path / "base.bin", tokens(), VOCAB)
    real = writer._file

    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            real.close()

    monkeypatch.setattr(writer, "_file", Full())
    with pytest.raises(ModelError, match="No space left on device"), writer:
        writer.write(logits())
    assert not list(tmp_path.iterdir())


def test_a_folder_or_one_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder"):
        BaseWriter(tmp_path, tokens(), VOCAB)
    with pytest.raises(ModelError, match="No such file or directory"):
        BaseWriter(tmp_path / "none" / "base.bin", tokens(), VOCAB)
