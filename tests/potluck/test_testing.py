"""What tests stand on: quantizers, dequantizers, tiny models, the oracle; each checked itself."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
import sentencepiece
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from potluck import blocks, gguf
from potluck.model import WEIGHT_TYPES, ModelConfig, config_of
from potluck.testing import (
    Oracle,
    OracleKv,
    TinyShape,
    dequantize,
    quantize,
    tensor_values,
    tiny_metadata,
    tiny_tensors,
    write_tiny,
)
from potluck.testing.oracle import rotate
from potluck.testing.vocabulary import LEAST_TOKENS, vocabulary

TEXT = "The potluck is on: an older man and the luck of it. Grüße, 中文 👋\n\tx = 3.14"
# Largest error of a quantizer over the largest value: half a step of its bits, or rounding.
ERRORS = {"f32": 0.0, "f16": 5e-4, "bf16": 4e-3, "q4_0": 0.125, "q4_1": 0.07, "q8_0": 5e-3}
ERRORS |= {"q5_0": 0.063, "q5_1": 0.035, "q2_k": 0.4, "q3_k": 0.26, "q4_k": 0.08, "q5_k": 0.05}
ERRORS |= {"q6_k": 0.035}


def random_values(rows: int, cols: int, seed: int = 1) -> NDArray[np.float32]:
    values = np.random.default_rng(seed).normal(size=(rows, cols)).astype(np.float32)
    assert len(np.unique(values)) > 0.9 * values.size
    return values


@pytest.mark.parametrize("type_name", WEIGHT_TYPES)
def test_dequantizers_equal_those_of_the_gguf_package(type_name: str) -> None:
    """On any bytes: all codes and scales, those that no quantizer writes too."""
    block = blocks.BY_NAME[type_name]
    data = np.random.default_rng(2).integers(0, 256, (500, block.size_bytes), dtype=np.uint8)
    kind = reference.GGMLQuantizationType[type_name.upper()]
    with np.errstate(all="ignore"):
        ours = dequantize(data.tobytes(), type_name)
        theirs = reference.dequantize(data, kind).reshape(-1)
        finite = np.isfinite(theirs)
        assert finite.mean() > 0.9
        # Theirs is f32 and rounds each product; ours rounds none.
        np.testing.assert_allclose(ours[finite], theirs[finite], rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("type_name", WEIGHT_TYPES)
def test_quantizers_stay_within_their_step(type_name: str) -> None:
    values = random_values(7, 512)
    back = dequantize(quantize(values, type_name), type_name).reshape(values.shape)
    worst = np.abs(back - values).max() / np.abs(values).max()
    # A quantizer that is far too good would be one that was not run.
    assert ERRORS[type_name] / 20 <= worst <= ERRORS[type_name]


@pytest.mark.parametrize("type_name", WEIGHT_TYPES)
def test_zeros_are_quantized_to_zeros(type_name: str) -> None:
    zeros = np.zeros((2, 256), dtype=np.float32)
    assert not dequantize(quantize(zeros, type_name), type_name).any()


def test_quantizers_meet_negative_scales_and_all_codes() -> None:
    data = np.frombuffer(quantize(random_values(64, 256), "q4_0"), dtype=np.uint8).reshape(-1, 18)
    scales = data[:, :2].copy().view("<f2")
    assert (scales < 0).any()
    assert (scales > 0).any()
    assert len(np.unique(data[:, 2:] & 15)) == len(np.unique(data[:, 2:] >> 4)) == 16


@pytest.mark.parametrize("type_name", ["iq4_nl", "nonsense"])
def test_types_without_a_quantizer_are_refused(type_name: str) -> None:
    with pytest.raises(ValueError, match=type_name):
        quantize(np.zeros((1, 32)), type_name)
    with pytest.raises(ValueError, match=type_name):
        dequantize(b"", type_name)


def test_columns_that_do_not_fill_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="33 columns are no multiple of 32"):
        quantize(np.zeros((1, 33)), "q4_0")


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    first, again = write_tiny(tmp_path / "a"), write_tiny(tmp_path / "b")
    other = write_tiny(tmp_path / "c", TinyShape(seed=2))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_weights_of_a_tiny_model_vary() -> None:
    datas = [t.data for t in tiny_tensors(TinyShape())]
    assert len(set(datas)) == len(datas)


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_tokens_of_a_vocabulary_are_unique_and_fill_it(kind: str) -> None:
    pairs = dict(vocabulary(kind, 500))
    tokens, kinds = pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(kinds, list)
    assert len(tokens) == len(set(tokens)) == len(kinds) == 500
    least = dict(vocabulary(kind, LEAST_TOKENS))["tokenizer.ggml.tokens"]
    assert isinstance(least, list)
    assert len(least) == LEAST_TOKENS


@pytest.mark.parametrize(("kind", "n_tokens"), [("bpe", 100), ("wordpiece", 500)])
def test_a_vocabulary_that_can_not_be_is_refused(kind: str, n_tokens: int) -> None:
    with pytest.raises(ValueError, match=r"100 tokens|wordpiece"):
        vocabulary(kind, n_tokens)


def test_the_byte_level_vocabulary_encodes_any_text(tmp_path: Path) -> None:
    file = gguf.read(write_tiny(tmp_path / "x.gguf"))
    tokens = file.array("tokenizer.ggml.tokens", str)
    merges = [(a, b) for a, b in map(str.split, file.array("tokenizer.ggml.merges", str))]
    ids = {token: i for i, token in enumerate(tokens)}
    assert all(a in ids and b in ids and a + b in ids for a, b in merges)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    encoded = tokenizer.encode(TEXT)
    assert tokenizer.decode(encoded.ids) == TEXT
    assert len(encoded.ids) < 0.8 * len(TEXT.encode())
    assert "Ġpotluck" in encoded.tokens


def test_the_sentencepiece_vocabulary_encodes_any_text(tmp_path: Path) -> None:
    file = gguf.read(write_tiny(tmp_path / "x.gguf", TinyShape(vocabulary="spm")))
    # Its generated module has no types that mypy could read.
    formats = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = formats.ModelProto()
    proto.trainer_spec.model_type = formats.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    for token, score, kind in zip(
        file.array("tokenizer.ggml.tokens", str),
        file.array("tokenizer.ggml.scores", float),
        file.array("tokenizer.ggml.token_type", int),
        strict=True,
    ):
        proto.pieces.add(piece=token, score=score, type=kind)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    ids = processor.encode(TEXT)
    assert processor.decode(ids) == TEXT
    assert "▁potluck" in [processor.id_to_piece(i) for i in ids]


def model_of(path: Path, shape: TinyShape) -> tuple[gguf.GgufFile, ModelConfig]:
    file = gguf.read(write_tiny(path / "x.gguf", shape))
    return file, config_of(file)


@pytest.mark.parametrize("type_name", WEIGHT_TYPES)
def test_weights_are_read_back_as_they_were_written(tmp_path: Path, type_name: str) -> None:
    shape = TinyShape(type_name, dim=256, head_dim=64, ffn_dim=256)
    file, _ = model_of(tmp_path, shape)
    for tensor in tiny_tensors(shape):
        values = tensor_values(file, tensor.name)
        assert values.shape == tensor.shape
        assert np.array_equal(values.reshape(-1), dequantize(tensor.data, tensor.type_name))
        assert 0.05 < values.std() < 2


def test_the_oracle_continues_a_timeline_as_if_it_were_whole(tmp_path: Path) -> None:
    file, config = model_of(tmp_path, TinyShape(n_layers=3))
    tokens = list(range(30, 60))
    whole, kv = Oracle(file, config).hidden(tokens), OracleKv()
    parts = [Oracle(file, config).hidden(tokens[a:b], kv) for a, b in ((0, 1), (1, 18), (18, 30))]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-9, atol=1e-12)
    assert kv.length == 30


def test_the_oracle_does_not_look_ahead(tmp_path: Path) -> None:
    file, config = model_of(tmp_path, TinyShape())
    one, other = [5, 6, 7, 8, 9], [5, 6, 7, 8, 300]
    a, b = Oracle(file, config).logits(one), Oracle(file, config).logits(other)
    np.testing.assert_allclose(a[:4], b[:4], rtol=1e-12)
    assert np.abs(a[4] - b[4]).max() > 0.1


def test_every_part_of_a_tiny_model_matters(tmp_path: Path) -> None:
    """Otherwise a comparison with the oracle would prove little."""
    file, config = model_of(tmp_path, TinyShape("f32", dim=48, head_dim=12))
    tokens = list(range(100, 140))
    logits = Oracle(file, config).logits(tokens)
    moved = {
        "positions": Oracle(file, replace(config, rope_theta=100.0)).logits(tokens),
        "layout": Oracle(file, replace(config, rope_interleaved=False)).logits(tokens),
        "rope_dim": Oracle(file, replace(config, rope_dim=6)).logits(tokens),
        "eps": Oracle(file, replace(config, norm_eps=0.1)).logits(tokens),
        "layers": Oracle(file, replace(config, n_layers=1)).logits(tokens),
        "order": Oracle(file, config).logits([*reversed(tokens[:-1]), tokens[-1]]),
    }
    for what, other in moved.items():
        assert np.abs(logits[-1] - other[-1]).max() > 0.1, what
    assert logits.std() > 1


def test_the_two_rope_layouts_are_one_rotation_of_permuted_values(tmp_path: Path) -> None:
    config = model_of(tmp_path, TinyShape(rope_dim=12))[1]
    x = random_values(9, 32).reshape(9, 2, 16).astype(np.float64)
    order = [*range(0, 12, 2), *range(1, 12, 2), *range(12, 16)]
    positions = np.arange(3, 12)
    one = rotate(x, positions, config)[..., order]
    other = rotate(x[..., order], positions, replace(config, rope_interleaved=False))
    np.testing.assert_allclose(one, other, rtol=1e-12)
    assert np.array_equal(one[..., 12:], x[..., 12:])


def test_rotation_keeps_lengths_and_depends_on_distance_only(tmp_path: Path) -> None:
    config = model_of(tmp_path, TinyShape())[1]
    q, k = random_values(1, 16).reshape(1, 1, 16), random_values(1, 16, seed=3).reshape(1, 1, 16)

    def score(q_position: int, k_position: int) -> float:
        turned_q = rotate(q.astype(np.float64), np.array([q_position]), config)
        turned_k = rotate(k.astype(np.float64), np.array([k_position]), config)
        assert np.linalg.norm(turned_q) == pytest.approx(np.linalg.norm(q))
        return float((turned_q * turned_k).sum())

    assert score(10, 3) == pytest.approx(score(1007, 1000))
    assert score(10, 3) != pytest.approx(score(11, 3))


def test_metadata_of_a_tiny_model_has_no_key_twice() -> None:
    for kind in ("bpe", "spm", ""):
        keys = [key for key, _ in tiny_metadata(TinyShape(vocabulary=kind, dim=48))]
        assert len(keys) == len(set(keys))
