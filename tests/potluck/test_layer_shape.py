"""Which layer is timed, and that no message makes a worker time anything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck import engine, gguf, model, synthetic
from potluck.errors import ModelError
from potluck.layer_shape import LayerShape, shape_of
from potluck.model import WEIGHT_TYPES, config_of
from potluck.rpc.measured import layer_shape_message, layer_shape_of
from potluck.rpc.v1 import types_pb2
from potluck.testing import TinyShape, write_tiny


def shape_named(name: str) -> LayerShape:
    file = synthetic.open_synthetic(name)
    return shape_of(file, config_of(file))


@pytest.mark.parametrize("name", ["65b-q4_0", "70b-q4_k_m", "tiny-f16"])
def test_the_heaviest_layer_is_timed(name: str) -> None:
    file = synthetic.open_synthetic(f"synthetic:{name}")
    config = config_of(file)
    shape = shape_of(file, config)
    sizes = [model.layer_bytes(file, config, i) for i in range(config.n_layers)]
    assert shape.layer_bytes == max(sizes)
    assert shape.head_bytes == model.head_bytes(file, config)


def test_a_head_that_is_the_embedding_is_timed_as_such(tmp_path: Path) -> None:
    file = gguf.read(write_tiny(tmp_path / "tied.gguf", TinyShape(tied=True)))
    config = config_of(file)
    assert config.tied_embeddings
    assert shape_of(file, config).head_bytes == model.head_bytes(file, config)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_shape_says_of_every_architecture_what_its_layers_have(
    tmp_path: Path, architecture: str
) -> None:
    path = write_tiny(tmp_path / "m.gguf", TinyShape(architecture=architecture))
    config = config_of(gguf.read(path))
    known = layer_shape_of(layer_shape_message(shape_of(gguf.read(path), config))).config
    said = (known.qkv_bias, known.output_bias, known.qk_norm)
    assert said == (config.qkv_bias, config.output_bias, config.qk_norm)
    assert model.layer_shapes(known) == model.layer_shapes(config)


def test_a_shape_survives_its_message() -> None:
    shape = shape_named("synthetic:8b-q4_k_m")
    assert layer_shape_of(layer_shape_message(shape)) == shape


def wrong(change: Callable[[Any], None]) -> types_pb2.LayerShape:
    message = layer_shape_message(shape_named("synthetic:7b-q4_0"))
    change(message)
    return message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "dim", 0), "embedding_length is 0"),
        (lambda m: setattr(m, "dim", 2**32 - 1), "embedding_length"),
        (lambda m: setattr(m, "vocab", 2**31), "vocab_size"),
        (lambda m: setattr(m, "n_layers", 0), "block_count"),
        (lambda m: setattr(m, "n_kv_heads", 3), "do not divide"),
        (lambda m: setattr(m, "head_dim", 127), "127"),
        (lambda m: setattr(m, "ffn_dim", 11009), "11009 columns of q4_0"),
        (lambda m: setattr(m, "head_type", "q9_9"), "type q9_9"),
        (lambda m: setattr(m, "head_type", ""), "output.weight: type"),
        (lambda m: setattr(m.matrices[1], "type_name", "iq2_xxs"), "iq2_xxs"),
        (lambda m: setattr(m.matrices[0], "type_name", "q4_0"), "expected f32"),
        (lambda m: setattr(m.matrices[1], "name", "ssm_conv.weight"), "ssm_conv.weight"),
        (lambda m: setattr(m.matrices[1], "name", "x" * 10**6), "xxx..."),
        (lambda m: setattr(m.matrices[1], "name", "attn_k.weight"), "9 tensors"),
        (lambda m: m.matrices.pop(), "8 tensors"),
        (lambda m: m.ClearField("matrices"), "0 tensors"),
        (lambda m: m.matrices.extend([m.matrices[0]] * 60), "69 tensors"),
    ],
)
def test_a_shape_that_is_none_is_refused_in_one_line(
    change: Callable[[Any], None], words: str
) -> None:
    with pytest.raises(ModelError) as refused:
        layer_shape_of(wrong(change))
    assert words in refused.value.message
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 400


COUNTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab")
_counts = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2, 64, 128, 4096, 2**31]))
_names = st.one_of(
    st.text(max_size=20),
    st.sampled_from([name for name, _ in shape_named("synthetic:tiny-q8_0").types]),
)
_types = st.one_of(st.text(max_size=8), st.sampled_from(WEIGHT_TYPES))


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(COUNTS, _counts),
    ),
    st.one_of(st.none(), st.lists(st.tuples(_names, _types), max_size=70)),
    st.one_of(st.none(), _types),
)
def test_no_message_is_more_than_refused(
    counts: dict[str, int], tensors: list[tuple[str, str]] | None, head_type: str | None
) -> None:
    message = layer_shape_message(shape_named("synthetic:tiny-q8_0"))
    for name, count in counts.items():
        setattr(message, name, count)
    if tensors is not None:
        del message.matrices[:]
        for name, type_name in tensors:
            message.matrices.add(name=name, type_name=type_name)
    if head_type is not None:
        message.head_type = head_type
    try:
        shape = layer_shape_of(message)
    except ModelError:
        return
    # What is let through has a size, and the engine takes it or refuses it.
    assert shape.layer_bytes > 0
    assert shape.head_bytes > 0
    try:
        engine.config_for(shape.config)
    except ModelError:
        return
