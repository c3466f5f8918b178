"""How a Hugging Face model stretches positions is told as GGUF tells it, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck.convert.hugging_face import open_hugging_face
from potluck.errors import ModelError
from potluck.testing import TinyShape
from potluck.testing.checkpoints import changed_config, write_hugging_face

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


def rope_pairs(folder: Path, **changes: object) -> dict[str, Any]:
    pairs = dict(open_hugging_face(changed_config(folder, **changes)).metadata)
    return {k.removeprefix("llama.rope."): v for k, v in pairs.items() if ".rope." in k}


def test_linear_scaling(folder: Path) -> None:
    scaling = {"type": "linear", "factor": 4.0}
    expected = {"scaling.type": "linear", "scaling.factor": 4.0}
    expected |= {"freq_base": 10_000.0, "dimension_count": 16}
    assert rope_pairs(folder, rope_scaling=scaling) == expected


def test_newer_rope_parameters(folder: Path) -> None:
    newer = {"rope_type": "default", "rope_theta": 500_000.0}
    expected = {"freq_base": 500_000.0, "dimension_count": 16}
    assert rope_pairs(folder, rope_parameters=newer, rope_theta=None) == expected


def test_yarn_scaling(folder: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
    found = rope_pairs(folder, rope_scaling=yarn | {"beta_fast": 32, "attention_factor": 1.1386})
    assert found == {
        "freq_base": 10_000.0,
        "scaling.type": "yarn",
        "scaling.factor": 4.0,
        "scaling.original_context_length": 64,
        "scaling.yarn_beta_fast": 32.0,
        "dimension_count": 16,
    }


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_llama_3_scaling_is_a_tensor_of_factors(folder: Path) -> None:
    """LLaMA 3.1's 64 factors: 29 ones, 6 between, 29 eights; as its own reference code has them."""
    shape = TinyShape(
        weight_type="f32", vocabulary="spm", dim=128, n_heads=1, n_kv_heads=1, head_dim=128
    )
    write_hugging_face(folder, shape, config={"rope_theta": 500_000.0, "rope_scaling": LLAMA3})
    source = open_hugging_face(folder)
    assert not [k for k, _ in source.metadata if "rope.scaling" in k]
    tensor = next(t for t in source.tensors if t.name == "rope_freqs.weight")
    assert (tensor.shape, tensor.type_name) == ((64,), "f32")
    factors = np.frombuffer(tensor.read(0, 1), np.float32)
    frequencies = 500_000.0 ** (-np.arange(0, 128, 2) / 128)
    waves = 2 * np.pi / frequencies
    smooth = (8192 / waves - 1) / (4 - 1)
    mixed = (1 - smooth) * frequencies / 8 + smooth * frequencies
    expected = np.where(waves < 8192 / 4, frequencies, mixed)
    expected = np.where(waves > 8192, frequencies / 8, expected)
    assert np.allclose(frequencies / factors, expected, rtol=1e-6)
    assert [int((factors == 1).sum()), int((factors == 8).sum())] == [29, 29]


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "dynamic", "factor": 2.0}, "rope scaling dynamic is not supported"),
        ({"rope_type": "longrope", "factor": 2.0}, "rope scaling longrope is not supported"),
        ({"factor": 2.0}, "rope_scaling.factor without a type"),
        ({"type": "linear"}, "rope_scaling.factor is nothing, expected a number"),
        ({"type": "linear", "factor": 0}, "rope_scaling.factor is 0, expected a number from 1"),
        ({"type": "linear", "factor": "2"}, "rope_scaling.factor is '2', expected"),
        ({"type": "yarn", "factor": 4, "mscale": 1.0}, "mscale is not supported"),
        ({"type": "yarn", "factor": 4, "attention_factor": 1.0}, "attention_factor 1 is not"),
        ({"type": "yarn", "factor": 4, "truncate": False}, "truncate false is not"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "low_freq_factor 1 is not below"),
        (["linear"], "rope_scaling is an array, expected an object"),
    ],
)
def test_other_scalings_are_refused(folder: Path, scaling: object, message: str) -> None:
    assert message in refusal(changed_config(folder, rope_scaling=scaling))
