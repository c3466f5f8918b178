"""What is wrong with a checkpoint of Meta's is one line that names the file and the place."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from potluck.convert.meta import open_meta
from potluck.errors import ModelError
from potluck.testing import write_meta
from potluck.testing.checkpoints import CUT_IN_8, meta_params, meta_tensors
from potluck.testing.sentence_piece_file import write_sentence_pieces
from potluck.testing.torch_file import TorchTensor, write_torch

SHAPE = CUT_IN_8


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_meta(folder)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"n_heads": 0}, "params.json: n_heads is 0, expected a whole number from 1 to"),
        ({"n_heads": 7}, "7 heads do not divide dim 64"),
        ({"n_heads": True}, "n_heads is True"),
        ({"n_heads": 8.0}, "n_heads is 8.0"),
        ({"n_heads": None}, "n_heads is nothing"),
        ({"n_kv_heads": 3}, "3 KV heads do not divide 8 heads"),
        ({"n_kv_heads": -1}, "n_kv_heads is -1"),
        ({"dim": 10**9}, "dim is 1000000000"),
        ({"dim": "64"}, "dim is '64'"),
        ({"dim": [64]}, "dim is an array"),
        ({"dim": 24, "n_heads": 8}, "heads of 3 values, expected an even number"),
        ({"n_layers": 10**6}, "n_layers is 1000000"),
        ({"n_layers": 3}, "consolidated.00.pth: layers.2.attention_norm.weight is missing"),
        ({"n_layers": 1}, "layers.1.attention_norm.weight is no part of a LLaMA of 1 layers"),
        ({"norm_eps": 0}, "norm_eps is 0"),
        ({"norm_eps": 1e999}, "Infinity is no number"),
        ({"norm_eps": math.nan}, "NaN is no number"),
        ({"norm_eps": None}, "norm_eps is nothing"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1, expected true or false"),
        ({"vocab_size": 425}, "tok_embeddings.weight: its shape is [424, 64], params.json implies"),
        ({"vocab_size": -2}, "vocab_size is -2"),
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"multiple_of": 256}, "192 rows, no multiple of multiple_of 256 in params.json"),
        ({"hidden_dim": 256}, "192 rows, params.json has hidden_dim 256"),
        ({"ffn_dim_multiplier": "x"}, "ffn_dim_multiplier is 'x'"),
        ({"dim": 128, "head_dim": 8}, "its shape is [192, 64], params.json implies [192, 128]"),
        ({"moe": {"num_experts": 8}}, "moe is not supported"),
        ({"quantization_args": {}}, "quantization_args is not supported"),
    ],
)
def test_params_json_that_does_not_fit_is_refused_by_key(
    tmp_path: Path, changes: Mapping[str, object], found: str
) -> None:
    message = refused(write_meta(tmp_path / "m", SHAPE, params=changes))
    assert found in message


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "is empty"),
        ("{", "is not JSON"),
        ("[1]", "holds an array"),
        ('{"dim": 64, "dim": 128}', "the key 'dim' stands twice"),
        ("[" * 100_000, "is not JSON"),
        ('{"dim": ' + "9" * 5000 + "}", "is not JSON"),
        ("\xff", "n_heads is nothing"),
    ],
)
def test_params_json_that_is_no_object_is_refused(tmp_path: Path, text: str, found: str) -> None:
    folder = write_meta(tmp_path / "m", SHAPE)
    (folder / "params.json").write_bytes(text.encode("latin-1"))
    message = refused(folder)
    assert message.startswith(f"{folder / 'params.json'}: ")
    assert found in message or "not UTF-8" in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "65B", SHAPE, n_shards=8)
    (folder / "consolidated.05.pth").rename(tmp_path / "05")
    assert refused(folder) == f"{folder}: 7 of 8 files, consolidated.05.pth is missing"
    (tmp_path / "05").rename(folder / "consolidated.05.pth")
    for i in (7, 6, 2):
        (folder / f"consolidated.{i:02}.pth").rename(tmp_path / f"{i:02}")
        assert "missing" in refused(folder)
    assert "5 of 8 files" not in refused(folder)  # a gap before the count can be known
    (tmp_path / "02").rename(folder / "consolidated.02.pth")
    names = "consolidated.06.pth, consolidated.07.pth are missing"
    assert refused(folder) == f"{folder}: 6 of 8 files, {names}"
    for path in folder.glob("*.pth"):
        path.unlink()
    assert refused(folder) == f"{folder}: no consolidated.00.pth"
    (folder / "params.json").unlink()
    assert refused(folder) == f"{folder}: no params.json"


def test_a_file_too_many_is_named(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "m", SHAPE, n_shards=4)
    write_meta(tmp_path / "other", SHAPE, n_shards=8)
    (tmp_path / "other" / "consolidated.04.pth").rename(folder / "consolidated.04.pth")
    assert "5 files, expected 4 by their shapes" in refused(folder)


def changed(tensors: list[TorchTensor], at: str, **changes: Any) -> list[TorchTensor]:
    return [replace(t, **changes) if t.name == at else t for t in tensors]


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        (
            "layers.1.attention.wq.weight",
            {"shape": (8, 63), "data": bytes(1008)},
            "shapes [8, 64] in consolidated.00.pth and [8, 63] in consolidated.03.pth do not"
            " concatenate",
        ),
        (
            "layers.0.feed_forward.w2.weight",
            {"shape": (63, 24), "data": bytes(3024)},
            "shapes [64, 24] in consolidated.00.pth and [63, 24] in consolidated.03.pth do not",
        ),
        ("norm.weight", {"shape": (32, 2)}, "do not concatenate"),
        (
            "norm.weight",
            {"type_name": "f32", "data": bytes(256)},
            "consolidated.03.pth: norm.weight is f32, expected f16, bf16 or f32, and the same in",
        ),
        ("norm.weight", {"name": "x"}, "consolidated.03.pth: norm.weight is missing"),
    ],
)
def test_pieces_that_do_not_join_are_named(
    tmp_path: Path, name: str, changes: Mapping[str, object], found: str
) -> None:
    folder = write_meta(tmp_path / "m", SHAPE, n_shards=8)
    tensors = changed(meta_tensors(SHAPE, 3, 8), name, **changes)
    write_torch(folder / "consolidated.03.pth", tensors)
    assert found in refused(folder)


def test_pieces_of_another_sum_than_params_json_implies_are_named(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "m", replace(SHAPE, n_kv_heads=4), n_shards=2)
    params = meta_params(SHAPE)
    (folder / "params.json").write_text(json.dumps(params))
    assert refused(folder) == (
        "layers.0.attention.wk.weight: 2 pieces of [16, 64], joined by rows, make [32, 64],"
        " params.json implies [64, 64]"
    )


def test_a_tensor_that_has_no_place_is_refused(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "m", SHAPE)
    extra = TorchTensor("layers.0.attention.wq.bias", "f16", (64,), bytes(128))
    write_torch(folder / "consolidated.00.pth", [*meta_tensors(SHAPE, 0, 1), extra])
    assert "layers.0.attention.wq.bias is no part of a LLaMA of 2 layers" in refused(folder)


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "m", SHAPE, n_tokens=425)
    assert "the tokenizer has 425 tokens, the model 424" in refused(folder)
    (folder / "tokenizer.model").unlink()
    assert "no vocabulary" in refused(folder)
    write_sentence_pieces(tmp_path / "tokenizer.model", 424)
    open_meta(folder)
