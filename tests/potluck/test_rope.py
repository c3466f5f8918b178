"""What files say of rotary scaling, and which of it makes no sense."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from potluck import gguf
from potluck.errors import ModelError
from potluck.model import ModelConfig, config_of
from potluck.rope import UNSCALED, RopeScaling
from potluck.testing import Tensor, TinyShape, tiny_metadata, tiny_tensors, write_gguf, write_tiny
from potluck.testing.writer import Metadata

SHAPE = TinyShape(n_layers=1, context_tokens=512)
YARN = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 128}


def config(folder: Path, keys: dict[str, Metadata], shape: TinyShape = SHAPE) -> ModelConfig:
    path = write_tiny(folder / "x.gguf", replace(shape, rope_keys=tuple(keys.items())))
    return config_of(gguf.read(path))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, UNSCALED),
        ({"scaling.type": "none", "scaling.factor": 4.0}, UNSCALED),
        ({"scaling.type": "linear"}, UNSCALED),
        ({"scaling.type": "linear", "scaling.factor": 4.0}, RopeScaling(factor=4)),
        ({"scaling.factor": 4.0}, RopeScaling(factor=4)),
        ({"scale_linear": 2.5}, RopeScaling(factor=2.5)),
        ({"scale_linear": 2.0, "scaling.factor": 3.0}, RopeScaling(factor=3)),
        ({"scaling.attn_factor": 1.5}, RopeScaling(magnitude=1.5)),
        ({**YARN, "scaling.finetuned": True}, RopeScaling(4, 1, 128)),
        ({"scaling.type": "yarn", "scaling.factor": 2.0}, RopeScaling(2, 1, 512)),
        ({**YARN, "scaling.yarn_ext_factor": -1.0}, RopeScaling(4, 1, 128)),
        ({**YARN, "scaling.yarn_ext_factor": 0.0}, RopeScaling(4)),
        (
            {
                **YARN,
                "scaling.yarn_ext_factor": 0.5,
                "scaling.yarn_beta_fast": 16.0,
                "scaling.yarn_beta_slow": 2,
                "scaling.attn_factor": 0.5,
                "scaling.yarn_attn_factor": 1.25,
            },
            RopeScaling(4, 0.5, 128, 16, 2, 0.625),
        ),
    ],
    ids=str,
)
def test_scaling_is_read_as_llama_cpp_reads_it(
    tmp_path: Path, architecture: str, keys: dict[str, Metadata], expected: RopeScaling
) -> None:
    shape = replace(SHAPE, architecture=architecture)
    assert config(tmp_path, keys, shape).rope_scaling == expected


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"scaling.type": "longrope"}, "rope scaling longrope is not supported (none, linear, "),
        ({"scaling.type": 3}, "llama.rope.scaling.type is int 3, expected a string"),
        ({"scaling.factor": 0.0}, "rope.scaling.factor is 0, expected 1 to 1,048,576"),
        ({"scaling.factor": 0.5}, "rope.scaling.factor is 0.5"),
        ({"scaling.factor": -4.0}, "rope.scaling.factor is -4"),
        ({"scaling.factor": 1e30}, "rope.scaling.factor is 1e+30"),
        ({"scaling.factor": math.nan}, "llama.rope.scaling.factor is float nan, expected a finite"),
        ({"scaling.factor": math.inf}, "llama.rope.scaling.factor is float inf, expected a finite"),
        ({"scaling.factor": "4"}, "llama.rope.scaling.factor is str 4, expected a finite number"),
        ({"scale_linear": 0.0}, "rope.scaling.factor is 0"),
        ({"scaling.attn_factor": 0.0}, "rope.scaling.attn_factor is 0"),
        ({"scaling.attn_factor": -1.0}, "rope.scaling.attn_factor is -1"),
        ({**YARN, "scaling.yarn_attn_factor": 1e30}, "rope.scaling.attn_factor is 1e+30"),
        ({**YARN, "scaling.original_context_length": 0}, "original_context_length is 0"),
        ({**YARN, "scaling.original_context_length": 1.5}, "float 1.5, expected a whole number"),
        ({**YARN, "scaling.yarn_ext_factor": 2.0}, "rope.scaling.yarn_ext_factor is 2, expected 0"),
        ({**YARN, "scaling.yarn_beta_fast": 0.0}, "rope.scaling.yarn_beta_fast is 0"),
        ({**YARN, "scaling.yarn_beta_slow": -1.0}, "rope.scaling.yarn_beta_slow is -1"),
        ({**YARN, "freq_base": 1.0}, "rope base 1.0, with YaRN expected 1.5 to 1e12"),
        ({"scaling.yarn_ext_factor": 1.0}, "yarn_ext_factor is 1, but llama.rope.scaling.type lin"),
        ({**YARN, "scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1; only 0 is"),
    ],
    ids=str,
)
def test_scaling_that_makes_no_sense_is_refused_by_name(
    tmp_path: Path, keys: dict[str, Metadata], names: str
) -> None:
    pairs = dict(tiny_metadata(SHAPE)) | {f"llama.rope.{k}": v for k, v in keys.items()}
    path = write_gguf(tmp_path / "x.gguf", list(pairs.items()), tiny_tensors(SHAPE))
    with pytest.raises(ModelError) as caught:
        config_of(gguf.read(path))
    assert names in caught.value.message
    assert caught.value.message.count("x.gguf") == 1


def test_divisors_of_frequencies_come_from_their_tensor(tmp_path: Path) -> None:
    divisors = (1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 0.75)
    shape = replace(SHAPE, rope_divisors=divisors)
    assert config(tmp_path, {}, shape).rope_scaling == RopeScaling(divisors=divisors)
    stretched = config(tmp_path, {"scaling.factor": 2.0}, shape).rope_scaling
    assert stretched == RopeScaling(2, divisors=divisors)


def divisors_of(*values: float) -> Tensor:
    return Tensor(
        "rope_freqs.weight", "f32", (len(values),), struct.pack(f"<{len(values)}f", *values)
    )


@pytest.mark.parametrize(
    ("tensor", "names"),
    [
        (divisors_of(*[1.0] * 7), r"rope_freqs.weight: f32 \[7\], expected f32 \[8\]"),
        (divisors_of(*[1.0] * 16), r"rope_freqs.weight: f32 \[16\], expected f32 \[8\]"),
        (Tensor("rope_freqs.weight", "f16", (8,), bytes(16)), r"f16 \[8\], expected f32 \[8\]"),
        (divisors_of(*[1.0] * 7, 0.0), "rope_freqs.weight: value 7 is 0, expected 0.5 to"),
        (divisors_of(-2.0, *[1.0] * 7), "rope_freqs.weight: value 0 is -2"),
        (divisors_of(1.0, math.inf, *[1.0] * 6), "rope_freqs.weight: value 1 is inf"),
        (divisors_of(math.nan, *[1.0] * 7), "rope_freqs.weight: value 0 is nan"),
        (divisors_of(1e-30, *[1.0] * 7), "rope_freqs.weight: value 0 is 1e-30"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_divisors_that_make_no_sense_are_refused_by_name(
    tmp_path: Path, tensor: Tensor, names: str
) -> None:
    tensors = [*tiny_tensors(SHAPE), tensor]
    path = write_gguf(tmp_path / "x.gguf", tiny_metadata(SHAPE), tensors)
    with pytest.raises(ModelError, match=names) as caught:
        config_of(gguf.read(path))
    assert caught.value.message.count("x.gguf") == 1


def test_only_llama_has_divisors(tmp_path: Path) -> None:
    shape = replace(SHAPE, architecture="qwen2", rope_divisors=(1.0,) * 8)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight is no part of a qwen2 model"):
        config(tmp_path, {}, shape)


def test_a_file_that_shrank_since_its_header_was_read_is_an_error(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "x.gguf", replace(SHAPE, rope_divisors=(1.0,) * 8))
    file = gguf.read(path)
    with path.open("r+b") as opened:
        opened.truncate(file.tensors["rope_freqs.weight"].offset_bytes + 4)
    with pytest.raises(ModelError, match=r"x\.gguf: .*rope_freqs.weight ends .* behind the end"):
        config_of(file)
