"""Which kind of model a path is; and that the same weights of every kind give the same logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from potluck import gguf
from potluck.convert import open_source
from potluck.convert.tensor_views import f32_rows
from potluck.errors import ModelError
from potluck.model import config_of
from potluck.model_writer import write_model
from potluck.tensor_source import ModelSource, rows_and_cols
from potluck.testing import (
    Oracle,
    TinyShape,
    tiny_metadata,
    tiny_tensors,
    write_gguf,
    write_hugging_face,
    write_meta,
    write_tiny,
)
from potluck.testing.adapters import adapter_tensors, write_adapter
from potluck.testing.checkpoints import CUT_IN_8
from potluck.type_mix import choice_of

if TYPE_CHECKING:
    from tests.convert.conftest import Logits

SHAPE = CUT_IN_8
GROUPED = replace(SHAPE, n_kv_heads=4, rope_theta=500_000.0, norm_eps=1e-5)
TOKENS = [*range(259, 300), *range(40, 20, -1), 5, 5, 5]


def written(source: ModelSource, path: Path, type_name: str = "f16") -> gguf.GgufFile:
    write_model(source, path, choice_of(type_name))
    return gguf.read(path)


@pytest.mark.parametrize(
    ("n_shards", "shape"), [(1, SHAPE), (8, SHAPE), (4, GROUPED)], ids=["7B", "65B", "grouped"]
)
@pytest.mark.parametrize("type_name", ["f16", "f32"])
def test_logits_are_those_of_hugging_faces_files_and_of_the_oracle(
    tmp_path: Path, logits: Logits, n_shards: int, shape: TinyShape, type_name: str
) -> None:
    write_meta(tmp_path / "meta", shape, n_shards=n_shards)
    write_hugging_face(tmp_path / "hf", shape, n_files=2)
    meta = written(open_source(tmp_path / "meta"), tmp_path / "meta.gguf", type_name)
    other = written(open_source(tmp_path / "hf"), tmp_path / "hf.gguf", type_name)
    found = logits(meta, TOKENS)
    assert np.array_equal(found, logits(other, TOKENS))
    expected = Oracle(meta, config_of(meta)).logits(TOKENS)
    assert np.std(expected) > 0.5
    assert np.sum((found - expected) ** 2) / np.sum(expected**2) < 1e-6
    # The oracle on the weights as they were before any converter, norms rounded as Meta stores.
    tiny = gguf.read(write_tiny(tmp_path / "tiny.gguf", replace(shape, weight_type="f32")))
    assert np.abs(Oracle(tiny, config_of(tiny)).logits(TOKENS) - expected).max() < 0.05


def test_a_folder_of_two_kinds_is_hugging_faces_and_said(tmp_path: Path) -> None:
    write_meta(tmp_path, SHAPE)
    write_hugging_face(tmp_path, SHAPE)
    source = open_source(tmp_path)
    assert any("taken are those of Hugging Face" in note for note in source.notes)
    of_meta = open_source(tmp_path / "consolidated.00.pth")
    assert of_meta.paths[0].endswith("consolidated.00.pth")


def test_a_gguf_and_files_of_a_folder_are_understood(tmp_path: Path) -> None:
    write_meta(tmp_path / "m", SHAPE)
    write_hugging_face(tmp_path / "h", SHAPE)
    tiny = write_tiny(tmp_path / "x.gguf", SHAPE)
    for path in (
        tmp_path / "m" / "params.json",
        tmp_path / "m" / "consolidated.00.pth",
        tmp_path / "h" / "model.safetensors",
        tiny,
    ):
        source = open_source(path, context_tokens=99, name="Bread")
        pairs = dict(source.metadata)
        assert (pairs["llama.context_length"], pairs["general.name"]) == (99, "Bread")


def test_a_gguf_is_known_by_its_magic_whatever_it_is_called(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "model.gguf", SHAPE)
    found = open_source(path.rename(tmp_path / "ggml-model.bin"))
    assert len(found.tensors) == len(tiny_tensors(SHAPE))
    old = tmp_path / "ggml-model-q4_0.bin"
    old.write_bytes(b"tjgg" + bytes(100))
    with pytest.raises(ModelError, match="'ggjt': an old GGML file"):
        open_source(old)


@pytest.mark.parametrize("name", ["empty", "nowhere", "only.safetensors", "x.gguf"])
def test_what_is_not_understood_is_said_with_what_is(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if name not in ("empty", "nowhere"):
        (folder / name).write_bytes(b"1")
    with pytest.raises(ModelError) as caught:
        open_source(tmp_path / "nowhere" if name == "nowhere" else folder)
    assert "consolidated.00.pth" in caught.value.remedy
    assert "GGUF" in caught.value.remedy


def test_an_adapter_is_merged_into_whatever_holds_the_model(tmp_path: Path) -> None:
    """The same weights as Meta's files, Hugging Face's and GGUF, and one adapter: the same sums."""
    lora = write_adapter(tmp_path / "lora", adapter_tensors(SHAPE))
    written(open_source(write_meta(tmp_path / "m", SHAPE)), tmp_path / "x.gguf")
    write_hugging_face(tmp_path / "h", SHAPE)

    def values(name: str, lora: Path | None) -> dict[str, bytes]:
        tensors = open_source(tmp_path / name, lora=lora).tensors
        return {t.name: f32_rows(t, 0, rows_and_cols(t.shape)[0]).tobytes() for t in tensors}

    found = values("m", lora)
    assert found == values("h", lora) == values("x.gguf", lora)
    plain = values("m", None)
    assert sum(plain[name] != found[name] for name in plain) == 4 * SHAPE.n_layers


def test_an_adapter_is_not_added_to_blocks(tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / "lora", adapter_tensors(SHAPE))
    path = write_tiny(tmp_path / "x.gguf", replace(SHAPE, weight_type="q4_0"))
    with pytest.raises(ModelError, match=r"attn_q\.weight is q4_0: nothing can be added to blocks"):
        open_source(path, lora=lora)


def test_an_adapter_needs_to_know_the_models_heads(tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / "lora", adapter_tensors(SHAPE))
    metadata = [pair for pair in tiny_metadata(SHAPE) if "head_count" not in pair[0]]
    path = write_gguf(tmp_path / "x.gguf", metadata, tiny_tensors(SHAPE))
    with pytest.raises(ModelError, match="the model's heads are not known"):
        open_source(path, lora=lora)


def test_an_adapter_alone_is_called_that(tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / "lora", adapter_tensors(SHAPE))
    with pytest.raises(ModelError, match="a LoRA adapter, no model of its own"):
        open_source(lora)
    with pytest.raises(ModelError, match="a LoRA adapter, no model of its own"):
        open_source(lora / "adapter_model.safetensors")
