"""LoRA adapters as PEFT saves them, of seeded random values: a folder beside a tiny model's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from potluck.testing.checkpoints import hugging_face_tensors
from potluck.testing.quantize import F32
from potluck.testing.safetensors import stored, write_safetensors
from potluck.testing.tiny import TinyShape

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def adapter_tensors(
    shape: TinyShape, modules: Sequence[str] = ATTENTION, *, rank: int = 4, seed: int = 1
) -> dict[str, F32]:
    """A and B of `modules` in every layer, by PEFT's names; B is not 0, as if it were trained."""
    random = np.random.default_rng(seed)
    found: dict[str, F32] = {}
    for name, values in hugging_face_tensors(shape).items():
        module = name.removesuffix(".weight")
        if module.endswith(tuple(modules)):
            rows, cols = values.shape
            for part, size in (("A", (rank, cols)), ("B", (rows, rank))):
                values = random.normal(0, 0.3, size).astype(np.float32)
                found[f"base_model.model.{module}.lora_{part}.weight"] = values
    return found


def write_adapter(
    folder: Path,
    tensors: Mapping[str, F32],
    *,
    config: Mapping[str, object] | None = None,
    type_name: str = "f32",
) -> Path:
    """The folder, which is made. `config` changes keys of adapter_config.json; None leaves one out.

    r is what A of the first module has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, object] = {
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": next((len(v) for name, v in tensors.items() if ".lora_A." in name), 8),
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    found |= config or {}
    json_text = json.dumps(
        {k: v for k, v in found.items() if k not in (config or {}) or v is not None}
    )
    (folder / "adapter_config.json").write_text(json_text)
    encoded = {name: stored(values, type_name) for name, values in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", encoded)
    return folder


def merged_values(shape: TinyShape, tensors: Mapping[str, F32], scale: float) -> dict[str, F32]:
    """Hugging Face's tensors with W + scale * B @ A, computed in float64 and rounded at the end."""
    found = hugging_face_tensors(shape)
    for name, down in tensors.items():
        if ".lora_A." in name:
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            module = name.removeprefix("base_model.model.").partition(".lora_")[0]
            change = scale * (up.astype(np.float64) @ down.astype(np.float64))
            found[f"{module}.weight"] = (found[f"{module}.weight"] + change).astype(np.float32)
    return found
