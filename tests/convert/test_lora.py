"""A LoRA adapter is merged into the model it was trained for, or refused in one line."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck.convert.hugging_face import open_hugging_face
from potluck.convert.lora import add_low_rank, with_lora
from potluck.errors import ModelError, UnknownModel
from potluck.tensor_source import ModelSource, rows_and_cols
from potluck.testing import TinyShape
from potluck.testing.adapters import (
    ATTENTION,
    FEED_FORWARD,
    adapter_tensors,
    merged_values,
    write_adapter,
)
from potluck.testing.checkpoints import (
    hugging_face_config,
    hugging_face_tensors,
    write_hugging_face,
)
from potluck.testing.quantize import F32
from potluck.testing.safetensors import stored, write_safetensors
from potluck.testing.sentence_piece_file import write_sentence_pieces
from potluck.testing.torch_file import TorchTensor, write_torch

SHAPE = TinyShape(weight_type="f32", vocabulary="spm", n_layers=2, seed=4)
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
EMBEDDING = "base_model.model.model.embed_tokens.weight"
HEAD = "base_model.model.lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hugging_face(tmp_path / "tiny", SHAPE)


def values_of(source: ModelSource) -> dict[str, F32]:
    """All tensors, which must be f32, as arrays."""
    found = {}
    for t in source.tensors:
        assert t.type_name == "f32"
        data = t.read(0, rows_and_cols(t.shape)[0])
        found[t.name] = np.frombuffer(data, np.float32).reshape(t.shape)
    return found


def expected_values(folder: Path, tensors: dict[str, F32]) -> dict[str, F32]:
    """What a folder of `tensors` becomes."""
    write_safetensors(folder / "model.safetensors", {k: stored(v) for k, v in tensors.items()})
    return values_of(open_hugging_face(folder))


def refusal(folder: Path, lora: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_hugging_face(folder, lora=lora)
    assert str(lora) in caught.value.message
    assert caught.value.message.isprintable()
    return caught.value.message


@pytest.mark.parametrize(
    "modules", [("self_attn.q_proj", "self_attn.v_proj"), ATTENTION + FEED_FORWARD]
)
def test_merged_weights_are_those_that_numpy_merges(
    folder: Path, tmp_path: Path, modules: tuple[str, ...]
) -> None:
    changes = adapter_tensors(SHAPE, modules)
    lora = write_adapter(tmp_path / "lora", changes)
    found = values_of(open_hugging_face(folder, lora=lora))
    plain = values_of(open_hugging_face(folder))
    expected = expected_values(folder, merged_values(SHAPE, changes, 16 / 4))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.allclose(found[name], values, rtol=0, atol=2e-6), name
        is_changed = not np.array_equal(plain[name], values)
        assert is_changed == (not np.array_equal(found[name], plain[name])), name
    n_changed = sum(not np.array_equal(found[n], plain[n]) for n in found)
    assert n_changed == SHAPE.n_layers * len(modules)


@pytest.mark.parametrize("type_name", ["f16", "bf16"])
def test_adapters_and_models_of_16_bits_are_added_in_f32(tmp_path: Path, type_name: str) -> None:
    shape = replace(SHAPE, weight_type=type_name)
    folder = write_hugging_face(tmp_path / "m", shape)
    changes = adapter_tensors(shape)
    lora = write_adapter(tmp_path / "lora", changes, type_name=type_name)
    source = open_hugging_face(folder, lora=lora)
    types = {t.name: t.type_name for t in source.tensors}
    assert types["blk.0.attn_q.weight"] == "f32"
    assert types["blk.0.ffn_up.weight"] == type_name
    v = next(t for t in source.tensors if t.name == "blk.0.attn_v.weight")
    found = np.frombuffer(v.read(0, v.shape[0]), np.float32).reshape(v.shape)
    expected = merged_values(shape, changes, 16 / 4)["model.layers.0.self_attn.v_proj.weight"]
    assert 0 < np.abs(found - expected).max() < 0.03


def test_the_order_of_sums_is_fixed(folder: Path, tmp_path: Path) -> None:
    """Rows have the same bytes in slabs of any size, and those of the sum that is promised."""
    lora = write_adapter(tmp_path / "lora", adapter_tensors(SHAPE, rank=7))
    source = open_hugging_face(folder, lora=lora)
    for name in ("blk.1.attn_k.weight", "blk.1.attn_output.weight"):
        t = next(t for t in source.tensors if t.name == name)
        rows = t.shape[0]
        whole = bytes(t.read(0, rows))
        for n in (1, 5, 16):
            assert whole == b"".join(
                bytes(t.read(at, min(n, rows - at))) for at in range(0, rows, n)
            )


def test_each_sum_goes_up_the_ranks_in_f32() -> None:
    dice = np.random.default_rng(3)
    values, up, down = (
        dice.normal(size=size).astype(np.float32) for size in ((300, 500), (300, 9), (9, 500))
    )
    found = values.copy()
    add_low_rank(found, up, down, np.float32(0.7))
    for row, col in ((0, 0), (131, 77), (299, 499)):
        total = np.float32(0)
        for k in range(9):
            total = total + up[row, k] * down[k, col]
        assert found[row, col] == values[row, col] + total * np.float32(0.7)


def test_rank_stabilization_divides_by_the_root(folder: Path, tmp_path: Path) -> None:
    changes = adapter_tensors(SHAPE)
    lora = write_adapter(tmp_path / "lora", changes, config={"use_rslora": True})
    found = values_of(open_hugging_face(folder, lora=lora))
    expected = expected_values(folder, merged_values(SHAPE, changes, 16 / math.sqrt(4)))
    assert all(np.allclose(found[n], expected[n], rtol=0, atol=4e-6) for n in expected)


def test_alpaca_loras_own_files_are_known(folder: Path, tmp_path: Path) -> None:
    """adapter_model.bin, and a config from before most of PEFT's keys."""
    changes = adapter_tensors(SHAPE)
    expected = values_of(open_hugging_face(folder, lora=write_adapter(tmp_path / "lora", changes)))
    lora = tmp_path / "lora"
    (lora / "adapter_model.safetensors").unlink()
    write_torch(
        lora / "adapter_model.bin",
        [TorchTensor(n, "f32", v.shape, v.tobytes()) for n, v in changes.items()],
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "bias": "none", "enable_lora": None}
    config |= {"fan_in_fan_out": False, "merge_weights": False, "modules_to_save": None}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    found = values_of(open_hugging_face(folder, lora=lora))
    assert all(np.array_equal(found[n], expected[n]) for n in expected)


def test_qwen_is_merged_without_reordering(folder: Path, tmp_path: Path) -> None:
    config = hugging_face_config(SHAPE, {"architectures": ["Qwen3ForCausalLM"]})
    (folder / "config.json").write_text(json.dumps(config))
    tensors = hugging_face_tensors(SHAPE)
    for i in range(SHAPE.n_layers):
        for name in ("q_norm", "k_norm"):
            norm = np.full(SHAPE.head_dim, 1 + i, np.float32)
            tensors[f"model.layers.{i}.self_attn.{name}.weight"] = norm
    changes = adapter_tensors(SHAPE)
    expected_values(folder, tensors)
    lora = write_adapter(tmp_path / "lora", changes)
    found = values_of(open_hugging_face(folder, lora=lora))
    expected = merged_values(SHAPE, changes, 4)["model.layers.1.self_attn.q_proj.weight"]
    assert np.allclose(found["blk.1.attn_q.weight"], expected, rtol=0, atol=2e-6)


def test_modules_that_were_trained_whole_are_replaced(folder: Path, tmp_path: Path) -> None:
    tensors = adapter_tensors(SHAPE)
    tensors[EMBEDDING] = np.random.default_rng(8).normal(size=(421, 64)).astype(np.float32)
    tensors["base_model.model.model.norm.modules_to_save.default.weight"] = np.ones(64, np.float32)
    lora = write_adapter(tmp_path / "lora", tensors)
    found = values_of(open_hugging_face(folder, lora=lora))
    assert np.array_equal(found["token_embd.weight"], tensors[EMBEDDING])
    assert np.array_equal(found["output_norm.weight"], np.ones(64, np.float32))
    plain = values_of(open_hugging_face(folder))
    assert np.array_equal(found["output.weight"], plain["output.weight"])


def test_added_tokens_come_with_their_rows_and_their_vocabulary(
    folder: Path, tmp_path: Path
) -> None:
    dice = np.random.default_rng(8)
    rows = {name: dice.normal(size=(423, 64)).astype(np.float32) for name in (EMBEDDING, HEAD)}
    lora = write_adapter(tmp_path / "lora", adapter_tensors(SHAPE) | rows)
    write_sentence_pieces(lora / "tokenizer.model", 421)
    (lora / "added_tokens.json").write_text(json.dumps({"<|a|>": 421, "<|b|>": 422}))
    source = open_hugging_face(folder, lora=lora)
    pairs: dict[str, Any] = dict(source.metadata)
    assert pairs["llama.vocab_size"] == 423
    assert pairs["tokenizer.ggml.tokens"][-2:] == ["<|a|>", "<|b|>"]
    found = values_of(source)
    assert np.array_equal(found["token_embd.weight"], rows[EMBEDDING])
    assert np.array_equal(found["output.weight"], rows[HEAD])
    assert str(lora / "added_tokens.json") in source.paths


def test_a_vocabulary_that_does_not_fit_is_not_taken(folder: Path, tmp_path: Path) -> None:
    """Alpaca's time: the tokenizer got [PAD], the embedding no row for it."""
    lora = write_adapter(tmp_path / "lora", adapter_tensors(SHAPE))
    assert open_hugging_face(folder, lora=lora).notes == ()
    write_sentence_pieces(lora / "tokenizer.model", 421)
    (lora / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 'mine' }}"}))
    source = open_hugging_face(folder, lora=lora)
    assert dict(source.metadata)["tokenizer.chat_template"] == "{{ 'mine' }}"
    assert source.notes == (f"vocabulary and template are {lora}'s",)
    (lora / "added_tokens.json").write_text(json.dumps({"[PAD]": 421}))
    source = open_hugging_face(folder, lora=lora)
    assert source.metadata == open_hugging_face(folder).metadata
    assert "the model's is taken" in source.notes[0]
    assert "422 tokens" in source.notes[0]


def test_rows_that_only_one_end_has_are_refused(folder: Path, tmp_path: Path) -> None:
    rows = {EMBEDDING: np.ones((423, 64), np.float32)}
    lora = write_adapter(tmp_path / "lora", adapter_tensors(SHAPE) | rows)
    assert "embed_tokens has 423 rows, lm_head 421" in refusal(folder, lora)


def test_a_tied_model_is_untied_by_both_ends_and_not_by_one(tmp_path: Path) -> None:
    tied = replace(SHAPE, tied=True)
    folder = write_hugging_face(tmp_path / "m", tied)
    dice = np.random.default_rng(8)
    rows = {name: dice.normal(size=(421, 64)).astype(np.float32) for name in (EMBEDDING, HEAD)}
    lora = write_adapter(tmp_path / "lora", rows)
    found = values_of(open_hugging_face(folder, lora=lora))
    assert np.array_equal(found["token_embd.weight"], rows[EMBEDDING])
    assert np.array_equal(found["output.weight"], rows[HEAD])
    for name, which in ((EMBEDDING, "the embedding"), (HEAD, "the head")):
        write_adapter(lora, {name: rows[name]})
        assert f"changes {which} only" in refusal(folder, lora)


def test_the_adapter_is_part_of_the_identity(folder: Path, tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / "lora", adapter_tensors(SHAPE))
    source = open_hugging_face(folder, lora=lora)
    assert source.identity != open_hugging_face(folder).identity
    assert str(lora / "adapter_model.safetensors") in source.paths
    write_adapter(lora, adapter_tensors(SHAPE), config={"lora_alpha": 8})
    assert open_hugging_face(folder, lora=lora).identity != source.identity


def test_a_model_in_metas_order_takes_the_same_adapter(folder: Path, tmp_path: Path) -> None:
    """Meta's files have GGUF's order of rows, the adapter Hugging Face's: the same bytes come."""
    plain = open_hugging_face(folder)  # stands for Meta's: names and order are GGUF's
    tensors = adapter_tensors(SHAPE)
    tensors[EMBEDDING] = np.random.default_rng(8).normal(size=(421, 64)).astype(np.float32)
    lora = write_adapter(tmp_path / "lora", tensors)
    source = with_lora(plain, lora)
    found, expected = values_of(source), values_of(open_hugging_face(folder, lora=lora))
    assert all(np.array_equal(found[n], expected[n]) for n in expected)
    assert source.identity != plain.identity
    assert str(lora / "adapter_config.json") in source.paths
    write_adapter(lora, {name: np.ones((423, 64), np.float32) for name in (EMBEDDING, HEAD)})
    with pytest.raises(ModelError, match=r"423 rows of token_embd\.weight, the model has 421"):
        with_lora(plain, lora)
    write_hugging_face(folder, replace(SHAPE, tied=True))
    write_adapter(lora, {EMBEDDING: np.ones((421, 64), np.float32)})
    with pytest.raises(ModelError, match="which in this model is the head, too"):
        with_lora(open_hugging_face(folder), lora)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type LOHA is not supported (LORA)"),
        ({"peft_type": None}, "peft_type"),
        ({"r": 0}, "r is 0, expected a whole number from 1"),
        ({"r": "8"}, "r is '8', expected a whole number"),
        ({"r": None}, "r is nothing, expected a whole number"),
        ({"r": 8}, "lora_A.weight: shape [4, 64], r is 8 in adapter_config.json"),
        ({"lora_alpha": None}, "lora_alpha is nothing, expected a number"),
        ({"lora_alpha": -1}, "lora_alpha is -1, expected a number"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is not supported"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out is 1, expected true or false"),
        ({"bias": "all"}, "bias all is not supported (none)"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is not supported"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is not supported"),
        ({"layer_replication": [[0, 4]]}, "layer_replication is not supported"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights pissa: trained against changed weights",
        ),
        ({"init_lora_weights": ["x"]}, "init_lora_weights of another kind"),
    ],
)
def test_kinds_of_adapters_that_are_refused(
    folder: Path, tmp_path: Path, config: dict[str, object], message: str
) -> None:
    lora = write_adapter(tmp_path / "lora", adapter_tensors(SHAPE), config=config)
    assert message in refusal(folder, lora)


Change = Callable[[dict[str, F32]], object]
ONES = np.ones((4, 64), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_A), "q_proj.lora_B.weight without its other half"),
        (lambda t: t.pop(Q_B), "q_proj.lora_A.weight without its other half"),
        (lambda t: t.update({Q_A: ONES[:3]}), "lora_A.weight: shape [3, 64], r is 4"),
        (lambda t: t.update({Q_B: ONES}), "lora_B.weight: shape [4, 64], r is 4"),
        (lambda t: t.update({Q_A: ONES[:, :60]}), "attn_q.weight: a change of shape [64, 60]"),
        (lambda t: t.update({Q_A: ONES[0]}), "lora_A.weight: shape [64], r is 4"),
        (
            lambda t: t.update(
                {
                    Q_A.replace("layers.0", "layers.9"): ONES,
                    Q_B.replace("layers.0", "layers.9"): ONES.T.copy(),
                }
            ),
            "changes blk.9.attn_q.weight, which the model does not have",
        ),
        (lambda t: t.update({Q_A.replace("q_proj", "c_attn"): ONES}), "changes no part of a model"),
        (lambda t: t.update({"base_model.model.x.lora_magnitude_vector": ONES}), "is no part of a"),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": ONES}),
            "is no part of a LoRA adapter",
        ),
        (lambda t: t.update({"model.norm.weight": ONES[0]}), "is no part of a LoRA adapter"),
        (
            lambda t: t.update({Q_A.replace("lora_A.", "lora_A.default."): ONES}),
            "are the same tensor",
        ),
        (
            lambda t: t.update({Q_A.replace(".lora_A", ""): np.ones((64, 64), np.float32)}),
            "blk.0.attn_q.weight is changed and replaced",
        ),
        (lambda t: t.update({EMBEDDING: ONES[:, :60]}), "embed_tokens.weight: shape [4, 60]"),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": ONES[0, :3]}),
            "norm.weight: shape [3], the model's is [64]",
        ),
        (lambda t: t.clear(), "an adapter that changes nothing"),
    ],
)
def test_tensors_that_do_not_fit(
    folder: Path, tmp_path: Path, change: Change, message: str
) -> None:
    tensors = adapter_tensors(SHAPE)
    change(tensors)
    lora = write_adapter(tmp_path / "lora", tensors, config={"r": 4})
    assert message in refusal(folder, lora)


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = replace(SHAPE, dim=96, n_heads=6, n_kv_heads=3)
    lora = write_adapter(tmp_path / "lora", adapter_tensors(other))
    assert "a change of shape [96, 96], the model's is [64, 64]" in refusal(folder, lora)


def test_folders_that_are_no_adapter(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"adapter_config\.json: no such file"):
        open_hugging_face(folder, lora=folder)
    lora = write_adapter(tmp_path / "lora", adapter_tensors(SHAPE))
    (lora / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors and no adapter_model.bin" in refusal(folder, lora)


def test_damaged_adapters_are_refused_or_merged(folder: Path, tmp_path: Path) -> None:
    """600 adapters with values of the config and bytes of the header changed: only ModelError."""
    dice = random.Random(12)
    lora = write_adapter(tmp_path / "lora", adapter_tensors(SHAPE))
    config = json.loads((lora / "adapter_config.json").read_text())
    good = (lora / "adapter_model.safetensors").read_bytes()
    header_bytes = int.from_bytes(good[:8], "little")
    keys = [*config, "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "layer_replication"]
    values = [0, -1, 1, 4, 2**70, 1e300, 0.5, "", "x", None, True, [], [1], {}, {"a": 1}]
    lines, n_read = [], 0
    for turn in range(600):
        damaged = bytearray(good)
        if turn % 2:
            for _ in range(dice.randint(1, 3)):
                damaged[8 + dice.randrange(header_bytes)] = dice.randrange(256)
        changes = {dice.choice(keys): dice.choice(values) for _ in range(dice.randint(0, 2))}
        (lora / "adapter_config.json").write_text(json.dumps(config | changes))
        (lora / "adapter_model.safetensors").write_bytes(damaged)
        try:
            for tensor in open_hugging_face(folder, lora=lora).tensors:
                assert tensor.read(0, 1)
            n_read += 1
        except ModelError as e:
            lines.append(e.message)
    assert all(line.isprintable() for line in lines)
    assert 50 < n_read < 500
