"""What is no Hugging Face model, or not one that is supported, is refused in one line."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from potluck.convert.hugging_face import open_hugging_face
from potluck.errors import ModelError, UnknownModel
from potluck.testing import TinyShape
from potluck.testing.checkpoints import changed_config, hugging_face_tensors, write_hugging_face
from potluck.testing.safetensors import Stored, stored, write_safetensors

SHAPE = TinyShape(weight_type="f32", vocabulary="spm", n_layers=2, seed=3)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_hugging_face(folder)
    assert str(folder) in caught.value.message
    assert caught.value.message.isprintable()
    return caught.value.message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hugging_face(tmp_path / "tiny-llama", SHAPE)


def with_tensors(folder: Path, tensors: Mapping[str, Stored]) -> Path:
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def stored_tensors(shape: TinyShape = SHAPE) -> dict[str, Stored]:
    return {name: stored(values) for name, values in hugging_face_tensors(shape).items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"architectures": []}, "no architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', expected"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number from 1"),
        ({"num_attention_heads": 4.0}, "num_attention_heads is 4.0, expected a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads is True, expected a whole number"),
        ({"num_attention_heads": None}, "num_attention_heads is nothing, expected a whole number"),
        ({"num_attention_heads": 10**30}, "expected a whole number from 1 to 4,096"),
        ({"num_attention_heads": 3}, "2 KV heads do not divide 3 heads"),
        ({"hidden_size": 62}, "4 heads do not divide hidden_size 62"),
        ({"head_dim": 15}, "heads of 15 values, expected an even number"),
        ({"head_dim": 8}, "q_proj.weight: shape [64, 64], config.json implies [32, 64]"),
        ({"num_hidden_layers": 3}, "missing blk.2.attn_norm.weight"),
        ({"num_hidden_layers": 1}, "no part of a llama model of 1 layers"),
        (
            {"vocab_size": 420},
            "embed_tokens.weight: shape [421, 64], config.json implies [420, 64]",
        ),
        ({"intermediate_size": 97}, "gate_proj.weight: shape [96, 64], config.json implies [97"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a number"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0, expected a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported (silu)"),
        ({"mlp_bias": True}, "mlp_bias true is not supported"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already (gptq)"),
        ({"quantization": {"bits": 4}}, "quantization: the weights are quantized already"),
        ({"sliding_window": -1}, "sliding_window is -1"),
    ],
)
def test_wrong_values_of_config_json(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    assert message in refusal(changed_config(folder, **changes))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": NaN}', '{"a": 1, "a": 2}', "{" * 9999])
def test_a_config_json_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json: " in refusal(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("lm_head.weight", None, "missing lm_head.weight, and config.json does not say tie"),
        ("model.norm.weight", None, "missing output_norm.weight"),
        ("model.visual.weight", stored(np.ones((2, 2), np.float32)), "visual.weight is no part"),
        ("norm.weight", stored(np.ones(64, np.float32)), "are the same tensor"),
        ("model.layers.02.mlp.up_proj.weight", stored(np.ones(64, np.float32)), "is no part"),
        ("model.norm.weight", Stored("F64", (64,), bytes(512)), "type f64 is not supported"),
        ("model.norm.weight", Stored("F8_E4M3", (64,), bytes(64)), "type F8_E4M3 is not supported"),
        ("model.norm.weight", Stored("F32", (), bytes(4)), "shape [], config.json implies [64]"),
        ("model.norm.weight", Stored("F32", (0,), b""), "shape [0], config.json implies [64]"),
    ],
)
def test_wrong_tensors(folder: Path, name: str, tensor: Stored | None, message: str) -> None:
    tensors = stored_tensors()
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    assert message in refusal(with_tensors(folder, tensors))


def shards(tmp_path: Path, change: Mapping[str, str | None] | None = None) -> Path:
    """A folder of 4 files whose index says something else of some tensors."""
    folder = write_hugging_face(tmp_path / "shards", SHAPE, n_files=4)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name, place in (change or {}).items():
        index["weight_map"][name] = place
        if place is None:
            del index["weight_map"][name]
    path.write_text(json.dumps(index))
    return folder


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = shards(tmp_path)
    (folder / "model-00002-of-00004.safetensors").unlink()
    assert "3 of 4 files, model-00002-of-00004.safetensors is missing" in refusal(folder)
    (folder / "model-00004-of-00004.safetensors").unlink()
    assert "2 of 4 files, model-00002-of-00004.safetensors and 1 more are" in refusal(folder)


@pytest.mark.parametrize(
    "place",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a\\b.safetensors",
        "x\0.safetensors",
        "..",
        "",
        "x.bin",
        "ü" * 200 + ".safetensors",
    ],
)
def test_files_outside_of_the_folder_are_refused(tmp_path: Path, place: str) -> None:
    folder = shards(tmp_path, {"lm_head.weight": place})
    assert "is no safetensors file of this folder" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head.weight": "model-00001-of-00004.safetensors"}, "lm_head.weight: the index says"),
        ({"lm_head.weight": None}, "lm_head.weight: the index has no such"),
        ({"more": "model-00001-of-00004.safetensors"}, "no more, which the index says is there"),
    ],
)
def test_an_index_that_does_not_fit(
    tmp_path: Path, change: dict[str, str | None], message: str
) -> None:
    assert message in refusal(shards(tmp_path, change))


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}]
)
def test_an_index_that_is_none(tmp_path: Path, index: object) -> None:
    folder = shards(tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "weight_map" in refusal(folder)


def test_fewer_shards_than_their_names_count(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path / "m", SHAPE)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(hugging_face_tensors(SHAPE), "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    assert f"shards, but no {index.name}" in refusal(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert "model-00001-of-00002.safetensors, but the index names 1" in refusal(folder)


def test_folders_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors and no pytorch_model.bin" in refusal(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UnknownModel, match="no such file"):
        open_hugging_face(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "a LoRA adapter, which is no model of its own" in refusal(folder)


def test_damaged_folders_are_refused_or_read(folder: Path, tmp_path: Path) -> None:
    """600 folders with values of config.json and bytes of the header changed: only ModelError."""
    dice = random.Random(11)
    config = json.loads((folder / "config.json").read_text())
    good = (folder / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(good[:8], "little")
    values: Sequence[object] = [
        0,
        -1,
        1,
        2**70,
        1e300,
        0.5,
        "",
        "x",
        None,
        True,
        [],
        [1],
        {},
        {"a": 1},
    ]
    keys = [*config, "head_dim", "rope_parameters", "rope_scaling", "layer_types", "sliding_window"]
    lines, n_read = [], 0
    for turn in range(600):
        damaged = bytearray(good)
        if turn % 2:
            for _ in range(dice.randint(1, 3)):
                damaged[8 + dice.randrange(header_bytes)] = dice.randrange(256)
        changes = {dice.choice(keys): dice.choice(values) for _ in range(dice.randint(0, 2))}
        (folder / "config.json").write_text(json.dumps(config | changes))
        (folder / "model.safetensors").write_bytes(damaged)
        try:
            for tensor in open_hugging_face(folder).tensors:
                assert tensor.read(0, 1)
            n_read += 1
        except ModelError as e:
            lines.append(e.message)
    assert all(line.isprintable() for line in lines)
    assert 50 < n_read < 500
