"""Whatever a file says, reading it ends in a model or in a ModelError, and soon."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from potluck import gguf, model
from potluck.errors import ModelError
from potluck.plan import Span
from potluck.testing import TinyShape, gguf_fields, overwritten, tiny_metadata, tiny_tensors

SHAPE = TinyShape(n_layers=1, dim=32, head_dim=16, n_heads=2, n_kv_heads=1, ffn_dim=32)
FIELDS = gguf_fields(tiny_metadata(SHAPE), tiny_tensors(SHAPE))
DATA = overwritten(FIELDS, {})
HEADER_BYTES = sum(len(f.data) for f in FIELDS if not f.name.endswith((".data", ".padding")))
# Names of fields that are not a tensor's data: damage there changes no header.
NAMES = [f.name for f in FIELDS if f.data and not f.name.endswith(".data")]

EDGES = st.sampled_from([0, 1, 2, 3, 8, 9, 31, 32, 33, 255, 65_537])
POWERS = st.builds(lambda bits, delta: 2**bits + delta, st.integers(0, 64), st.integers(-1, 1))
NUMBERS = EDGES | POWERS | st.integers(0, 2**64 - 1)

many = settings(
    max_examples=400,
    deadline=None,  # seconds are checked by `outcome`
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def outcome(path: Path, data: bytes) -> str:
    """What reading `data` comes to; fails if it is anything but a model or a clear refusal."""
    path.write_bytes(data)
    start = time.perf_counter()
    refusal = ""
    try:
        file = gguf.read(path)
        for t in file.tensors.values():
            assert file.data_offset_bytes <= t.offset_bytes
            assert t.offset_bytes + t.size_bytes <= len(data)
        config = model.config_of(file)
        span = Span(0, config.n_layers)
        tensors = model.span_tensors(file, config, span, embeds=True, has_head=True)
        assert sum(t.size_bytes for t in tensors) <= len(data)
    except ModelError as e:
        refusal = e.message
    assert time.perf_counter() - start < 1
    assert refusal.isprintable()
    assert str(path) in refusal or not refusal
    return refusal or "a model"


def test_the_undamaged_file_is_a_model(tmp_path: Path) -> None:
    assert outcome(tmp_path / "x.gguf", DATA) == "a model"


@many
@given(name=st.sampled_from(NAMES), value=NUMBERS)
def test_any_number_in_any_field_is_read_or_refused(tmp_path: Path, name: str, value: int) -> None:
    outcome(tmp_path / "x.gguf", overwritten(FIELDS, {name: value}))


@many
@given(changes=st.dictionaries(st.sampled_from(NAMES), st.binary(max_size=40), max_size=3))
def test_any_bytes_in_place_of_fields_are_read_or_refused(
    tmp_path: Path, changes: dict[str, int | bytes]
) -> None:
    outcome(tmp_path / "x.gguf", overwritten(FIELDS, changes))


@many
@given(flips=st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255)), max_size=8))
def test_any_flipped_bytes_are_read_or_refused(
    tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(DATA)
    for at, bits in flips:
        data[at] ^= bits
    outcome(tmp_path / "x.gguf", bytes(data))


@many
@given(start=st.integers(0, len(DATA)), stop=st.integers(0, len(DATA)), data=st.binary())
def test_any_piece_replaced_or_missing_is_read_or_refused(
    tmp_path: Path, start: int, stop: int, data: bytes
) -> None:
    outcome(tmp_path / "x.gguf", DATA[:start] + data + DATA[stop:])


@many
@given(data=st.binary(max_size=200))
def test_any_bytes_after_the_magic_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    outcome(tmp_path / "x.gguf", b"GGUF\3\0\0\0" + data)


@pytest.mark.parametrize("name", NAMES)
def test_each_field_at_its_extremes_is_read_or_refused(tmp_path: Path, name: str) -> None:
    for value in (0, 1, -1, 2**31, 2**62):
        outcome(tmp_path / "x.gguf", overwritten(FIELDS, {name: value}))
