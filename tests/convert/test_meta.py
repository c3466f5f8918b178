"""Meta's checkpoints: every value arrives where it belongs, with the metadata that GGUF has.

The checkpoints are those of potluck/testing/checkpoints.py, cut as Meta cut 7B (one file), 65B (8
files, the embedding by columns) and LLaMA 3's 70B (8 files, the embedding by rows).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from potluck.convert.meta import open_meta
from potluck.convert.meta_params import read_params
from potluck.tensor_source import TensorSource, rows_and_cols
from potluck.testing import TinyShape, quantize, tiny_values, write_meta
from potluck.testing.checkpoints import CUT_IN_8, meta_params, meta_tensors
from potluck.testing.torch_file import write_torch

SHAPE = CUT_IN_8
GROUPED = replace(SHAPE, n_kv_heads=4, rope_theta=500_000.0, norm_eps=1e-5)


def whole(tensor: TensorSource) -> bytes:
    return bytes(tensor.read(0, rows_and_cols(tensor.shape)[0]))


@pytest.mark.parametrize("type_name", ["f16", "bf16", "f32"])
@pytest.mark.parametrize(
    ("n_shards", "by_rows", "shape"),
    [(1, False, SHAPE), (2, False, SHAPE), (8, False, SHAPE), (4, True, GROUPED)],
    ids=["7B", "13B", "65B", "LLaMA 3"],
)
def test_every_value_arrives_where_it_belongs(
    tmp_path: Path, n_shards: int, shape: TinyShape, type_name: str, *, by_rows: bool
) -> None:
    shape = replace(shape, weight_type=type_name)
    write_meta(tmp_path / "m", shape, n_shards=n_shards, embedding_by_rows=by_rows)
    source = open_meta(tmp_path / "m")
    expected = tiny_values(shape)
    assert [t.name for t in source.tensors] == list(expected)
    for tensor in source.tensors:
        values = expected[tensor.name]
        assert (tensor.shape, tensor.type_name) == (values.shape, type_name)
        assert whole(tensor) == quantize(values, type_name), tensor.name


@pytest.mark.parametrize("by_rows", [False, True])
def test_rows_can_be_read_in_any_runs(tmp_path: Path, *, by_rows: bool) -> None:
    chance = random.Random(3)
    write_meta(tmp_path / "m", SHAPE, n_shards=8, embedding_by_rows=by_rows)
    for tensor in open_meta(tmp_path / "m").tensors:
        rows, _ = rows_and_cols(tensor.shape)
        data = whole(tensor)
        row_bytes = len(data) // rows
        for _ in range(10):
            first = chance.randrange(rows)
            n = chance.randint(1, rows - first)
            assert tensor.read(first, n) == data[first * row_bytes : (first + n) * row_bytes]


def test_metadata_is_that_of_llama_cpps_converter(tmp_path: Path) -> None:
    write_meta(tmp_path / "7B", SHAPE, tokenizer_above=True)
    source = open_meta(tmp_path / "7B")
    tokenizer = [(k, v) for k, v in source.metadata if k.startswith("tokenizer.")]
    assert source.metadata[: len(source.metadata) - len(tokenizer)] == [
        ("general.architecture", "llama"),
        ("general.type", "model"),
        ("general.name", "LLaMA 7B"),
        ("llama.block_count", 2),
        ("llama.context_length", 2048),
        ("llama.embedding_length", 64),
        ("llama.feed_forward_length", 192),
        ("llama.attention.head_count", 8),
        ("llama.attention.head_count_kv", 8),
        ("llama.attention.layer_norm_rms_epsilon", 1e-6),
        ("llama.vocab_size", 424),
        ("llama.rope.dimension_count", 8),
    ]
    assert dict(tokenizer)["tokenizer.ggml.model"] == "llama"
    tokens = dict(tokenizer)["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Sequence)
    assert len(tokens) == 424
    assert source.paths == tuple(
        str(tmp_path / name)
        for name in ("7B/consolidated.00.pth", "7B/params.json", "tokenizer.model")
    )


@pytest.mark.parametrize(
    ("params", "context_tokens", "reason"),
    [
        ({"norm_eps": 1e-6}, 2048, "LLaMA 1"),
        ({"norm_eps": 1e-5}, 4096, "LLaMA 2"),
        ({"norm_eps": 1e-6, "n_kv_heads": 8}, 4096, "LLaMA 2"),
        ({"rope_theta": 500_000.0}, 8192, "LLaMA 3"),
        ({"rope_theta": 1_000_000}, 16_384, "Code Llama"),
        ({"rope_theta": 500_000.0, "use_scaled_rope": True}, 131_072, "LLaMA 3.1 and later"),
    ],
)
def test_the_context_follows_from_which_llama_it_is_and_is_said(
    tmp_path: Path, params: Mapping[str, object], context_tokens: int, reason: str
) -> None:
    folder = write_meta(tmp_path / "m", SHAPE, params=params)
    source = open_meta(folder)
    assert dict(source.metadata)["llama.context_length"] == context_tokens
    assert len(source.notes) == 1
    assert f"assumed are {context_tokens:,} tokens, those of {reason} (" in source.notes[0]
    given = open_meta(folder, context_tokens=777)
    assert dict(given.metadata)["llama.context_length"] == 777
    assert given.notes == ()


def test_65b_is_llama_1_for_all_its_norm_eps(tmp_path: Path) -> None:
    """Its params.json has LLaMA 2's 1e-05; 70B, of the same dim, has KV heads."""
    shape = replace(SHAPE, dim=8192, n_heads=64, n_kv_heads=64, head_dim=128, n_layers=1)
    path = tmp_path / "params.json"
    path.write_text(json.dumps(meta_params(shape, {"norm_eps": 1e-05})))
    assert read_params(path).context_tokens == 2048
    path.write_text(json.dumps(meta_params(shape, {"norm_eps": 1e-05, "n_kv_heads": 8})))
    assert read_params(path).context_tokens == 4096


@pytest.mark.parametrize(
    ("params", "factor"), [({}, 32.0), ({"rope_scaling_factor": 8.0}, 8.0)], ids=["3.2", "3.1"]
)
def test_scaled_rope_becomes_a_tensor_of_factors(
    tmp_path: Path, params: Mapping[str, object], factor: float
) -> None:
    shape = replace(SHAPE, rope_theta=500_000.0, n_heads=1, n_kv_heads=1, head_dim=64)
    folder = write_meta(tmp_path / "m", shape, params={"use_scaled_rope": True, **params})
    tensors = {t.name: t for t in open_meta(folder).tensors}
    assert list(tensors)[:2] == ["token_embd.weight", "rope_freqs.weight"]
    freqs = tensors["rope_freqs.weight"]
    factors = np.frombuffer(freqs.read(0, 1), "<f4")
    assert (freqs.shape, freqs.type_name) == ((32,), "f32")
    waves = 2 * math.pi * 500_000.0 ** (np.arange(32) / 32)
    assert (factors[waves < 8192 / 4] == 1).all()
    assert (factors[waves > 8192] == factor).all()
    between = factors[(waves > 8192 / 4) & (waves < 8192)]
    assert len(between) > 1
    assert ((between > 1) & (between < factor)).all()
    assert (np.diff(factors) >= 0).all()


def test_a_model_without_a_head_uses_its_embedding(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "m", replace(SHAPE, tied=True), n_shards=2)
    assert "output.weight" not in [t.name for t in open_meta(folder).tensors]


def test_vectors_that_differ_from_file_to_file_are_noted(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "m", SHAPE, n_shards=2)
    tensors = [
        replace(t, data=bytes(128)) if t.name == "norm.weight" else t
        for t in meta_tensors(SHAPE, 1, 2)
    ]
    write_torch(folder / "consolidated.01.pth", tensors)
    source = open_meta(folder)
    assert source.notes[0] == (
        "norm.weight differs from file to file: those of consolidated.00.pth are taken"
    )
    norm = next(t for t in source.tensors if t.name == "output_norm.weight")
    assert whole(norm) == quantize(tiny_values(SHAPE)["output_norm.weight"], "f16")


def test_another_file_is_another_identity(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "m", SHAPE, n_shards=2)
    before = open_meta(folder).identity
    assert open_meta(folder).identity == before
    write_torch(folder / "consolidated.01.pth", meta_tensors(SHAPE, 1, 2))
    assert open_meta(folder).identity != before
