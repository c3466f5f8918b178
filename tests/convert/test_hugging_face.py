"""A Hugging Face folder becomes the model that its maker trained, or is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from potluck import gguf
from potluck.convert.hugging_face import open_hugging_face
from potluck.errors import ModelError
from potluck.model import config_of
from potluck.model_writer import write_model
from potluck.tensor_source import ModelSource, rows_and_cols
from potluck.testing import (
    Oracle,
    Tensor,
    TinyShape,
    tiny_metadata,
    tiny_tensors,
    write_gguf,
    write_tiny,
)
from potluck.testing.checkpoints import changed_config, hugging_face_tensors, write_hugging_face
from potluck.testing.safetensors import Stored, indices, stored, write_safetensors
from potluck.testing.torch_file import TorchTensor, write_torch
from potluck.type_mix import choice_of

if TYPE_CHECKING:
    from tests.convert.conftest import Logits

SHAPE = TinyShape(weight_type="f32", vocabulary="spm", n_layers=2, seed=3)
TOKENS = [1, *range(300, 360)]


def data_of(source: ModelSource) -> dict[str, bytes]:
    """All tensors' bytes, read in slabs of 5 rows."""
    return {
        t.name: b"".join(
            bytes(t.read(at, min(5, rows - at)))
            for rows, _ in [rows_and_cols(t.shape)]
            for at in range(0, rows, 5)
        )
        for t in source.tensors
    }


def converted(folder: Path, out: Path, type_name: str = "f32") -> gguf.GgufFile:
    write_model(open_hugging_face(folder), out, choice_of(type_name))
    return gguf.read(out)


def metadata_of(source: ModelSource) -> dict[str, Any]:
    assert len(dict(source.metadata)) == len(source.metadata)
    return dict(source.metadata)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_hugging_face(folder)
    assert str(folder) in caught.value.message
    assert caught.value.message.isprintable()
    return caught.value.message


def with_tensors(folder: Path, tensors: Mapping[str, Stored]) -> Path:
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def stored_tensors(shape: TinyShape = SHAPE) -> dict[str, Stored]:
    return {name: stored(values) for name, values in hugging_face_tensors(shape).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hugging_face(tmp_path / "tiny-llama", SHAPE)


@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16"])
def test_weights_are_those_of_the_same_model_in_gguf(tmp_path: Path, type_name: str) -> None:
    shape = replace(SHAPE, weight_type=type_name, dim=48, n_heads=6, n_kv_heads=3, head_dim=10)
    source = open_hugging_face(write_hugging_face(tmp_path / "m", shape))
    expected = {t.name: t for t in tiny_tensors(shape)}
    found = data_of(source)
    assert found.keys() == expected.keys()
    for tensor in source.tensors:
        assert tensor.shape == expected[tensor.name].shape
        assert tensor.type_name == type_name
        if len(tensor.shape) > 1:
            assert found[tensor.name] == expected[tensor.name].data


def test_rows_come_alike_in_slabs_of_any_size(folder: Path) -> None:
    q = next(t for t in open_hugging_face(folder).tensors if t.name == "blk.1.attn_q.weight")
    rows = q.shape[0]
    whole = bytes(q.read(0, rows))
    row_bytes = len(whole) // rows
    for n in (1, 3, 7, 16, 33):
        pieces = [bytes(q.read(at, min(n, rows - at))) for at in range(0, rows, n)]
        assert [len(p) for p in pieces[:-1]] == [n * row_bytes] * (len(pieces) - 1)
        assert b"".join(pieces) == whole
    assert q.read(4, 0) == b""


def test_logits_are_those_of_hugging_faces_own_order(
    folder: Path, tmp_path: Path, logits: Logits
) -> None:
    """An oracle that pairs values i and i + head_dim/2 reads Hugging Face's weights as they are."""
    tensors = {t.name: t for t in tiny_tensors(SHAPE)}
    raw = hugging_face_tensors(SHAPE)
    for i in range(SHAPE.n_layers):
        for letter, theirs in (("q", "q_proj"), ("k", "k_proj")):
            values = raw[f"model.layers.{i}.self_attn.{theirs}.weight"]
            name = f"blk.{i}.attn_{letter}.weight"
            assert tensors[name].data != values.tobytes()
            tensors[name] = Tensor(name, "f32", values.shape, values.tobytes())
    found = logits(converted(folder, tmp_path / "ours.gguf"), TOKENS)
    as_they_are = gguf.read(
        write_gguf(
            tmp_path / "raw.gguf",
            tiny_metadata(SHAPE),
            list(tensors.values()),
        )
    )
    halves = replace(config_of(as_they_are), rope_interleaved=False)
    expected = Oracle(as_they_are, halves).logits(TOKENS)
    assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()
    tiny = gguf.read(write_tiny(tmp_path / "tiny.gguf", SHAPE))
    assert np.array_equal(found, logits(tiny, TOKENS))


def test_metadata_is_what_llama_cpps_converter_writes(folder: Path) -> None:
    found = metadata_of(open_hugging_face(folder))
    assert {k: v for k, v in found.items() if not k.startswith("tokenizer.")} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny-llama",
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10_000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": 421,
        "llama.rope.dimension_count": 16,
    }
    assert len(found["tokenizer.ggml.tokens"]) == 421
    assert "[INST]" in found["tokenizer.chat_template"]


def test_a_head_size_that_is_stated_is_written(folder: Path) -> None:
    found = metadata_of(open_hugging_face(changed_config(folder, head_dim=16)))
    assert found["llama.attention.key_length"] == found["llama.attention.value_length"] == 16


def test_the_model_is_named_as_its_folder_or_as_asked(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--Some-Model" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    assert metadata_of(open_hugging_face(snapshot))["general.name"] == "Some-Model"
    assert metadata_of(open_hugging_face(snapshot, name="Mine"))["general.name"] == "Mine"


@pytest.mark.parametrize("n_files", [2, 5])
def test_shards_give_what_one_file_gives(folder: Path, tmp_path: Path, n_files: int) -> None:
    shards = write_hugging_face(tmp_path / "shards", SHAPE, n_files=n_files)
    assert data_of(open_hugging_face(shards)) == data_of(open_hugging_face(folder))
    assert len(open_hugging_face(shards).paths) == n_files + 4


def test_files_of_torch_give_the_same(folder: Path, tmp_path: Path) -> None:
    expected = data_of(open_hugging_face(folder))
    tensors = [
        TorchTensor(name, "f32", values.shape, values.tobytes())
        for name, values in hugging_face_tensors(SHAPE).items()
    ]
    (folder / "model.safetensors").unlink()
    write_torch(folder / "pytorch_model.bin", tensors)
    assert data_of(open_hugging_face(folder)) == expected
    (folder / "pytorch_model.bin").unlink()
    weight_map: dict[str, str] = {}
    for i, part in enumerate((tensors[:9], tensors[9:])):
        file_name = f"pytorch_model-{i + 1:05}-of-00002.bin"
        write_torch(folder / file_name, part)
        weight_map |= dict.fromkeys((t.name for t in part), file_name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert data_of(open_hugging_face(folder)) == expected


def test_a_changed_file_is_another_identity(folder: Path) -> None:
    before = open_hugging_face(folder).identity
    assert open_hugging_face(folder).identity == before
    changed_config(folder, rope_theta=20_000.0)
    assert open_hugging_face(folder).identity != before


def test_names_without_their_prefix_are_known(folder: Path) -> None:
    plain = {name.removeprefix("model."): t for name, t in stored_tensors().items()}
    expected = data_of(open_hugging_face(folder))
    assert data_of(open_hugging_face(with_tensors(folder, plain))) == expected


def test_buffers_of_older_files_are_passed_over(folder: Path) -> None:
    older = stored_tensors()
    older["model.layers.0.self_attn.rotary_emb.inv_freq"] = stored(np.ones(8, np.float32))
    older["model.embeddings.position_ids"] = indices(5)
    expected = data_of(open_hugging_face(folder))
    assert data_of(open_hugging_face(with_tensors(folder, older))) == expected


def test_a_tied_model_has_no_head_though_its_file_may(tmp_path: Path) -> None:
    tied = replace(SHAPE, tied=True)
    folder = write_hugging_face(tmp_path / "m", tied)
    assert "output.weight" not in data_of(open_hugging_face(folder))
    both = stored_tensors(tied)
    both["lm_head.weight"] = both["model.embed_tokens.weight"]
    assert "output.weight" not in data_of(open_hugging_face(with_tensors(folder, both)))
    assert config_of(converted(folder, tmp_path / "x.gguf")).tied_embeddings


def test_alpacas_added_token_has_its_row(tmp_path: Path) -> None:
    """32,000 tokens and [PAD]: the embedding has 32,001 rows, tokenizer.model one fewer."""
    folder = write_hugging_face(tmp_path / "alpaca", SHAPE, n_tokens=SHAPE.vocab - 1)
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": SHAPE.vocab - 1}))
    config = config_of(converted(folder, tmp_path / "x.gguf"))
    file = gguf.read(tmp_path / "x.gguf")
    assert config.vocab == SHAPE.vocab
    assert file.array("tokenizer.ggml.tokens", str)[-1] == "[PAD]"


def test_an_embedding_padded_to_a_multiple_of_64_gets_unused_tokens(tmp_path: Path) -> None:
    shape = replace(SHAPE, vocab=448)
    folder = write_hugging_face(tmp_path / "m", shape, n_tokens=421)
    pairs = metadata_of(open_hugging_face(folder))
    assert pairs["tokenizer.ggml.tokens"][-1] == "[PAD447]"
    assert pairs["tokenizer.ggml.token_type"][-27:] == [5] * 27


def test_the_first_conversions_of_llama_are_known(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key in ("max_position_embeddings", "num_key_value_heads", "rope_theta", "rope_scaling"):
        del config[key]
    config |= {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048}
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    found = refusal(folder)  # num_attention_heads 2: so as many KV heads, of 32 values
    assert "k_proj.weight: shape [32, 64], config.json implies [64, 64]" in found
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2}))
    pairs = metadata_of(open_hugging_face(folder))
    assert (pairs["llama.context_length"], pairs["llama.rope.freq_base"]) == (2048, 10_000.0)


def test_mistral_says_that_its_window_is_smaller(folder: Path) -> None:
    changed_config(folder, architectures=["MistralForCausalLM"], sliding_window=64)
    source = open_hugging_face(folder)
    assert metadata_of(source)["general.architecture"] == "llama"
    assert "look back 64 tokens" in source.notes[0]
    changed_config(folder, sliding_window=None)
    assert open_hugging_face(folder).notes == ()


# Other architectures, and what stretches positions

LLAMA3 = (("rope_type", "llama3"), ("factor", 8.0), ("original_max_position_embeddings", 64))
SCALINGS: dict[str, tuple[tuple[str, object], ...]] = {
    "none": (),
    "linear": (("type", "linear"), ("factor", 4.0)),
    "yarn": (("type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 16)),
    "llama3": LLAMA3,
}
OTHERS = {
    "llama with biases": replace(SHAPE, biases=True),
    "qwen2": replace(SHAPE, architecture="qwen2"),
    "qwen2 tied": replace(SHAPE, architecture="qwen2", tied=True),
    "qwen3": replace(SHAPE, architecture="qwen3", head_dim=24),
}


@pytest.mark.parametrize("shape", OTHERS.values(), ids=OTHERS)
def test_other_architectures_are_those_of_the_same_model_in_gguf(
    tmp_path: Path, logits: Logits, shape: TinyShape
) -> None:
    folder = write_hugging_face(tmp_path / "m", shape)
    found = data_of(open_hugging_face(folder))
    assert found == {t.name: t.data for t in tiny_tensors(shape)}
    file = converted(folder, tmp_path / "x.gguf")
    tiny = gguf.read(write_tiny(tmp_path / "tiny.gguf", shape))
    assert np.array_equal(logits(file, TOKENS), logits(tiny, TOKENS))


@pytest.mark.parametrize("shape", [SHAPE, *OTHERS.values()], ids=["llama", *OTHERS])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_logits_are_those_of_the_oracle(
    tmp_path: Path, logits: Logits, shape: TinyShape, scaling: str
) -> None:
    """What positions do to LLaMA's heads and to Qwen's, with every scaling that is known."""
    config = {"rope_scaling": dict(SCALINGS[scaling]) or None}
    folder = write_hugging_face(tmp_path / "m", shape, config=config)
    if scaling == "llama3" and shape.architecture != "llama":  # GGUF's Qwen has no such tensor
        assert "rope scaling llama3 is not supported for qwen" in refusal(folder)
        return
    file = converted(folder, tmp_path / "x.gguf")
    expected = Oracle(file, config_of(file)).logits(TOKENS)
    found = logits(file, TOKENS)
    assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()
    plain = gguf.read(write_tiny(tmp_path / "tiny.gguf", shape))
    assert np.array_equal(found, logits(plain, TOKENS)) == (scaling == "none")


@pytest.mark.parametrize("version", [2, 3])
def test_qwens_metadata_and_window(tmp_path: Path, version: int) -> None:
    shape = replace(SHAPE, architecture=f"qwen{version}")
    folder = write_hugging_face(tmp_path / "m", shape, config={"sliding_window": 32})
    source = open_hugging_face(folder)
    pairs = metadata_of(source)
    assert pairs["general.architecture"] == f"qwen{version}"
    assert pairs[f"qwen{version}.embedding_length"] == 64
    assert f"qwen{version}.rope.dimension_count" not in pairs
    assert source.notes == ()  # use_sliding_window is not set, so Qwen has no window
    noted = open_hugging_face(changed_config(folder, use_sliding_window=True))
    assert "look back 32 tokens" in noted.notes[0]


def test_biases_that_do_not_belong_or_are_missing_are_refused(tmp_path: Path) -> None:
    qwen2 = write_hugging_face(tmp_path / "q", OTHERS["qwen2"])
    changed_config(qwen2, architectures=["LlamaForCausalLM"])
    assert "q_proj.bias is no part of a llama model" in refusal(qwen2)
    llama = changed_config(write_hugging_face(tmp_path / "l", SHAPE), attention_bias=True)
    assert "missing blk.0.attn_q.bias" in refusal(llama)
    changed_config(llama, architectures=["Qwen3ForCausalLM"])
    assert "attention_bias true is not supported for qwen3" in refusal(llama)


def test_the_whole_way_to_a_file_in_f16(folder: Path, tmp_path: Path) -> None:
    file = converted(folder, tmp_path / "x.gguf", "f16")
    assert config_of(file).name == "tiny-llama"
    types = {t.type_name for t in file.tensors.values()}
    assert types == {"f32", "f16"}
    norm = hugging_face_tensors(SHAPE)["model.norm.weight"]
    tensor = file.tensors["output_norm.weight"]
    with file.path.open("rb") as opened:
        opened.seek(tensor.offset_bytes)
        assert opened.read(tensor.size_bytes) == norm.tobytes()
