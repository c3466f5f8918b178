"""What a model file must hold, and how much of it a span needs."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from potluck import gguf, model
from potluck.errors import ModelError, PlanError
from potluck.model import KvType, ModelConfig, config_of
from potluck.plan import Span
from potluck.testing import Tensor, TinyShape, Typed, tiny_metadata, tiny_tensors, write_gguf
from potluck.testing.writer import Metadata

SHAPE = TinyShape(n_layers=3)
LLAMA_7B = ModelConfig(
    name="7B",
    architecture="llama",
    dim=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=32,
    head_dim=128,
    ffn_dim=11008,
    vocab=32000,
    context_tokens=2048,
    norm_eps=1e-6,
    rope_theta=10_000.0,
    rope_dim=128,
    rope_interleaved=True,
    tied_embeddings=False,
)


def written(
    folder: Path,
    shape: TinyShape = SHAPE,
    *,
    put: dict[str, Metadata] | None = None,
    without: tuple[str, ...] = (),
    tensors: dict[str, Tensor] | None = None,
) -> gguf.GgufFile:
    """A tiny model with metadata `put`, keys and tensors left out, tensors replaced or added."""
    pairs = dict(tiny_metadata(shape)) | (put or {})
    by_name = {t.name: t for t in tiny_tensors(shape)} | (tensors or {})
    return gguf.read(
        write_gguf(
            folder / "x.gguf",
            [(k, v) for k, v in pairs.items() if k not in without],
            [t for t in by_name.values() if t.name not in without],
        )
    )


def zeros(name: str, *shape: int) -> Tensor:
    n = 1
    for size in shape:
        n *= size
    return Tensor(name, "f32", shape, bytes(4 * n))


@pytest.mark.parametrize("tied", [True, False])
def test_the_config_is_what_was_written(tmp_path: Path, *, tied: bool) -> None:
    shape = replace(SHAPE, tied=tied, rope_dim=8, rope_theta=5e5)
    config = config_of(written(tmp_path, shape))
    for f in fields(ModelConfig):
        if hasattr(shape, f.name) and f.name != "norm_eps":
            assert getattr(config, f.name) == getattr(shape, f.name)
    assert config.norm_eps == pytest.approx(1e-5)
    assert config.tied_embeddings is tied
    assert config.rope_interleaved


def test_missing_keys_take_the_format_s_defaults(tmp_path: Path) -> None:
    shape = replace(SHAPE, n_kv_heads=4)
    heads, name = "llama.attention.head_count_kv", "general.name"
    rope = ("llama.rope.freq_base", "llama.rope.dimension_count")
    config = config_of(written(tmp_path, shape, without=(*rope, heads, name)))
    assert (config.rope_theta, config.rope_dim, config.n_kv_heads) == (10_000.0, 16, 4)
    assert config.name == "x"


def test_heads_need_not_fill_the_embedding(tmp_path: Path) -> None:
    shape = TinyShape("f32", dim=50, n_heads=3, n_kv_heads=3, head_dim=10, ffn_dim=33)
    config = config_of(written(tmp_path, shape))
    assert (config.dim, config.n_heads, config.head_dim) == (50, 3, 10)


@pytest.mark.parametrize("value", ["none"])
def test_metadata_that_changes_nothing_is_no_obstacle(tmp_path: Path, value: str) -> None:
    put: dict[str, Metadata] = {
        "llama.rope.scaling.type": value,
        "llama.rope.scaling.factor": 1.0,
        "llama.expert_count": 0,
        "llama.attention.sliding_window": 256,  # what a position sees at most
        "some.other.key": [1, 2],
    }
    harmless = zeros("blk.0.attn_rot_embd.weight", 8)
    config_of(written(tmp_path, put=put, tensors={harmless.name: harmless}))


METADATA: list[tuple[dict[str, Metadata], str]] = [
    ({"general.architecture": "gpt2"}, "architecture gpt2 is not supported (llama, qwen2, qwen3)"),
    ({"general.architecture": 7}, "general.architecture is int 7, expected a string"),
    ({"general.name": 3}, "general.name is int 3, expected a string"),
    ({"llama.block_count": 0}, "block_count is 0, expected 1 to 4,096"),
    ({"llama.block_count": 10**9}, "block_count is 1000000000, expected 1 to 4,096"),
    ({"llama.block_count": Typed("i32", -1)}, "block_count is -1, expected 1 to 4,096"),
    ({"llama.block_count": 3.0}, "block_count is float 3.0, expected a whole number"),
    ({"llama.block_count": True}, "block_count is bool True, expected a whole number"),
    ({"llama.block_count": "3"}, "block_count is str 3, expected a whole number"),
    ({"llama.block_count": [3]}, "block_count is an array of 1 int, expected a whole number"),
    ({"llama.block_count": 4}, "missing blk.3.attn_norm.weight"),
    ({"llama.block_count": 2}, "tensor blk.2.attn_norm.weight is no part of a llama model of 2"),
    ({"llama.embedding_length": 63}, "4 heads do not divide embedding_length 63"),
    ({"llama.embedding_length": 0}, "embedding_length is 0"),
    ({"llama.embedding_length": 128}, "token_embd.weight: shape [421, 64], expected [421, 128]"),
    ({"llama.attention.head_count": 0}, "0 heads do not divide embedding_length 64"),
    ({"llama.attention.head_count": 5}, "5 heads do not divide embedding_length 64"),
    ({"llama.attention.head_count": 64}, "heads of 1 values"),
    ({"llama.attention.head_count_kv": 3}, "3 KV heads do not divide 4 heads"),
    ({"llama.attention.head_count_kv": 0}, "attention.head_count_kv is 0"),
    ({"llama.attention.head_count_kv": 4}, "attn_k.weight: shape [32, 64], expected [64, 64]"),
    ({"llama.attention.head_count_kv": [2, 2, 2]}, "head_count_kv is an array of 3 int"),
    ({"llama.attention.key_length": 32}, "attn_q.weight: shape [64, 64], expected [128, 64]"),
    ({"llama.attention.key_length": 15}, "heads of 15 values"),
    ({"llama.attention.value_length": 8}, "values of 8 and keys of 16 a head"),
    ({"llama.feed_forward_length": 64}, "ffn_gate.weight: shape [96, 64], expected [64, 64]"),
    ({"llama.feed_forward_length": 0}, "feed_forward_length is 0"),
    ({"llama.context_length": 0}, "context_length is 0"),
    ({"llama.context_length": Typed("u64", 2**63)}, "context_length is 9223372036854775808"),
    ({"llama.rope.dimension_count": 15}, "heads of 16 values, 15 of them rotated"),
    ({"llama.rope.dimension_count": 18}, "heads of 16 values, 18 of them rotated"),
    ({"llama.rope.dimension_count": 0}, "rope.dimension_count is 0"),
    ({"llama.rope.freq_base": 0.0}, "rope base 0.0"),
    ({"llama.rope.freq_base": float("nan")}, "freq_base is float nan, expected a finite number"),
    ({"llama.rope.freq_base": float("inf")}, "freq_base is float inf, expected a finite number"),
    ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "norm epsilon 0.0"),
    ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "norm epsilon -1.0"),
    ({"llama.attention.layer_norm_rms_epsilon": "x"}, "epsilon is str x, expected a finite number"),
    ({"llama.vocab_size": 420}, "vocab_size is 420, token_embd.weight has 421 rows"),
    ({"tokenizer.ggml.tokens": ["a"] * 422}, "the tokenizer has 422 tokens, the model 421"),
    (
        {"tokenizer.ggml.tokens": [1] * 421},
        "tokens is an array of 421 int, expected an array of str",
    ),
    ({"llama.expert_count": 8}, "llama.expert_count is 8; only 0 is supported"),
    ({"llama.attention.scale": 0.5}, "llama.attention.scale is 0.5; only 0 is supported"),
    ({"llama.final_logit_softcapping": 30.0}, "logit_softcapping is 30; only 0 is supported"),
    (
        {"llama.attention.sliding_window": 128},
        "sliding_window is 128; only 0 or the whole context of 256 is supported",
    ),
    ({"llama.attention.sliding_window": Typed("i32", -1)}, "sliding_window is -1; only 0 or"),
    ({"llama.attention.causal": False}, "llama.attention.causal is false"),
    ({"split.count": 3}, "one of 3 parts of a model"),
]


@pytest.mark.parametrize(("put", "names"), METADATA, ids=lambda v: str(v)[:50])
def test_wrong_metadata_is_refused_by_name(
    tmp_path: Path, put: dict[str, Metadata], names: str
) -> None:
    with pytest.raises(ModelError) as caught:
        config_of(written(tmp_path, put=put))
    assert names in caught.value.message
    assert "x.gguf: " in caught.value.message
    assert caught.value.message.count("x.gguf") == 1
    assert caught.value.message.isprintable()


REQUIRED = ["general.architecture"] + [
    f"llama.{key}"
    for key in (
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "context_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    )
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ModelError, match=f"missing metadata key {key}"):
        config_of(written(tmp_path, without=(key,)))


@pytest.mark.parametrize("name", [t.name for t in tiny_tensors(SHAPE) if t.name != model.HEAD])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=rf"x\.gguf: missing {name}"):
        config_of(written(tmp_path, without=(name,)))


@pytest.mark.parametrize("name", [t.name for t in tiny_tensors(SHAPE)])
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, name: str) -> None:
    wrong = zeros(name, 3, 32)
    # Rows of the embedding are the vocabulary, so that one shows as another vocabulary.
    expected = "vocab_size is 421" if name == model.EMBEDDING else f"{name}: shape"
    with pytest.raises(ModelError, match=expected):
        config_of(written(tmp_path, tensors={name: wrong}))


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("blk.1.attn_q.bias", "tensor blk.1.attn_q.bias is no part of a llama model of 3 layers"),
        ("blk.0.ffn_up.bias", "tensor blk.0.ffn_up.bias is no part of a llama model of 3 layers"),
        ("blk.0.attn_q_norm.weight", "tensor blk.0.attn_q_norm.weight is no part of a llama"),
        ("blk.0.ffn_gate_exps.weight", "tensor blk.0.ffn_gate_exps.weight is no part"),
        ("blk.3.attn_q.weight", "tensor blk.3.attn_q.weight is no part"),
    ],
)
def test_a_tensor_that_would_be_ignored_is_refused(tmp_path: Path, name: str, names: str) -> None:
    with pytest.raises(ModelError, match=names):
        config_of(written(tmp_path, tensors={name: zeros(name, 8)}))


def test_a_type_the_engine_lacks_is_named(tmp_path: Path) -> None:
    wrong = Tensor("blk.1.attn_q.weight", "iq4_nl", (64, 64), bytes(64 * 64 // 32 * 18))
    with pytest.raises(
        ModelError, match=r"blk\.1\.attn_q\.weight: type iq4_nl is not supported \(f32"
    ):
        config_of(written(tmp_path, tensors={wrong.name: wrong}))


def test_a_norm_that_is_not_f32_is_named(tmp_path: Path) -> None:
    wrong = Tensor("blk.1.attn_norm.weight", "f16", (64,), bytes(128))
    with pytest.raises(ModelError, match=r"blk\.1\.attn_norm\.weight: type f16 is not supported"):
        config_of(written(tmp_path, tensors={wrong.name: wrong}))


@pytest.mark.parametrize("tied", [True, False])
def test_spans_hold_each_tensor_once(tmp_path: Path, *, tied: bool) -> None:
    file = written(tmp_path, replace(SHAPE, tied=tied))
    config = config_of(file)

    def names(start: int, stop: int, **ends: bool) -> list[str]:
        span = Span(start, stop)
        return [t.name for t in model.span_tensors(file, config, span, **ends)]

    first = names(0, 1, embeds=True, has_head=False)
    middle = names(1, 2, embeds=False, has_head=False)
    last = names(2, 3, embeds=False, has_head=True)
    whole = names(0, 3, embeds=True, has_head=True)
    assert sorted(set(first + middle + last)) == sorted(whole) == sorted(file.tensors)
    assert len(whole) == len(set(whole))
    assert len(middle) == 9
    assert (model.EMBEDDING in last) is tied


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_add_up_to_the_file_s(tmp_path: Path, *, tied: bool) -> None:
    file = written(tmp_path, replace(SHAPE, tied=tied))
    config = config_of(file)
    layers = sum(model.layer_bytes(file, config, layer) for layer in range(config.n_layers))
    ends = model.embedding_bytes(file, config) + model.head_bytes(file, config)
    twice = model.embedding_bytes(file, config) if tied else 0
    assert layers + ends - twice == sum(t.size_bytes for t in file.tensors.values())


def test_kv_bytes_follow_the_formula() -> None:
    assert model.kv_bytes_per_token(LLAMA_7B, Span(0, 32)) == 524_288
    assert model.kv_bytes_per_token(replace(LLAMA_7B, n_kv_heads=8), Span(3, 5)) == 8192
    assert model.kv_bytes_per_token(LLAMA_7B, Span(0, 32), KvType.Q8) == 270_336
    assert KvType.Q8.head_bytes(22) == 24 + 4  # codes lie in fours


def test_a_span_beyond_the_model_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path)
    config = config_of(file)
    with pytest.raises(PlanError, match=r"span \[2, 4\) ends beyond the model's 3 layers"):
        model.kv_bytes_per_token(config, Span(2, 4))
    with pytest.raises(PlanError, match="beyond"):
        model.layer_bytes(file, config, 3)


@pytest.mark.parametrize(
    "change",
    [{"dim": 0}, {"vocab": -1}, {"n_kv_heads": 5}, {"head_dim": 7}, {"norm_eps": float("nan")}],
)
def test_a_config_refuses_to_be_wrong(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        replace(LLAMA_7B, **change)


@pytest.mark.parametrize(
    ("shape", "vectors"),
    [
        (replace(SHAPE, architecture="qwen2"), {"attn_q.bias", "attn_k.bias", "attn_v.bias"}),
        (replace(SHAPE, architecture="qwen3"), {"attn_q_norm.weight", "attn_k_norm.weight"}),
        (
            replace(SHAPE, biases=True),
            {"attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"},
        ),
    ],
    ids=["qwen2", "qwen3", "llama with biases"],
)
def test_each_architecture_has_its_vectors_and_misses_none(
    tmp_path: Path, shape: TinyShape, vectors: set[str]
) -> None:
    file = written(tmp_path, shape)
    config = config_of(file)
    assert config.architecture == shape.architecture
    assert config.rope_interleaved is (shape.architecture == "llama")
    tensors = model.span_tensors(file, config, Span(1, 2), embeds=False, has_head=False)
    names = {t.name.removeprefix("blk.1.") for t in tensors}
    assert {n for n in names if "bias" in n or "_q_norm" in n or "_k_norm" in n} == vectors
    assert model.layer_bytes(file, config, 1) == sum(t.size_bytes for t in tensors)
    for vector in vectors:
        wrong = zeros(f"blk.1.{vector}", 8)
        with pytest.raises(ModelError, match=rf"{wrong.name}: shape \[8\], expected"):
            config_of(written(tmp_path, shape, tensors={wrong.name: wrong}))
        with pytest.raises(ModelError, match=f"missing {wrong.name}"):
            config_of(written(tmp_path, shape, without=(wrong.name,)))


def test_smollm2_is_what_its_card_says(smollm2: Path) -> None:
    config = config_of(gguf.read(smollm2))
    assert (config.dim, config.n_layers, config.n_heads, config.n_kv_heads) == (576, 30, 9, 3)
    assert (config.ffn_dim, config.vocab, config.context_tokens) == (1536, 49_152, 8192)
    assert config.tied_embeddings
